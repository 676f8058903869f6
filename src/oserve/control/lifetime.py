"""How long a deployment stays the best one: the time over which a switch must pay.

Every time that another deployment becomes the preferred one, how long the last was is kept. What is
expected of the present one is the mean of what was left of those, of the same deployment if a few
of them are known, at the age it has now:

    mean of (d - age) over past d > age, beside an assumed one of ``prior_s`` that fades

and where it has outlived them all, its age again. A change is noticed ``lag_s`` late, after which
that much less is left.
"""

from collections import deque
from typing import Any

# What is assumed counts for, per change since.
_FADING = 0.7
_REMEMBERED = 32
_FEW = 3


class Lifetime:
    """Watches which deployment is preferred; all times in seconds."""

    def __init__(self, *, prior_s: float, most_s: float, lag_s: float = 0.0) -> None:
        self._prior_s = prior_s
        self._most_s = most_s
        self._lag_s = lag_s
        self._prior = 1.0
        self._past: deque[tuple[str, float]] = deque(maxlen=_REMEMBERED)
        self._preferred = ""
        self._since_s = 0.0

    def prefers(self, signature: str, now_s: float) -> None:
        """The best deployment now, by any name that tells deployments apart."""
        if not self._preferred:
            self._preferred, self._since_s = signature, now_s
        elif signature != self._preferred:
            self._past.append((self._preferred, self._age_s(now_s)))
            self._prior *= _FADING
            self._preferred, self._since_s = signature, now_s

    def takes_over(self, signature: str) -> None:
        """What was preferred goes by this name from now on: plans that are nearly equal are one."""
        if self._preferred:
            self._preferred = signature

    @property
    def preferred(self) -> str:
        """The name of what is preferred now."""
        return self._preferred

    def expected_s(self, signature: str, now_s: float) -> float:
        """Seconds for which this deployment is expected to be the best from now on."""
        age_s = self._age_s(now_s) if signature == self._preferred else 0.0
        own = [duration_s for name, duration_s in self._past if name == signature]
        past = own if len(own) >= _FEW else [duration_s for _, duration_s in self._past]
        left = [duration_s - age_s for duration_s in past if duration_s > age_s]
        if past and not left:
            return min(self._most_s, max(0.0, age_s - self._lag_s))
        seen_s = sum(max(0.0, item - self._lag_s) for item in left)
        mean_s = (self._prior * self._prior_s + seen_s) / (self._prior + len(left))
        return min(self._most_s, mean_s)

    def knows(self, signature: str) -> bool:
        """Whether this deployment was the best one a few times."""
        return sum(name == signature for name, _ in self._past) >= _FEW

    @property
    def known(self) -> frozenset[str]:
        """Deployments that were preferred, or are."""
        return frozenset(name for name, _ in self._past) | {self._preferred}

    def _age_s(self, now_s: float) -> float:
        return min(max(0.0, now_s - self._since_s), self._most_s) if self._preferred else 0.0

    def state(self) -> dict[str, Any]:
        """Plain data that ``restore`` takes."""
        return {
            "prior": self._prior,
            "past": [list(item) for item in self._past],
            "preferred": self._preferred,
            "since_s": self._since_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._prior = float(state["prior"])
        self._past = deque(
            ((str(name), float(duration_s)) for name, duration_s in state["past"]),
            maxlen=_REMEMBERED,
        )
        self._preferred = str(state["preferred"])
        self._since_s = float(state["since_s"])
