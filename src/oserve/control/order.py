"""The order in which waiting requests are served: short prompts first, with ageing.

A request's rank is a moment: its arrival plus a penalty that grows with its prompt. Whoever has
the earlier rank goes first. Since the penalty is bounded, a request is passed only by requests
that arrive within that bound after it: nothing starves, and no output length is needed.
"""

from dataclasses import dataclass

_PRIORITY_PER_S = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """``penalty_s_per_token`` * prompt tokens, at most ``max_penalty_s``.

    A client's own ``priority`` (lower is more urgent) moves the rank by ``client_step_s`` a step,
    at most ``max_client_steps`` either way.
    """

    penalty_s_per_token: float = 20.0 / 1500.0
    max_penalty_s: float = 60.0
    client_step_s: float = 1.0
    max_client_steps: int = 10


def rank_s(
    policy: OrderPolicy, *, arrival_s: float, prompt_tokens: int, client_priority: int = 0
) -> float:
    """The moment that orders a request among those waiting; lower goes first."""
    penalty_s = min(policy.max_penalty_s, policy.penalty_s_per_token * prompt_tokens)
    bound = policy.max_client_steps
    steps = max(-bound, min(bound, client_priority))
    return arrival_s + penalty_s + steps * policy.client_step_s


def engine_priority(rank: float) -> int:
    """The rank as vLLM's integer ``priority`` (lower is served first), to the millisecond."""
    return int(rank * _PRIORITY_PER_S)
