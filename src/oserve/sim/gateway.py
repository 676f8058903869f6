"""The gateway before the replicas: a bounded queue in order of rank, and who serves whom.

A request is handed over as soon as a replica has room for it; the rest waits here, where all
replicas are seen. Who can no longer meet the first limit goes behind all who still can, first come,
and who is past the second is refused.
"""

from oserve.control.dispatch.pick import pick as plain_pick
from oserve.sim.blocks import blocks_of
from oserve.sim.compiled import compiled
from oserve.sim.completion import book, close, wait_at
from oserve.sim.layout import (
    ARRIVAL,
    BLOCKS,
    CLASS,
    COMPUTED,
    DECODE,
    DEMOTE_AT,
    EXPECTED,
    FIXED_SHARES,
    FREENESS,
    GONE,
    INFLIGHT,
    IS_LATE,
    LEAST_REQUESTS,
    MADE,
    MAX_INFLIGHT,
    MAX_PROMPT,
    MAX_QUEUED,
    NEVER,
    NEXT,
    NONE,
    ON,
    ORDER,
    OUTPUT,
    OVERFLOW_PS,
    OWED,
    OWED_PROMPT,
    PHASE,
    POLICY,
    POOLS,
    PRIORITY,
    PROMPT,
    PS,
    QUEUED,
    READY,
    REFUSED,
    REPLAYS,
    REPLICAS,
    REQUEST,
    ROLE,
    ROUND_ROBIN,
    RUN,
    SHED,
    SHED_AT,
    STATUS,
    TURN,
    WAIT,
)
from oserve.sim.lists import pop, push
from oserve.sim.lockstep import free_blocks
from oserve.sim.state import KernelState

# The live router's choice, compiled.
pick = compiled(plain_pick)

# Nobody can ever serve it.
_NEVER = -2
# Behind everyone who is not late, in engines that serve by priority.
_LATE_PRIORITY = 1 << 52


@compiled
def look(s: KernelState, request: int) -> int:
    """Fill in what the policies need to know of each replica; how many may take the request.

    ``fits`` says which may: 1, or 2 if they have no room now.
    """
    base = request * REQUEST
    req, mem = s.req, s.mem
    blocks = blocks_of(req[base + PROMPT] + req[base + OUTPUT])
    prompt = req[base + PROMPT] + req[base + MADE]
    output = max(1, req[base + EXPECTED] - req[base + MADE])
    fitting = 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        s.fits[index] = 0
        s.inflight[index] = mem[at + INFLIGHT]
        s.most[index] = mem[at + MAX_INFLIGHT]
        if mem[at + OWED_PROMPT] >= mem[at + MAX_PROMPT]:
            s.most[index] = min(s.most[index], s.inflight[index])
        s.work[index] = mem[at + OWED] / PS
        s.own[index] = prompt * s.costs[2 * index] + output * s.costs[2 * index + 1]
        if mem[at + PHASE] != READY or mem[at + ROLE] == DECODE or blocks > mem[at + BLOCKS]:
            continue
        s.fits[index] = 1
        fitting += 1
    return fitting


@compiled
def hopeless(s: KernelState, request: int) -> bool:
    """Whether no replica, not even one still loading, could ever hold the request."""
    base = request * REQUEST
    blocks = blocks_of(s.req[base + PROMPT] + s.req[base + OUTPUT])
    alive = 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if s.mem[at + PHASE] != GONE and s.mem[at + ROLE] != DECODE:
            alive += 1
            if blocks <= s.mem[at + BLOCKS]:
                return False
    return alive > 0


@compiled
def least(s: KernelState, policy: int) -> int:
    """The replica with least requests in flight, or least work."""
    best = NONE
    for index in range(s.glob[REPLICAS]):
        if s.fits[index] == 0 or s.inflight[index] >= s.most[index]:
            continue
        if policy == LEAST_REQUESTS:
            if best == NONE or s.inflight[index] < s.inflight[best]:
                best = index
        elif best == NONE or s.work[index] + s.own[index] < s.work[best] + s.own[best]:
            best = index
    return best


@compiled
def in_turn(s: KernelState) -> int:
    """The next replica after the last one chosen."""
    replicas = s.glob[REPLICAS]
    for step in range(replicas):
        index = (s.glob[TURN] + step) % replicas
        if s.fits[index] != 0 and s.inflight[index] < s.most[index]:
            s.glob[TURN] = (index + 1) % replicas
            return index
    return NONE


@compiled
def by_share(s: KernelState, row: int) -> int:
    """Smooth weighted round robin among those with a share; the others only if there are none.

    Each gains its share of credit in every turn, and the richest pays for all.
    """
    best, total, pooled = NONE, 0.0, False
    for index in range(s.glob[REPLICAS]):
        share = s.shares[row + index]
        if s.fits[index] == 0 or share <= 0.0:
            continue
        pooled = True
        if s.inflight[index] >= s.most[index]:
            continue
        total += share
        if best == NONE or s.credit[row + index] + share > (
            s.credit[row + best] + s.shares[row + best]
        ):
            best = index
    if best == NONE:
        return NONE if pooled else least(s, LEAST_REQUESTS)
    for index in range(s.glob[REPLICAS]):
        share = s.shares[row + index]
        if s.fits[index] != 0 and share > 0.0 and s.inflight[index] < s.most[index]:
            s.credit[row + index] += share
    s.credit[row + best] -= total
    return best


@compiled
def free_at(s: KernelState, index: int, now: int) -> int:
    """Blocks that no request holds on a replica, before steps that begin now."""
    return free_blocks(s.mem, s.where[index], now)


@compiled
def freeness(s: KernelState, index: int, now: int) -> float:
    """Llumnix: blocks free beyond what the queue asks for, per running sequence."""
    at = s.where[index]
    free = free_blocks(s.mem, at, now)
    request = s.mem[at + WAIT]
    while request != NONE:
        base = request * REQUEST
        free -= blocks_of(s.req[base + PROMPT] + s.req[base + MADE])
        request = s.req[base + NEXT]
    return free / max(1, s.mem[at + RUN])


@compiled
def freest(s: KernelState, now: int) -> int:
    """The replica with the greatest freeness."""
    best, most = NONE, 0.0
    for index in range(s.glob[REPLICAS]):
        if s.fits[index] == 0 or s.inflight[index] >= s.most[index]:
            continue
        free = freeness(s, index, now)
        if best == NONE or free > most:
            best, most = index, free
    return best


@compiled
def choose(s: KernelState, request: int, now: int) -> int:
    """The replica that takes a request now; ``NONE`` if it must wait."""
    if look(s, request) == 0:
        return _NEVER if hopeless(s, request) else NONE
    policy, replicas = s.glob[POLICY], s.glob[REPLICAS]
    row = s.req[request * REQUEST + CLASS] * replicas
    if policy == POOLS:
        overflow_s = s.glob[OVERFLOW_PS] / PS
        chosen, _ = pick(
            s.shares, s.work, s.own, s.inflight, s.most, s.fits, overflow_s, replicas, row
        )
        return chosen
    if policy == ROUND_ROBIN:
        return in_turn(s)
    if policy == FIXED_SHARES:
        return by_share(s, row)
    if policy == FREENESS:
        return freest(s, now)
    return least(s, policy)


@compiled
def send(s: KernelState, request: int, index: int, now: int) -> None:
    """Hand a request over to a replica, and book the work."""
    base = request * REQUEST
    prompt = s.req[base + PROMPT] + s.req[base + MADE]
    whole = int(s.own[index] * PS + 0.5)
    # The parts of a sum may round up where the sum does not.
    part = min(whole, int(prompt * s.costs[2 * index] * PS + 0.5))
    at = s.where[index]
    book(s.req, s.mem, at, request, part, whole)
    wait_at(s.req, s.mem, at, request, now)


@compiled
def expire(s: KernelState, now: int) -> int:
    """The request to serve next, once those who are late were put behind or refused.

    What is refused counts as refused at its limit, whenever that is noticed.
    """
    req = s.req
    while True:
        while s.late[0] > 0 and now > req[s.late[1] * REQUEST + SHED_AT]:
            request = pop(req, s.late, ARRIVAL)
            close(req, s.glob, request, SHED, req[request * REQUEST + SHED_AT])
        if s.queue[0] == 0:
            return s.late[1] if s.late[0] > 0 else NONE
        request = s.queue[1]
        base = request * REQUEST
        if now > req[base + DEMOTE_AT]:
            pop(req, s.queue, ORDER)
            req[base + IS_LATE] = 1
            req[base + PRIORITY] += _LATE_PRIORITY
            push(req, s.late, ARRIVAL, request)
        elif now > req[base + SHED_AT]:
            pop(req, s.queue, ORDER)
            close(req, s.glob, request, SHED, req[base + SHED_AT])
        else:
            return request


@compiled
def dispatch(s: KernelState, now: int) -> None:
    """Hand over what can be, in order."""
    while True:
        request = expire(s, now)
        if request == NONE:
            return
        index = choose(s, request, now)
        if index == NONE:
            return
        if s.req[request * REQUEST + IS_LATE] == 1:
            pop(s.req, s.late, ARRIVAL)
        else:
            pop(s.req, s.queue, ORDER)
        if index == _NEVER:
            close(s.req, s.glob, request, REFUSED, now)
        else:
            send(s, request, index, now)


@compiled
def enter(s: KernelState, request: int, now: int) -> None:
    """A request comes to the gateway; it is refused if the queue is full."""
    s.req[request * REQUEST + STATUS] = QUEUED
    push(s.req, s.queue, ORDER, request)
    dispatch(s, now)
    queued = s.queue[0] + s.late[0]
    if queued > s.glob[MAX_QUEUED] and s.req[request * REQUEST + STATUS] == QUEUED:
        withdraw(s, request)
        close(s.req, s.glob, request, REFUSED, now)


@compiled
def withdraw(s: KernelState, request: int) -> None:
    """Take a request out of the middle of its queue."""
    base = request * REQUEST
    is_late = s.req[base + IS_LATE] == 1
    heap, field = (s.late, ARRIVAL) if is_late else (s.queue, ORDER)
    key = s.req[base + field]
    s.req[base + field] = -NEVER
    place = 1
    while heap[place] != request:
        place += 1
    while place > 1:
        heap[place] = heap[place // 2]
        place //= 2
    heap[1] = request
    pop(s.req, heap, field)
    s.req[base + field] = key


@compiled
def replay(s: KernelState, request: int) -> None:
    """Back into the gateway's queue, with the tokens it has; the prompt is computed anew."""
    base = request * REQUEST
    s.req[base + STATUS] = QUEUED
    s.req[base + ON] = NONE
    s.req[base + COMPUTED] = 0
    s.req[base + REPLAYS] += 1
    if s.req[base + IS_LATE] == 1:
        push(s.req, s.late, ARRIVAL, request)
    else:
        push(s.req, s.queue, ORDER, request)
