"""What it has cost so far to stay with the present plan: the rent, in the terms of ski rental.

Each judgement says how many requests/s the best other plan would serve more. Near capacity
judgements differ widely from one to the next, and their sum does not. While no other plan is better
by more than what counts as nothing (``slack_rps``), that much is taken off again, so that noise
alone does not add up.
"""

import math
from collections.abc import Mapping
from typing import Any


class Regret:
    """Requests that the best other plan would have served more, up to the last judgement."""

    def __init__(self) -> None:
        self.requests = 0.0
        self._judged_s = -math.inf
        self._better = False

    def judged(self, now_s: float, more_rps: float, *, slack_rps: float, began_s: float) -> None:
        """A judgement; ``began_s``: when the traffic last changed, negative if it did not.

        It holds since the one before, or since the change if that came later; for longer only where
        another plan was the better one before the change as well.
        """
        better = more_rps > slack_rps
        changed = began_s >= 0 and began_s > self._judged_s
        since_s = self._judged_s
        if changed and not (better and self._better):
            self.requests, since_s = 0.0, began_s
        elif since_s == -math.inf:
            since_s = now_s
        added_rps = more_rps if better else more_rps - slack_rps
        self.requests = max(0.0, self.requests + added_rps * max(0.0, now_s - since_s))
        self._judged_s, self._better = now_s, better

    def skip(self, now_s: float) -> None:
        """What was judged says nothing of the plan that is in force."""
        self._judged_s = now_s

    def reset(self, now_s: float) -> None:
        """Another plan is in force from now on."""
        self.requests, self._judged_s, self._better = 0.0, now_s, False

    def state(self) -> dict[str, Any]:
        """Plain data that ``restore`` takes."""
        judged_s = None if self._judged_s == -math.inf else self._judged_s
        return {"requests": self.requests, "judged_s": judged_s, "better": self._better}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        judged_s = state["judged_s"]
        self.requests = float(state["requests"])
        self._judged_s = -math.inf if judged_s is None else float(judged_s)
        self._better = bool(state["better"])
