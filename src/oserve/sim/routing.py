"""The choice of a replica for a request: the live router's, and those of other systems."""

from typing import Final

from oserve.control.dispatch.pick import pick as plain_pick
from oserve.sim.blocks import blocks_of, reserved, whole_of
from oserve.sim.compiled import compiled
from oserve.sim.layout import (
    BLOCKS,
    CLASS,
    DECODE,
    EXPECTED,
    FIXED_SHARES,
    FREENESS,
    GONE,
    INFLIGHT,
    LEAST_REQUESTS,
    MADE,
    MAX_INFLIGHT,
    MAX_PROMPT,
    NEXT,
    NONE,
    OVERFLOW_PS,
    OWED,
    OWED_PROMPT,
    PHASE,
    POLICY,
    POOLS,
    PROMPT,
    PS,
    READY,
    REPLICAS,
    REQUEST,
    ROLE,
    ROUND_ROBIN,
    RUN,
    TIGHT_INFLIGHT,
    TIGHT_PROMPTING,
    TURN,
    WAIT,
)
from oserve.sim.lockstep import free_blocks
from oserve.sim.state import KernelState

# The live router's choice, compiled.
pick = compiled(plain_pick)

# No replica can ever serve the request.
UNSERVABLE: Final = -2


@compiled
def fill_views(s: KernelState, request: int, tight: bool) -> int:
    """Fill in the policies' view of each replica; returns the number that can take the request.

    ``fits`` is 1 for those. ``tight``: the request leaves slots free for other tenants.
    """
    base = request * REQUEST
    req, mem = s.req, s.mem
    prompt = req[base + PROMPT] + req[base + MADE]
    output = max(1, req[base + EXPECTED] - req[base + MADE])
    fitting = 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        s.fits[index] = 0
        s.inflight[index] = mem[at + INFLIGHT]
        s.most[index] = mem[at + MAX_INFLIGHT]
        if tight:
            field = TIGHT_PROMPTING if mem[at + OWED_PROMPT] > 0 else TIGHT_INFLIGHT
            s.most[index] = min(s.most[index], mem[at + field])
        if mem[at + OWED_PROMPT] >= mem[at + MAX_PROMPT]:
            s.most[index] = min(s.most[index], s.inflight[index])
        s.work[index] = mem[at + OWED] / PS
        s.own[index] = prompt * s.costs[2 * index] + output * s.costs[2 * index + 1]
        if mem[at + PHASE] != READY or mem[at + ROLE] == DECODE:
            continue
        if whole_of(req, mem, at, request) > mem[at + BLOCKS]:
            continue
        s.fits[index] = 1
        fitting += 1
    return fitting


@compiled
def unservable(s: KernelState, request: int) -> bool:
    """Whether no replica, not even one still loading, could ever hold the request."""
    alive = 0
    for index in range(s.glob[REPLICAS]):
        at = s.where[index]
        if s.mem[at + PHASE] != GONE and s.mem[at + ROLE] != DECODE:
            alive += 1
            if whole_of(s.req, s.mem, at, request) <= s.mem[at + BLOCKS]:
                return False
    return alive > 0


@compiled
def least(s: KernelState, policy: int) -> int:
    """The replica with the fewest requests in flight, or the least work."""
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
    """Smooth weighted round robin among replicas with a share; others only if there are none.

    Each replica gains its share as credit in every turn; the chosen one pays the total.
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
    """Free blocks of a replica, before steps that begin now."""
    return free_blocks(s.mem, s.where[index], now)


@compiled
def freeness(s: KernelState, index: int, now: int) -> float:
    """Llumnix: free blocks minus those that the queue needs, per running sequence."""
    at = s.where[index]
    free = free_blocks(s.mem, at, now)
    request = s.mem[at + WAIT]
    while request != NONE:
        base = request * REQUEST
        free -= blocks_of(s.mem, at, s.req[base + PROMPT] + s.req[base + MADE])
        free -= reserved(s.req, s.mem, at, request)
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
def choose(s: KernelState, request: int, now: int, tight: bool) -> int:
    """The replica that takes a request now; ``NONE`` if it must wait."""
    if fill_views(s, request, tight) == 0:
        return UNSERVABLE if unservable(s, request) else NONE
    policy, replicas = s.glob[POLICY], s.glob[REPLICAS]
    row = s.req[request * REQUEST + CLASS] * replicas
    for index in range(replicas):
        if s.shares[row + index] < 0.0:
            s.fits[index] = 0
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
