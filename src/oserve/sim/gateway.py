"""The simulated gateway: a bounded queue by rank, demotion, shedding, retries and migrations.

It implements ``control.dispatch.RequestMachine`` in a form that numba compiles, for streams on
replicas that never answer with an error; a property test compares the two. All requests of one time
enter the queue first. Then the gateway dispatches by rank, refuses new requests beyond the bound,
and sheds those that have waited too long.
"""

from oserve.control.dispatch.order import PRIORITY_PER_S
from oserve.control.dispatch.overload import DEMOTED_S
from oserve.sim.blocks import units_of
from oserve.sim.compiled import compiled
from oserve.sim.completion import book, close, wait_at
from oserve.sim.crowding import crowded_out
from oserve.sim.layout import (
    ARRIVAL,
    ARRIVED,
    CHARGED,
    CLASS,
    CLASSES,
    COMPUTED,
    DECODE,
    DEMOTE_AT,
    ENTERED,
    FIXED_SHARES,
    FREED,
    FRESH,
    INFLIGHT,
    IS_LATE,
    LIVE_COST,
    LOST,
    MADE,
    MAX_ATTEMPTS,
    MAX_INFLIGHT,
    MAX_MOVES,
    MAX_PROMPT,
    MAX_QUEUED,
    MOVES,
    NEVER,
    NEXT,
    NONE,
    ON,
    OUTPUT,
    OWED_PROMPT,
    PAID,
    PAID_PROMPT,
    PHASE,
    POLICY,
    PRIORITY,
    PROMPT,
    PS,
    QUEUED,
    READY,
    REENTERED,
    REFUSED,
    REPLAYS,
    REPLICAS,
    REQUEST,
    ROLE,
    ROUND,
    SENT_AT,
    SHED,
    SHED_AT,
    SHED_CURSOR,
    SHEDS,
    STATUS,
    TENANTS,
    WAITS,
    WAKES,
    WAKES_BEFORE,
)
from oserve.sim.routing import UNSERVABLE, choose
from oserve.sim.shares import (
    begins_to_wait,
    charge,
    correct_charge,
    first_waiting,
    lift,
    over_share,
    pull,
    put,
    skip,
    take,
    waits_no_more,
)
from oserve.sim.state import KernelState


@compiled
def queued(s: KernelState) -> int:
    """Requests that wait."""
    return s.glob[WAITS]


@compiled
def send(s: KernelState, request: int, index: int, now: int) -> None:
    """Dispatch a request to a replica, and book the work."""
    base = request * REQUEST
    prompt = s.req[base + PROMPT] + s.req[base + MADE]
    whole = int(s.own[index] * PS + 0.5)
    # The parts of a sum may round up where the sum does not.
    part = min(whole, int(prompt * s.costs[2 * index] * PS + 0.5))
    at = s.where[index]
    s.req[base + SENT_AT] = now
    waits_no_more(s, request)
    if s.glob[TENANTS] > 0:
        charge(s, request, index, now)
    book(s.req, s.mem, at, request, part, whole)
    wait_at(s.req, s.mem, at, request, now)


@compiled
def own_prompt_ps(s: KernelState, request: int) -> int:
    """Picoseconds of a request's prompt at the fastest replica, if demotion depends on it."""
    if s.glob[LIVE_COST] == 0:
        return 0
    least = NONE
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if s.mem[at + PHASE] != READY or s.mem[at + ROLE] == DECODE:
            continue
        if least == NONE or s.costs[2 * index] < s.costs[2 * least]:
            least = index
    if least == NONE:
        return 0
    return int(s.req[request * REQUEST + PROMPT] * s.costs[2 * least] * PS + 0.5)


@compiled
def is_late(s: KernelState, request: int, now: int) -> bool:
    """Whether a waiting request would miss its TTFT; resuming streams have their first token."""
    base = request * REQUEST
    if s.req[base + DEMOTE_AT] == NEVER or s.req[base + MADE] > 0:
        return False
    return now + own_prompt_ps(s, request) > s.req[base + DEMOTE_AT]


@compiled
def demote(s: KernelState, request: int) -> None:
    """Demote the head of the queue: it follows all requests that are not late, in arrival order."""
    base = request * REQUEST
    take(s, request)
    s.req[base + IS_LATE] = 1
    demoted_s = s.req[base + ARRIVAL] / PS + DEMOTED_S
    s.req[base + PRIORITY] = int(demoted_s * PRIORITY_PER_S)
    put(s, request)


@compiled
def head(s: KernelState, now: int, alone: bool) -> int:
    """The request to dispatch next, after demotion of late ones; ``NONE`` if nobody waits.

    Like the machine, it does not demote a request that enters ``alone``.
    """
    while True:
        request = first_waiting(s)
        if request == NONE or alone or s.req[request * REQUEST + IS_LATE] == 1:
            return request
        if not is_late(s, request, now):
            return request
        demote(s, request)


@compiled
def any_room(s: KernelState) -> bool:
    """Whether any replica has room for a further request."""
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if s.mem[at + PHASE] != READY or s.mem[at + ROLE] == DECODE:
            continue
        if s.mem[at + INFLIGHT] >= s.mem[at + MAX_INFLIGHT]:
            continue
        if s.mem[at + OWED_PROMPT] < s.mem[at + MAX_PROMPT]:
            return True
    return False


@compiled
def place(s: KernelState, request: int, index: int, now: int) -> None:
    """Send a request to the replica that was chosen, or refuse what none can ever hold."""
    if index == UNSERVABLE:
        waits_no_more(s, request)
        close(s, request, REFUSED, now)
    else:
        send(s, request, index, now)


@compiled
def dispatch(s: KernelState, now: int, alone: bool) -> None:
    """Send waiting requests, best rank first, while a replica has room for one of them.

    A request overtakes those that wait for larger replicas, or for those of their own tier, which
    cannot use its slot, and those of tenants that leave it free.
    """
    passed, classes = NONE, s.glob[CLASSES]
    for group in range(classes, 2 * classes):
        s.groups[group] = NEVER
    while True:
        request = head(s, now, alone)
        if request == NONE:
            break
        base = request * REQUEST
        tight = over_share(s, request)
        blocks = units_of(s.req[base + PROMPT] + s.req[base + OUTPUT])
        group = classes + s.groups[s.req[base + CLASS]]
        index = NONE
        if tight or blocks < s.groups[group]:
            index = choose(s, request, now, tight)
            # With fixed shares, requests wait for their replicas in the order of the queue.
            if index == NONE and (s.glob[POLICY] == FIXED_SHARES or not any_room(s)):
                break
        if index == NONE and tight:
            skip(s, request)
            continue
        take(s, request)
        if index == NONE:
            s.groups[group] = min(s.groups[group], blocks)
            s.req[base + NEXT] = passed
            passed = request
        else:
            place(s, request, index, now)
    while passed != NONE:
        request = passed
        passed = s.req[request * REQUEST + NEXT]
        put(s, request)


@compiled
def enter(s: KernelState, request: int) -> None:
    """Add a request to the queue, until ``settle``."""
    s.req[request * REQUEST + STATUS] = QUEUED
    begins_to_wait(s, request)
    put(s, request)


@compiled
def enter_again(s: KernelState, request: int, now: int) -> None:
    """Retry or resume a request whose replica has ended, or end it as lost.

    Before its first token that costs an attempt, after it a migration of its stream.
    """
    base = request * REQUEST
    moves = s.req[base + MADE] > 0
    if moves:
        allowed = s.req[base + MOVES] < s.glob[MAX_MOVES]
    else:
        allowed = s.req[base + REPLAYS] + 1 < s.glob[MAX_ATTEMPTS]
    if allowed and not moves and s.req[base + CHARGED] == 1:
        # What a replica failed to finish is not charged.
        s.paid[request * PAID + PAID_PROMPT] = 0.0
    correct_charge(s, request)
    if not allowed:
        close(s, request, LOST, now)
        return
    s.req[base + ON] = NONE
    s.req[base + COMPUTED] = 0
    s.req[base + REPLAYS] += 1
    if moves:
        s.req[base + MOVES] += 1
    else:
        s.req[base + ENTERED] = s.glob[ROUND]
        s.glob[SHED_CURSOR] = min(s.glob[SHED_CURSOR], request)
    s.glob[REENTERED] += 1
    enter(s, request)


@compiled
def refuse(s: KernelState, request: int, now: int) -> None:
    """Refuse a new request that still waits, if the queue exceeds its bound."""
    if s.req[request * REQUEST + STATUS] == QUEUED and queued(s) > s.glob[MAX_QUEUED]:
        other = crowded_out(s, request)
        withhold(s, other)
        close(s, other, REFUSED, now)


@compiled
def settle(s: KernelState, first: int, now: int) -> None:
    """Dispatch by rank, then refuse new requests beyond the bound, the latest first.

    Requests from number ``first`` on have just arrived. Others have entered again in this round;
    resuming streams are not among those, since the bound does not apply to them.
    """
    entered = s.glob[ARRIVED] - first + s.glob[REENTERED]
    if s.glob[FRESH] > 0:
        lift(s)
    if entered > 0 or s.glob[FREED] == 1:
        dispatch_round(s, now, entered == 1 and queued(s) == 1)
    if entered > 0 and queued(s) > s.glob[MAX_QUEUED]:
        for request in range(s.glob[ARRIVED] - 1, first - 1, -1):
            refuse(s, request, now)
        if s.glob[REENTERED] > 0:
            for request in range(first - 1, -1, -1):
                if s.req[request * REQUEST + ENTERED] == s.glob[ROUND] - 1:
                    refuse(s, request, now)
    s.glob[REENTERED] = 0
    if s.glob[FREED] == 1:
        dispatch_round(s, now, False)
    if s.glob[SHEDS] == 1:
        shed(s, now)
        if s.glob[FREED] == 1:
            dispatch_round(s, now, False)


@compiled
def dispatch_round(s: KernelState, now: int, alone: bool) -> None:
    """Dispatch; what enters or becomes free from now on belongs to the next round."""
    dispatch(s, now, alone)
    s.glob[FREED] = 0
    s.glob[WAKES_BEFORE] = s.glob[WAKES]
    s.glob[ROUND] += 1


@compiled
def next_to_shed(s: KernelState) -> int:
    """The waiting request to shed next: the oldest, since the limit is the same for all."""
    request = s.glob[SHED_CURSOR]
    while request < s.glob[ARRIVED]:
        base = request * REQUEST
        if s.req[base + STATUS] == QUEUED and s.req[base + MADE] == 0:
            break
        request += 1
    s.glob[SHED_CURSOR] = request
    return request if request < s.glob[ARRIVED] else NONE


@compiled
def shed(s: KernelState, now: int) -> None:
    """Shed requests that have waited too long."""
    while True:
        request = next_to_shed(s)
        if request == NONE or s.req[request * REQUEST + SHED_AT] > now:
            return
        withhold(s, request)
        close(s, request, SHED, now)


@compiled
def withhold(s: KernelState, request: int) -> None:
    """Take a request out of the queue for good."""
    pull(s, request)
    waits_no_more(s, request)
    if s.glob[TENANTS] > 0:
        # Somebody may have waited for its turn to pass.
        s.glob[FREED] = 1
