"""How long a deployment stays the preferred one: the time in which a switch must pay off.

Whenever another deployment becomes the preferred one, the duration d of the last is recorded. The
expected remaining time of a deployment of some age is

    mean of (d - age) over recorded d > age, with a prior of ``prior_s`` whose weight decays

over its own durations if there are enough, else over those of all deployments. A deployment that
has outlived all of them is expected to last as long again. ``lag_s``: how late a change is noticed;
the remaining time is shorter by that.
"""

from collections import deque
from typing import Any

# The weight of the prior decays by this factor with each change.
_FADING = 0.7
_REMEMBERED = 32
_FEW = 3


class Lifetime:
    """Records which deployment is preferred; all times in seconds."""

    def __init__(self, *, prior_s: float, most_s: float, lag_s: float = 0.0) -> None:
        self._prior_s = prior_s
        self._most_s = most_s
        self._lag_s = lag_s
        self._prior = 1.0
        self._past: deque[tuple[str, float]] = deque(maxlen=_REMEMBERED)
        self._preferred = ""
        self._since_s = 0.0

    def prefers(self, signature: str, now_s: float) -> None:
        """Record the best deployment now. A signature is any name that identifies a deployment."""
        if not self._preferred:
            self._preferred, self._since_s = signature, now_s
        elif signature != self._preferred:
            self._past.append((self._preferred, self._age_s(now_s)))
            self._prior *= _FADING
            self._preferred, self._since_s = signature, now_s

    def takes_over(self, signature: str) -> None:
        """Rename the preferred deployment: plans that are nearly equal count as one."""
        if self._preferred:
            self._preferred = signature

    @property
    def preferred(self) -> str:
        """The signature of the preferred deployment."""
        return self._preferred

    def expected_s(self, signature: str, now_s: float) -> float:
        """Seconds for which this deployment is expected to stay the best."""
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
        """Whether enough durations of this deployment are recorded to predict from them alone."""
        return sum(name == signature for name, _ in self._past) >= _FEW

    @property
    def known(self) -> frozenset[str]:
        """Signatures of deployments that are or were preferred."""
        return frozenset(name for name, _ in self._past) | {self._preferred}

    def _age_s(self, now_s: float) -> float:
        return min(max(0.0, now_s - self._since_s), self._most_s) if self._preferred else 0.0

    def state(self) -> dict[str, Any]:
        """State for ``restore``, as plain data."""
        return {
            "prior": self._prior,
            "past": [list(item) for item in self._past],
            "preferred": self._preferred,
            "since_s": self._since_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._prior = float(state["prior"])
        self._past = deque(
            ((str(name), float(duration_s)) for name, duration_s in state["past"]),
            maxlen=_REMEMBERED,
        )
        self._preferred = str(state["preferred"])
        self._since_s = float(state["since_s"])
