"""Which waiting request makes room in a full queue, as ``FairQueue.crowded_out`` decides it."""

from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    FLOW,
    FLOW_OF,
    FLOW_WAITS,
    HEAP,
    MADE,
    NONE,
    PAID,
    REQUEST,
    TENANTS,
    TIERS,
    URGENCY,
)
from oserve.sim.state import KernelState


@compiled
def latest_of(s: KernelState, tenant: int, urgency_s: float) -> int:
    """The latest waiting request of a tenant that is late or no more urgent, or ``NONE``."""
    latest = NONE
    for tier in range(s.glob[TIERS]):
        at = s.flows[(tier * s.glob[TENANTS] + tenant) * FLOW + HEAP]
        for place in range(at + 1, at + 1 + s.queue[at]):
            request = s.queue[place]
            # Streams that resume keep their places.
            if (
                s.req[request * REQUEST + MADE] == 0
                and s.paid[request * PAID + URGENCY] >= urgency_s
            ):
                latest = max(latest, request)
        for place in range(at + 1, at + 1 + s.late[at]):
            if s.req[s.late[place] * REQUEST + MADE] == 0:
                latest = max(latest, s.late[place])
    return latest


@compiled
def waits_by_weight(s: KernelState, tenant: int) -> float:
    """How many requests of a tenant wait, by its weight."""
    tenants = s.glob[TENANTS]
    waits = 0
    for tier in range(s.glob[TIERS]):
        waits += s.flows[(tier * tenants + tenant) * FLOW + FLOW_WAITS]
    return waits / s.weights[tenant]


@compiled
def crowded_out(s: KernelState, request: int) -> int:
    """The request to refuse for a full queue: the latest of the tenant with the most, or itself."""
    tenants = s.glob[TENANTS]
    if tenants == 0:
        return request
    own = waits_by_weight(s, s.req[request * REQUEST + FLOW_OF] % tenants)
    urgency_s = s.paid[request * PAID + URGENCY]
    above, last = -1.0, NONE
    while True:
        most, best = own, NONE
        for tenant in range(tenants):
            waits = waits_by_weight(s, tenant)
            tried = last != NONE and (waits > above or (waits == above and tenant <= last))
            if not tried and waits > most:
                most, best = waits, tenant
        if best == NONE:
            return request
        found = latest_of(s, best, urgency_s)
        if found != NONE:
            return found
        above, last = most, best
