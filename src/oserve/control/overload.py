"""Under overload: whom to serve last, and whom not at all.

A request that waits for a replica and can no longer have its first token in time is served when
nobody else waits (demotion): serving it first would make the next one late as well, and the one
after that. Past a second limit, if one is set, it is refused with Retry-After (shedding).
"""

from dataclasses import dataclass

DEMOTED_S = 1e6
"""What demotion adds to a rank: more than any other difference, so the order among them stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadPolicy:
    """``ttft_s``: the time to first token that is wanted; ``None``: nobody is demoted.

    ``shed_after_s``: seconds of waiting after which a request is refused; ``None``: never.
    """

    ttft_s: float | None = None
    shed_after_s: float | None = None


def too_late(policy: OverloadPolicy, *, arrival_s: float, now_s: float, prefill_s: float) -> bool:
    """Whether a request sent now, its prompt taking ``prefill_s``, would miss its time."""
    return policy.ttft_s is not None and now_s + prefill_s > arrival_s + policy.ttft_s


def shed_in_s(policy: OverloadPolicy, *, arrival_s: float, now_s: float) -> float | None:
    """Seconds from now after which a request that still waits is refused; ``None``: never."""
    if policy.shed_after_s is None:
        return None
    return max(0.0, arrival_s + policy.shed_after_s - now_s)
