"""Under overload: whom to serve last, whom not at all, and who waits where that can be decided.

A request that waits for a replica and can no longer have its first token in time is served when
nobody else waits, first come (demotion): serving it first would make the next one late as well, and
the one after that. Past a second limit, if one is set, it is refused with Retry-After (shedding).

What an engine holds is out of the gateway's hands, so a replica is given no further request while
it owes a good deal of prompts: those handed over have their first token soon, and the rest waits
where it can be demoted or go to another replica. Answers under way do not count, so the batch stays
as large as the engine can make it.
"""

from dataclasses import dataclass

DEMOTED_S = 1e6
"""What demotion adds to a request's arrival to make its rank: more than any other difference."""

# Of the time to first token that is wanted: how much of it a replica may owe in prompts, and after
# how much a request that was not handed over counts as late. The rest is for the engine, where a
# prompt shares its steps with answers under way.
_OWED_OF_TTFT = 1 / 8
_LATE_AT = 3 / 4
# What is taken for the time from hand-over to first token: all but so many were quicker.
_SLOW = 0.1
# A step of that estimate, as a part of the time to first token that is wanted.
_STEP = 0.02
# Something is always left in which to wait.
_MOST_OF_TTFT = 3 / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadPolicy:
    """``ttft_s``: the time to first token that is wanted; ``None``: nobody is demoted.

    ``shed_after_s``: seconds of waiting after which a request is refused; ``None``: never.
    """

    ttft_s: float | None = None
    shed_after_s: float | None = None

    @property
    def late_after_s(self) -> float | None:
        """Seconds within which a request must be handed over and its prompt alone computed."""
        return None if self.ttft_s is None else _LATE_AT * self.ttft_s


def max_prompt_s(policy: OverloadPolicy, *, step_tokens: int, prefill_s_per_token: float) -> float:
    """Seconds of prompts that a replica may owe before it is given another; inf: no matter.

    ``step_tokens``: what its steps under way hold at most. With less they would run half empty.
    """
    if policy.ttft_s is None:
        return float("inf")
    return max(_OWED_OF_TTFT * policy.ttft_s, step_tokens * prefill_s_per_token)


class FirstTokens:
    """How long first tokens take from the hand-over on: a high quantile, followed in small steps.

    A slow engine, or one that shares its cores, needs more than what ``OverloadPolicy`` leaves it,
    and who waits up to that would be served just too late, one after the other.
    """

    def __init__(self, policy: OverloadPolicy) -> None:
        self._step_s = _STEP * (policy.ttft_s or 0.0)
        self._most_s = _MOST_OF_TTFT * (policy.ttft_s or 0.0)
        self.seconds = 0.0

    def observe(self, took_s: float) -> None:
        """One more had its first token."""
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
    """Whether a request sent now, its prompt taking ``prefill_s``, would miss its time.

    ``first_token_s``: what is known to pass until first tokens (``FirstTokens``).
    """
    if policy.ttft_s is None:
        return False
    needed_s = max(first_token_s, prefill_s + (1.0 - _LATE_AT) * policy.ttft_s)
    return now_s + needed_s > arrival_s + policy.ttft_s


def shed_at_s(policy: OverloadPolicy, *, arrival_s: float) -> float | None:
    """When a request that still waits is refused; ``None``: never."""
    return None if policy.shed_after_s is None else arrival_s + policy.shed_after_s
