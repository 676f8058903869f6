"""The choice of a replica, on plain numbers, shared by the live router and the simulator.

Replicas with a share of the request's type form its soft pool; the one with the earliest expected
completion wins. The code is only arithmetic and indexing, so that the simulator can compile it.
"""

from collections.abc import Sequence
from typing import Final

POOL: Final = 0
OVERFLOW: Final = 1
POOL_UNAVAILABLE: Final = 2
NO_REPLICA: Final = 3
ALL_FULL: Final = 4

# Expected completions are compared in steps of 0.1 ms; closer ones count as equal.
_STEPS_PER_S: Final = 1e4


def pick(
    shares: Sequence[float],
    work_s: Sequence[float],
    own_s: Sequence[float],
    inflight: Sequence[int],
    max_inflight: Sequence[int],
    fits: Sequence[int],
    overflow_s: float,
    replicas: int,
    row: int,
) -> tuple[int, int]:
    """The index of the chosen replica and the reason (a code above); -1 if none can take it.

    One entry per replica: its routing share of the request's type (from entry ``row`` on), its
    outstanding work, the work that the request would add, the requests in flight and their limit,
    and whether it may take the request. Ties go to the larger share, then to the lower index.
    """
    pool = out = -1
    pool_end = out_end = 0.0
    fitting = pooled = False
    for index in range(replicas):
        if not fits[index]:
            continue
        fitting = True
        share = shares[row + index]
        if share > 0.0:
            pooled = True
        if inflight[index] >= max_inflight[index]:
            continue
        end = ((work_s[index] + own_s[index]) * _STEPS_PER_S + 0.5) // 1.0
        if share > 0.0:
            if pool < 0 or end < pool_end or (end == pool_end and share > shares[row + pool]):
                pool, pool_end = index, end
        elif out < 0 or end < out_end:
            out, out_end = index, end
    if pool >= 0:
        if work_s[pool] > overflow_s and out >= 0 and out_end < pool_end:
            return out, OVERFLOW
        return pool, POOL
    if out >= 0:
        return out, OVERFLOW if pooled else POOL_UNAVAILABLE
    return -1, ALL_FULL if fitting else NO_REPLICA
