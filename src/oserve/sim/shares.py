"""Fair shares between tenants, as ``control.dispatch.fair`` has them; a property test compares.

A flow is what one tenant asks for in one tier. Of the flows of a tier that wait, the one with the
lowest counter goes next; of equal counters the one that began to wait last. Sums of floats are made
in the same order as there, so that both decide alike. A cached prefix lends no turn here.
"""

from typing import Final

from oserve.control.dispatch.fair import LEAD, MOST_AHEAD_S, SEEN_AGAIN_S
from oserve.control.dispatch.order import PRIORITY_PER_S
from oserve.control.dispatch.overload import DEMOTED_S
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    ACTIVE,
    ACTIVE_PS,
    ARRIVAL,
    BEGUN,
    CHARGED,
    CHARGED_MADE,
    DECODE,
    DEVICES,
    EXPECTED,
    FLOW,
    FLOW_OF,
    FLOW_WAITS,
    FRESH,
    HEAP,
    HOLDER,
    IS_FRESH,
    IS_LATE,
    LEVEL,
    LEVELS,
    MADE,
    MAX_INFLIGHT,
    NEVER,
    NONE,
    OPEN,
    ORDER,
    PAID,
    PAID_PROMPT,
    PAID_TOKEN,
    PAID_WHOLE,
    PHASE,
    PRIORITY,
    PS,
    RANK,
    READY,
    REPLICAS,
    REQUEST,
    ROLE,
    ROUND,
    SEEN_AT,
    SERVED,
    SKIPPED,
    TAG,
    TENANTS,
    TIERS,
    UNBEGUN,
    URGENCY,
    WAITS,
    WAKES,
    WAKES_BEFORE,
    WOKEN,
)
from oserve.sim.lists import pop, push, sooner, withdraw
from oserve.sim.state import KernelState

SEEN_AGAIN_PS: Final = int(SEEN_AGAIN_S * PS)


@compiled
def put(s: KernelState, request: int) -> None:
    """Add a request to the queue of its flow."""
    base = request * REQUEST
    at = s.flows[s.req[base + FLOW_OF] * FLOW + HEAP]
    if s.req[base + IS_LATE] == 1:
        push(s.req, s.late, at, ARRIVAL, request)
    else:
        push(s.req, s.queue, at, ORDER, request)


@compiled
def take(s: KernelState, request: int) -> None:
    """Remove a request, which is the first of its flow, from its queue."""
    base = request * REQUEST
    at = s.flows[s.req[base + FLOW_OF] * FLOW + HEAP]
    if s.req[base + IS_LATE] == 1:
        pop(s.req, s.late, at, ARRIVAL)
    else:
        pop(s.req, s.queue, at, ORDER)


@compiled
def pull(s: KernelState, request: int) -> None:
    """Remove any request from its queue."""
    base = request * REQUEST
    at = s.flows[s.req[base + FLOW_OF] * FLOW + HEAP]
    if s.req[base + IS_LATE] == 1:
        withdraw(s.req, s.late, at, ARRIVAL, request)
    else:
        withdraw(s.req, s.queue, at, ORDER, request)


@compiled
def begins_to_wait(s: KernelState, request: int) -> None:
    """Count a request that waits from now on."""
    s.glob[WAITS] += 1
    flow = s.req[request * REQUEST + FLOW_OF] * FLOW
    s.flows[flow + FLOW_WAITS] += 1
    if s.flows[flow + FLOW_WAITS] == 1:
        s.glob[WAKES] += 1
        s.flows[flow + WOKEN] = s.glob[WAKES]
        s.flows[flow + IS_FRESH] = 1
        s.glob[FRESH] += 1


@compiled
def waits_no_more(s: KernelState, request: int) -> None:
    """Count a request that waits no longer."""
    s.glob[WAITS] -= 1
    flow = s.req[request * REQUEST + FLOW_OF]
    s.flows[flow * FLOW + FLOW_WAITS] -= 1
    if s.glob[TENANTS] > 0 and s.flows[flow * FLOW + FLOW_WAITS] == 0:
        s.lasts[flow // s.glob[TENANTS]] = flow


@compiled
def seen(s: KernelState, request: int, now: int) -> None:
    """A request has arrived: its tenant is active for a while."""
    if s.glob[TENANTS] == 0:
        return
    tenant = s.req[request * REQUEST + FLOW_OF] % s.glob[TENANTS]
    before = s.holders[tenant * HOLDER + SEEN_AT]
    if before >= 0 and now - before < SEEN_AGAIN_PS:
        return
    s.holders[tenant * HOLDER + SEEN_AT] = now
    s.glob[ACTIVE] = 0
    for index in range(s.glob[TENANTS]):
        if s.holders[index * HOLDER + SEEN_AT] + s.glob[ACTIVE_PS] >= now:
            s.glob[ACTIVE] += 1
        else:
            s.holders[index * HOLDER + SEEN_AT] = -NEVER


@compiled
def floor_s(s: KernelState, tier: int) -> float:
    """The counter that a flow which begins to wait in a tier has at least."""
    tenants = s.glob[TENANTS]
    found, level = False, 0.0
    for flow in range(tier * tenants, (tier + 1) * tenants):
        base = flow * FLOW
        if s.flows[base + FLOW_WAITS] == 0 or s.flows[base + IS_FRESH] == 1:
            continue
        own = s.levels[flow * LEVELS + LEVEL]
        if not found or own < level:
            level = own
        found = True
    if not found and s.lasts[tier] != NONE:
        level = s.levels[s.lasts[tier] * LEVELS + LEVEL]
    return level


@compiled
def lift(s: KernelState) -> None:
    """Lift the counters of flows that have begun to wait: idle time saves no credit."""
    tenants = s.glob[TENANTS]
    if tenants == 0:
        s.glob[FRESH] = 0
    while s.glob[FRESH] > 0:
        s.glob[FRESH] -= 1
        first = NONE
        for flow in range(s.glob[TIERS] * tenants):
            base = flow * FLOW
            if s.flows[base + IS_FRESH] == 1 and (
                first == NONE or s.flows[base + WOKEN] < s.flows[first * FLOW + WOKEN]
            ):
                first = flow
        if first == NONE:
            continue
        level = floor_s(s, first // tenants)
        s.flows[first * FLOW + IS_FRESH] = 0
        s.levels[first * LEVELS + LEVEL] = max(s.levels[first * LEVELS + LEVEL], level)


@compiled
def goes_first(s: KernelState, one: int, other: int) -> bool:
    """Whether a flow goes before another."""
    first, second = s.levels[one * LEVELS + LEVEL], s.levels[other * LEVELS + LEVEL]
    if first != second:
        return first < second
    return s.flows[one * FLOW + WOKEN] > s.flows[other * FLOW + WOKEN]


@compiled
def first_of_tier(s: KernelState, tier: int, late: int) -> int:
    """The first request of a tier, of those that are late or of the others."""
    tenants, best = s.glob[TENANTS], NONE
    heaps = s.late if late == 1 else s.queue
    left_free = s.lasts[(1 + late) * s.glob[TIERS] + tier] == s.glob[ROUND]
    for flow in range(tier * tenants, (tier + 1) * tenants):
        base = flow * FLOW
        if heaps[s.flows[base + HEAP]] == 0 or s.flows[base + SKIPPED + late] == s.glob[ROUND]:
            continue
        if left_free and s.flows[base + WOKEN] <= s.glob[WAKES_BEFORE]:
            continue
        if best == NONE or goes_first(s, flow, best):
            best = flow
    if best == NONE:
        return NONE
    return heaps[s.flows[best * FLOW + HEAP] + 1]


@compiled
def first_waiting(s: KernelState) -> int:
    """The request whose turn it is: by fair shares within a tier, by rank between tiers."""
    if s.glob[TENANTS] == 0:
        if s.queue[0] > 0:
            return s.queue[1]
        return s.late[1] if s.late[0] > 0 else NONE
    for late in range(2):
        field = ARRIVAL if late == 1 else ORDER
        best = NONE
        for tier in range(s.glob[TIERS]):
            found = first_of_tier(s, tier, late)
            if found != NONE and (best == NONE or sooner(s.req, field, found, best)):
                best = found
        if best != NONE:
            return best
    return NONE


@compiled
def skip(s: KernelState, request: int) -> None:
    """Try nothing more like this of its flow in this round; it leaves a slot free for others.

    That is for flows that begin to wait now. Those that wait longer do not pass it.
    """
    base = request * REQUEST
    flow, late = s.req[base + FLOW_OF], s.req[base + IS_LATE]
    s.flows[flow * FLOW + SKIPPED + late] = s.glob[ROUND]
    s.lasts[(1 + late) * s.glob[TIERS] + flow // s.glob[TENANTS]] = s.glob[ROUND]


@compiled
def active_weight(s: KernelState) -> float:
    """The sum of the weights of active tenants."""
    weight = 0.0
    for index in range(s.glob[TENANTS]):
        if s.holders[index * HOLDER + SEEN_AT] >= 0:
            weight += s.weights[index]
    return weight


@compiled
def over_share(s: KernelState, request: int) -> bool:
    """Whether a request's tenant leaves slots free: it has its share of all, others are active."""
    base = request * REQUEST
    if s.glob[ACTIVE] < 2 or s.req[base + MADE] > 0:
        return False
    tenant = s.req[base + FLOW_OF] % s.glob[TENANTS]
    weight = active_weight(s)
    most = 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if s.mem[at + PHASE] == READY and s.mem[at + ROLE] != DECODE:
            most += s.mem[at + MAX_INFLIGHT]
    return s.holders[tenant * HOLDER + OPEN] * weight >= most / 2 * s.weights[tenant]


@compiled
def raise_level(s: KernelState, flow: int, device_s: float) -> None:
    """Add to the counter of a flow."""
    s.levels[flow * LEVELS + SERVED] += device_s
    s.levels[flow * LEVELS + LEVEL] += device_s / s.weights[flow % s.glob[TENANTS]]


@compiled
def charge(s: KernelState, request: int, index: int, now: int) -> None:
    """Charge a request that is sent to a replica now, and set its rank in the engine's queue."""
    base, own = request * REQUEST, request * PAID
    devices = s.mem[s.where[index] + DEVICES]
    tokens = max(1, s.req[base + EXPECTED] - s.req[base + MADE])
    per_token = s.costs[2 * index + 1] * devices
    prompt = s.own[index] * devices - per_token * tokens
    if s.req[base + MADE] > 0 or prompt < 0.0:
        prompt = 0.0
    s.paid[own + PAID_PROMPT] = prompt
    s.paid[own + PAID_TOKEN] = per_token
    s.paid[own + PAID_WHOLE] = prompt + per_token * tokens
    s.req[base + CHARGED] = 1
    s.req[base + CHARGED_MADE] = s.req[base + MADE]
    flow = s.req[base + FLOW_OF]
    tenant = flow % s.glob[TENANTS]
    s.holders[tenant * HOLDER + OPEN] += 1
    tier, level = flow // s.glob[TENANTS], flow * LEVELS + LEVEL
    passes = s.lasts[(1 + s.req[base + IS_LATE]) * s.glob[TIERS] + tier] == s.glob[ROUND]
    most = 0.0
    if passes:
        most = floor_s(s, tier) + s.paid[own + PAID_WHOLE] / s.weights[tenant]
        most = max(s.levels[level], most)
    raise_level(s, flow, s.paid[own + PAID_WHOLE])
    if passes:
        s.levels[level] = min(s.levels[level], most)
    set_rank(s, request, now)


@compiled
def set_rank(s: KernelState, request: int, now: int) -> None:
    """Set the rank in the engine's queue of a request that was just charged."""
    base, own = request * REQUEST, request * PAID
    flow = s.req[base + FLOW_OF]
    tenant = flow % s.glob[TENANTS]
    serving = 0
    for other in range(s.glob[REPLICAS]):
        at = s.where[other]
        serving += s.mem[at + PHASE] == READY and s.mem[at + ROLE] != DECODE
    now_s = now / PS
    s.req[base + BEGUN] = 0
    weights = max(s.weights[tenant], active_weight(s))
    unbegun_s = s.levels[flow * LEVELS + UNBEGUN]
    s.levels[flow * LEVELS + UNBEGUN] += s.paid[own + PAID_WHOLE]
    ahead_s = LEAD * unbegun_s * weights / s.weights[tenant] / max(1, serving)
    tag = max(s.levels[flow * LEVELS + TAG], now_s + min(ahead_s, MOST_AHEAD_S))
    s.levels[flow * LEVELS + TAG] = tag
    late = s.req[base + IS_LATE] == 1
    rank = tag + s.paid[own + URGENCY] + (DEMOTED_S if late else 0.0)
    if s.glob[ACTIVE] < 2:
        rank = s.req[base + ARRIVAL] / PS + DEMOTED_S if late else s.paid[own + RANK]
    s.req[base + PRIORITY] = int(rank * PRIORITY_PER_S)


@compiled
def begins(s: KernelState, request: int) -> None:
    """The replica of a request has computed its prompt, or has lost it."""
    base = request * REQUEST
    if s.req[base + CHARGED] == 1 and s.req[base + BEGUN] == 0:
        s.req[base + BEGUN] = 1
        flow = s.req[base + FLOW_OF] * LEVELS
        s.levels[flow + UNBEGUN] -= s.paid[request * PAID + PAID_WHOLE]


@compiled
def correct_charge(s: KernelState, request: int) -> None:
    """Correct the charge of a request that leaves its replica to what it had there."""
    base, own = request * REQUEST, request * PAID
    if s.req[base + CHARGED] == 0:
        return
    begins(s, request)
    s.req[base + CHARGED] = 0
    flow = s.req[base + FLOW_OF]
    s.holders[(flow % s.glob[TENANTS]) * HOLDER + OPEN] -= 1
    made = max(0, s.req[base + MADE] - s.req[base + CHARGED_MADE])
    spent = s.paid[own + PAID_PROMPT] + s.paid[own + PAID_TOKEN] * made
    raise_level(s, flow, spent - s.paid[own + PAID_WHOLE])
    s.paid[own + PAID_WHOLE] = spent
