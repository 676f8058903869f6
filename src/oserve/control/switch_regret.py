"""The switch regret: what it has cost so far to keep the current plan, the rent in ski rental.

Each decision tells how many requests/s the best other plan would serve more. Near capacity these
numbers vary widely from one decision to the next; their sum varies less. While no other plan gains
more than the noise (``slack_rps``), the sum shrinks by that much, so that noise alone does not
accumulate.
"""

import math
from collections.abc import Mapping

import msgspec


class RegretState(msgspec.Struct, frozen=True, kw_only=True):
    """The regret as it is stored; ``judged_s`` is ``None`` before the first decision."""

    requests: float = 0.0
    judged_s: float | None = None
    better: bool = False


class SwitchRegret:
    """Requests that the best other plan would have served more, up to the last decision."""

    def __init__(self) -> None:
        self.requests = 0.0
        self._updated_s = -math.inf
        self._better = False

    def update(self, now_s: float, more_rps: float, *, slack_rps: float, began_s: float) -> None:
        """Add one decision; ``began_s``: when the traffic last changed, negative if never.

        It covers the time since the decision before, or since the change if that came later. It
        covers time before the change only where another plan was better before it, too.
        """
        better = more_rps > slack_rps
        changed = began_s >= 0 and began_s > self._updated_s
        since_s = self._updated_s
        if changed and not (better and self._better):
            self.requests, since_s = 0.0, began_s
        elif since_s == -math.inf:
            since_s = now_s
        added_rps = more_rps if better else more_rps - slack_rps
        self.requests = max(0.0, self.requests + added_rps * max(0.0, now_s - since_s))
        self._updated_s, self._better = now_s, better

    def skip(self, now_s: float) -> None:
        """Leave out the time up to now: its decision was not about the plan in force."""
        self._updated_s = now_s

    def reset(self, now_s: float) -> None:
        """Start again for a new plan."""
        self.requests, self._updated_s, self._better = 0.0, now_s, False

    def state(self) -> dict[str, object]:
        """Plain data for ``restore``."""
        updated_s = None if self._updated_s == -math.inf else self._updated_s
        state = RegretState(requests=self.requests, judged_s=updated_s, better=self._better)
        found: dict[str, object] = msgspec.to_builtins(state)
        return found

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue from what ``state`` returned. Raises ValueError if it is something else."""
        try:
            found = msgspec.convert(state, RegretState)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        self.requests = found.requests
        self._updated_s = -math.inf if found.judged_s is None else found.judged_s
        self._better = found.better
