"""The order in which waiting requests are served: short prompts first, with ageing.

A request's rank is a time: its arrival plus a penalty that grows with its prompt. The earliest rank
goes first. The penalty is bounded, so only requests that arrive within that bound can overtake a
request: none starves. The order needs no output lengths.

Under overload, first come, first served makes every request late. With ``freshest_first_s`` the
arrivals of each window of so many seconds are served latest first. Requests that are late already
let those pass that can still be in time; they are served when the burst ends or the next window
begins. No request is overtaken by one that arrives more than two windows (plus the penalty) later.
"""

import math
from dataclasses import dataclass

PRIORITY_PER_S = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """The penalty is ``penalty_s_per_token`` * prompt tokens, at most ``max_penalty_s``.

    ``freshest_first_s``: the window in which the latest arrival goes first; 0: no windows.

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
    """The rank of a request in seconds; the lowest is served first."""
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
