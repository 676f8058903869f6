"""Overload control: demotion, shedding, and a bound on the prompts owed by a replica.

A waiting request that can no longer meet its deadline for the first token is demoted: it is served
after all others, in order of arrival. Serving it first would make the following requests late, too.
Past a second limit, if one is set, it is shed: refused with Retry-After.

The gateway cannot reorder what an engine holds. So a replica gets no further request while its
prompts owed exceed a bound. Dispatched requests then get their first token soon, and the others
wait in the gateway, which can demote them or choose another replica. Running decodes do not count,
so the batch stays as large as the engine can make it.
"""

from dataclasses import dataclass

DEMOTED_S = 1e6
"""Demotion adds this to the arrival time for the rank; it exceeds any other difference."""

# The share of requests above the estimated quantile of dispatch to first token.
_SLOW = 0.1
# A step of that estimate, as a fraction of the wanted time to first token.
_STEP = 0.02
# The estimate is capped, so that some time to wait always remains.
_MOST_OF_TTFT = 3 / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadPolicy:
    """``ttft_s``: the wanted time to first token; ``None``: no request is demoted.

    ``shed_after_s``: seconds of waiting after which a request is shed; ``None``: never.

    The rest are fractions of ``ttft_s``. ``owed_of_ttft``: the prompts that a replica may owe.
    ``late_of_ttft``, at most 1: the time after which an undispatched request is late. The remainder
    is for the engine, where a prompt shares its steps with running decodes.
    """

    ttft_s: float | None = None
    shed_after_s: float | None = None
    owed_of_ttft: float = 0.125
    late_of_ttft: float = 0.75

    @property
    def late_after_s(self) -> float | None:
        """Seconds from arrival within which dispatch plus the prefill alone must fit."""
        return None if self.ttft_s is None else self.late_of_ttft * self.ttft_s


def max_prompt_s(policy: OverloadPolicy, *, step_tokens: int, prefill_s_per_token: float) -> float:
    """The bound on a replica's prompts owed, in seconds of prefill; inf: no bound.

    ``step_tokens``: the most that its running steps hold. A lower bound would leave them half
    empty.
    """
    if policy.ttft_s is None:
        return float("inf")
    return max(policy.owed_of_ttft * policy.ttft_s, step_tokens * prefill_s_per_token)


class FirstTokens:
    """P90 of dispatch to first token, estimated by stochastic approximation in fixed steps.

    A slow engine, or one that shares its cores, may need more time than ``OverloadPolicy`` reserves
    for it. Without this estimate, requests would be dispatched just too late, one after another.
    """

    def __init__(self, policy: OverloadPolicy, seconds: float = 0.0) -> None:
        self._step_s = _STEP * (policy.ttft_s or 0.0)
        self._most_s = _MOST_OF_TTFT * (policy.ttft_s or 0.0)
        self.seconds = min(self._most_s, seconds)

    def observe(self, took_s: float) -> None:
        """Add the seconds from dispatch to first token of one request."""
        step = 1.0 - _SLOW if took_s > self.seconds else -_SLOW
        self.seconds = min(self._most_s, max(0.0, self.seconds + step * self._step_s))


def too_late(
    policy: OverloadPolicy,
    *,
    arrival_s: float,
    now_s: float,
    prefill_s: float,
    first_token_s: float = 0.0,
) -> bool:
    """Whether a request sent now, with ``prefill_s`` of prefill, would miss its deadline.

    ``first_token_s``: the estimated quantile of dispatch to first token (``FirstTokens``).
    """
    if policy.ttft_s is None:
        return False
    needed_s = max(first_token_s, prefill_s + (1.0 - policy.late_of_ttft) * policy.ttft_s)
    return now_s + needed_s > arrival_s + policy.ttft_s


def shed_at_s(policy: OverloadPolicy, *, arrival_s: float) -> float | None:
    """When a waiting request is shed; ``None``: never."""
    return None if policy.shed_after_s is None else arrival_s + policy.shed_after_s
