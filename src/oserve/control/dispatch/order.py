"""The order in which waiting requests are served: short prompts first, with ageing.

A request's rank is a moment: its arrival plus a penalty that grows with its prompt. Whoever has
the earlier rank goes first. Since the penalty is bounded, a request is passed only by requests
that arrive within that bound after it: nothing starves, and no output length is needed.

When more comes than can be served in time, first come, first served makes everyone late. With
``freshest_first_s`` the arrivals of each window of so many seconds are served latest first: who has
waited too long already lets those pass who can still be served in time, and his turn comes when the
burst is over or the next window's requests are due. Nobody is passed by what arrives more than two
windows (and the penalties) later.
"""

import math
from dataclasses import dataclass

PRIORITY_PER_S = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """``penalty_s_per_token`` * prompt tokens, at most ``max_penalty_s``.

    ``freshest_first_s``: within windows of so many seconds the latest arrival goes first; 0: never.

    A client's own ``priority`` (lower is more urgent) moves the rank by ``client_step_s`` a step,
    at most ``max_client_steps`` either way.
    """

    penalty_s_per_token: float = 20.0 / 1500.0
    max_penalty_s: float = 60.0
    freshest_first_s: float = 0.0
    client_step_s: float = 1.0
    max_client_steps: int = 10


def rank_s(
    policy: OrderPolicy, *, arrival_s: float, prompt_tokens: int, client_priority: int = 0
) -> float:
    """The moment that orders a request among those waiting; lower goes first."""
    penalty_s = min(policy.max_penalty_s, policy.penalty_s_per_token * prompt_tokens)
    bound = policy.max_client_steps
    steps = max(-bound, min(bound, client_priority))
    window_s = policy.freshest_first_s
    if window_s > 0.0:
        # Mirrored within its window.
        arrival_s = (2.0 * math.floor(arrival_s / window_s) + 1.0) * window_s - arrival_s
    return arrival_s + penalty_s + steps * policy.client_step_s


def engine_priority(rank: float) -> int:
    """The rank as vLLM's integer ``priority`` (lower is served first), to the millisecond."""
    return int(rank * PRIORITY_PER_S)
