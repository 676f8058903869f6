"""How tiers share one queue: whose turn it is, who is late, and who is told so at its arrival.

The rank of a request (``order``) is its arrival plus a penalty for its prompt. Its tier adds the
time it may wait: the seconds until its first token is due, divided by the tier's weight and bounded
like the penalty. So a request with a tight limit overtakes those with more time, and none waits for
ever.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import OverloadAction, Promise, ReplicaLoad, Tier
from oserve.core.tier import least

REFUSED_LATE = frozenset({OverloadAction.SHED, OverloadAction.REJECT})
"""Tiers whose late requests are refused, not served last."""

# A prediction need not be longer than any client waits.
_MOST_S = 3600.0
_LEAST_S = 1e-9


def urgency_s(promise: Promise | None, due_s: float | None) -> float:
    """What a tier adds to the rank, without bounds; the lower goes first. 0 without a tier."""
    if promise is None:
        return 0.0
    if promise.tier.overload is OverloadAction.FIRST:
        return -math.inf
    return math.inf if due_s is None else due_s / promise.tier.weight


def shift_s(order: OrderPolicy, promise: Promise | None, output_tokens: int) -> float:
    """What a tier adds to the rank, between minus and plus the bound of the order's penalty."""
    if promise is None:
        return 0.0
    most = order.max_penalty_s
    return max(-most, min(most, urgency_s(promise, due_of(promise, output_tokens))))


def due_of(promise: Promise | None, output_tokens: int) -> float | None:
    """Seconds from arrival until the first token is due by the limits of its tier.

    ``None``: whenever. Limits that the client tightened do not count: they would be a way to go
    before others of the tier.
    """
    if promise is None or promise.tier.overload is OverloadAction.FIRST:
        return None
    return Promise.of(promise.tier).first_token_s(output_tokens)


@lru_cache(maxsize=1024)
def with_ttft(overload: OverloadPolicy, ttft_s: float | None) -> OverloadPolicy:
    """The policy for another time to first token."""
    return replace(overload, ttft_s=ttft_s)


def tightest(overload: OverloadPolicy, tiers: Sequence[Tier]) -> OverloadPolicy:
    """The policy for the tier whose first token is due soonest; unchanged without such a tier."""
    found = least(tier.ttft_s for tier in tiers)
    return overload if found is None else with_ttft(overload, found)


def first_token_in_s(
    loads: Iterable[ReplicaLoad],
    *,
    prompt_tokens: int,
    first_token_s: float,
    ahead: int,
    ahead_tokens: int,
) -> float:
    """Predicted seconds from now to the first token of a request that arrives now.

    ``loads``: of the replicas that may serve it. ``first_token_s``: the upper quantile of dispatch
    to first token. ``ahead``: waiting requests that go first, with so many prompt tokens. A
    replica without a slot frees one whenever a request ends: at its requests in flight per second
    of their expected work. One that owes too many prompts takes the next as it computes them.
    Infinite without replicas.
    """
    free_s = busy_s = math.inf
    rate_rps = 0.0
    mean_tokens = (ahead_tokens + prompt_tokens) / (ahead + 1)
    for load in loads:
        own_s = prompt_tokens * load.prefill_s_per_token
        if load.inflight < load.max_inflight:
            free_s = min(free_s, max(first_token_s, load.prompt_s + own_s))
        elif load.slots > 0:
            rate_rps += 1.0 / max(_LEAST_S, mean_tokens * load.prefill_s_per_token)
            busy_s = min(busy_s, max(first_token_s, load.prompt_s + own_s))
        else:
            rate_rps += load.inflight / max(_LEAST_S, load.work_s)
            busy_s = min(busy_s, max(first_token_s, own_s))
    if rate_rps == 0.0 or math.isfinite(free_s):
        return free_s
    return min(_MOST_S, (ahead + 1) / rate_rps + busy_s)
