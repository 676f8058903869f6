"""What ends when a part of a replica over several nodes ends; see ``core.parts``.

No part notices when another has died: requests would wait for ever. Everything here is pure;
``parts_process`` acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oserve.control.progress import Activity
from oserve.core import ReplicaPart
from oserve.engines.exit_status import ending


def joint_activity(activities: Sequence[Activity | None]) -> Activity | None:
    """The activity of all parts together; ``None`` if that of one is unknown."""
    known = [one for one in activities if one is not None]
    if not known or len(known) < len(activities):
        return None
    return Activity(
        stopped=sum(one.stopped for one in known),
        blocked=any(one.blocked for one in known),
        work_s=sum(one.work_s for one in known),
        moved=sum(one.moved for one in known),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPart:
    """An order: end a part, by KILL or by TERM."""

    index: int
    kill: bool


class TiedParts:
    """Decides what ends when a part ends or cannot be reached. Feed it what happens.

    The first part to go decides ``status`` and ``reason``. The others are of no use without it and
    are killed at once: vLLM's workers take seconds to end on TERM, in which devices stay taken. A
    part that cannot be reached is not waited for: its node is lost, with its devices.
    """

    def __init__(self, parts: Sequence[ReplicaPart]) -> None:
        self._parts = tuple(parts)
        self._running = {part.index for part in parts}
        self._killed: set[int] = set()
        self._asked = False
        self.status: int | None = None
        self.reason = ""

    @property
    def is_over(self) -> bool:
        """Whether no part is left that could still be waited for."""
        return not self._running

    def asked(self, *, kill: bool) -> tuple[EndPart, ...]:
        """The whole replica is told to end."""
        self._asked = True
        return tuple(EndPart(index=index, kill=kill) for index in sorted(self._running))

    def ended(self, index: int, status: int, cause: str = "") -> tuple[EndPart, ...]:
        """A part has ended. ``cause``: what its log names."""
        if index not in self._running:
            return ()
        how = ending(status)
        return self._gone(index, status, f"{how}: {cause}" if cause else how, reachable=True)

    def silent(self, index: int, why: str, status: int) -> tuple[EndPart, ...]:
        """A part cannot be reached any more; ``status`` stands for its own, which is unknown."""
        if index not in self._running:
            return ()
        return self._gone(index, status, why, reachable=False)

    def _gone(self, index: int, status: int, how: str, *, reachable: bool) -> tuple[EndPart, ...]:
        self._running.discard(index)
        if self.status is None:
            self.status = status
            if not self._asked:
                self.reason = f"{self._parts[index]} {how}"
        # One out of reach is told as well, in case it can be reached after all.
        others = self._running - self._killed if reachable else {*self._running, index}
        self._killed |= others
        return tuple(EndPart(index=other, kill=True) for other in sorted(others))
