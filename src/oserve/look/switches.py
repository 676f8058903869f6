"""Switches as the page shows them: what was expected of each, what it did, and what it brought.

A report of a switch is forgotten when a server ends, and its decision when others follow. So what
is known of the last switches is kept here, and saved. Pure.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from oserve.look.sections import MOST_SWITCHES, PageSwitch

FIRST_JUDGED_S = 60.0
JUDGED_S = 300.0
"""A switch is judged by the requests until so long after its end, and a first time earlier."""

RUNNING_S = 15.0
"""Requests that arrived later than this may not have ended yet."""


class SwitchOutcomeSeen(msgspec.Struct, frozen=True, kw_only=True):
    """What records tell of a switch that ended. Gains are in requests within their limits.

    ``requests`` ran while it went on, ``moves`` of their streams went to another replica, and
    ``lost`` ended by a fault. ``realised_gain``: what was ``kept`` of the requests that arrived in
    ``judged_s`` seconds since it began, less what the old plan would have kept of them by the
    simulator (``without``). ``with_it``: the same for the new plan, which tells how far the
    simulator is to be believed.
    """

    requests: int
    moves: int
    lost: int
    kept: int | None = None
    without: int | None = None
    with_it: int | None = None
    judged_s: float | None = None

    @property
    def realised_gain(self) -> int | None:
        """``None``: not judged yet, or it cannot be."""
        return None if self.kept is None or self.without is None else self.kept - self.without


class SeenSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """A switch, and what is known of it once it has ended."""

    switch: PageSwitch
    outcome: SwitchOutcomeSeen | None = None

    def document(self) -> dict[str, Any]:
        """JSON values for the page."""
        outcome = self.outcome
        return {
            **msgspec.to_builtins(self.switch),
            "outcome": None if outcome is None else msgspec.to_builtins(outcome),
            "realised_gain": None if outcome is None else outcome.realised_gain,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedSwitch:
    """A switch whose outcome is asked for, with the times between which it ran."""

    id: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementDue:
    """A switch to a plan that is to be judged by the requests between two Unix times."""

    id: str
    plan: str
    start_s: float
    end_s: float


class SwitchLog:
    """The last switches, oldest first, at most ``MOST_SWITCHES``."""

    def __init__(self, saved: Iterable[SeenSwitch] = ()) -> None:
        self._seen: dict[str, SeenSwitch] = {item.switch.id: item for item in saved}

    def observe(self, switches: Iterable[PageSwitch]) -> list[SeenSwitch]:
        """Enter what is reported now; what was expected of a switch stays."""
        for item in switches:
            old = self._seen.get(item.id)
            self._seen[item.id] = SeenSwitch(switch=item) if old is None else _renewed(old, item)
        while len(self._seen) > MOST_SWITCHES:
            del self._seen[next(iter(self._seen))]
        return list(self._seen.values())

    def unknown(self) -> Sequence[EndedSwitch]:
        """Those that have ended, and nobody has looked at their records."""
        return [
            EndedSwitch(id=name, began_s=item.switch.began_s, ended_s=item.switch.ended_s)
            for name, item in self._seen.items()
            if item.switch.ended_s is not None and item.outcome is None
        ]

    def to_judge(self, now_s: float) -> JudgementDue | None:
        """The next switch to judge: soon after it ended, and once more with more requests.

        Those that arrive after the next switch has begun say nothing of this one.
        """
        found = list(self._seen.values())
        for place, item in enumerate(found):
            switch, outcome = item.switch, item.outcome
            if outcome is None or switch.ended_s is None or switch.state != "done":
                continue
            begins = [later.switch.began_s for later in found[place + 1 :]]
            last_s = min([switch.ended_s + JUDGED_S, *begins])
            first_s = min(switch.ended_s + FIRST_JUDGED_S, last_s)
            end_s = last_s if now_s >= last_s + RUNNING_S else now_s - RUNNING_S
            judged_s = switch.began_s + (outcome.judged_s or 0.0)
            due_s = first_s if outcome.judged_s is None else last_s
            if end_s >= due_s and end_s > judged_s + 1.0:
                return JudgementDue(
                    id=switch.id, plan=switch.plan, start_s=switch.began_s, end_s=end_s
                )
        return None

    def judged(
        self, due: JudgementDue, kept: int | None, without: int | None, with_it: int | None
    ) -> None:
        """Enter a judgement; ``None``: it was not possible."""
        item = self._seen.get(due.id)
        if item is None or item.outcome is None:
            return
        outcome = msgspec.structs.replace(
            item.outcome,
            kept=kept,
            without=without,
            with_it=with_it,
            judged_s=round(due.end_s - due.start_s, 1),
        )
        self._seen[due.id] = msgspec.structs.replace(item, outcome=outcome)

    def learn(self, outcomes: Mapping[str, SwitchOutcomeSeen]) -> None:
        """Enter what records told."""
        for name, outcome in outcomes.items():
            if name in self._seen:
                self._seen[name] = msgspec.structs.replace(self._seen[name], outcome=outcome)

    def document(self) -> list[Any]:
        """JSON values, for the saved state."""
        return list(msgspec.to_builtins(list(self._seen.values())))


def _renewed(old: SeenSwitch, switch: PageSwitch) -> SeenSwitch:
    if switch.expected_gain is None:
        switch = msgspec.structs.replace(
            switch,
            expected_gain=old.switch.expected_gain,
            expected_cost=old.switch.expected_cost,
            lasts_s=old.switch.lasts_s,
        )
    return msgspec.structs.replace(old, switch=switch)
