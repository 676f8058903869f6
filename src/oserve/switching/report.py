"""The report of a switch, for operators and for the next prediction."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from oserve.switch.transaction import TransactionPhase


class SwitchMethod(StrEnum):
    """The method of a switch: weights move between replicas, or replicas restart."""

    TRANSFER = "transfer"
    RESTART = "restart"


class SwitchStatus(StrEnum):
    """The states of a switch."""

    WAITING = "waiting"
    RUNNING = "running"
    ROLLING_OUT = "rolling_out"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEntry:
    """The entry of a wave into a phase, at Unix seconds."""

    wave: int
    phase: TransactionPhase
    at_s: float


@dataclass(kw_only=True)
class SwitchReport:
    """The progress of a switch; times are Unix seconds. ``programme``: see ``switch.preview``."""

    id: str
    plan: str
    by: str
    began_s: float
    method: SwitchMethod = SwitchMethod.TRANSFER
    state: SwitchStatus = SwitchStatus.WAITING
    reason: str = ""
    wave: int = 0
    waves: int = 0
    phase: TransactionPhase | None = None
    moved_bytes: int = 0
    total_bytes: int = 0
    ended_s: float | None = None
    phases: list[PhaseEntry] = field(default_factory=list)
    programme: Mapping[str, Any] = field(default_factory=dict)

    def entered(self, wave: int, phase: TransactionPhase, at_s: float) -> None:
        """Record that a wave enters a phase."""
        self.phase = phase
        self.phases.append(PhaseEntry(wave=wave, phase=phase, at_s=at_s))

    def ended(self, state: SwitchStatus, reason: str, at_s: float) -> None:
        """Record that the switch ends in this state."""
        self.state, self.reason, self.ended_s = state, reason, at_s

    def durations_s(self, wave: int) -> dict[str, float]:
        """Return the seconds that a wave spent in each phase, up to the end of the switch."""
        found = {
            entry.phase.value: following.at_s - entry.at_s
            for entry, following in pairwise(self.phases)
            if entry.wave == wave
        }
        if self.phases and self.phases[-1].wave == wave and self.ended_s is not None:
            found[self.phases[-1].phase.value] = self.ended_s - self.phases[-1].at_s
        return found

    def document(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "id": self.id,
            "plan_id": self.plan,
            "by": self.by,
            "method": self.method.value,
            "state": self.state.value,
            "reason": self.reason,
            "phase": "" if self.phase is None else self.phase.value,
            "wave": self.wave,
            "waves": self.waves,
            "moved_bytes": self.moved_bytes,
            "total_bytes": self.total_bytes,
            "began_s": self.began_s,
            "ended_s": self.ended_s,
            "phases": [
                {"wave": entry.wave, "phase": entry.phase.value, "at_s": entry.at_s}
                for entry in self.phases
            ],
            "programme": self.programme,
        }


class SwitchTally:
    """Counts switches by how they ended, and the bytes that they moved, for metrics."""

    def __init__(self) -> None:
        # All from 0 on: a counter that begins at 1 shows no increase.
        self._ended = dict.fromkeys(_ENDS, 0)
        self._moved_bytes = 0
        self._counted: frozenset[str] = frozenset()

    def observe(self, documents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
        """Counters, as ``gateway.metrics`` has them, after a look at the reports that are kept."""
        ended = [item for item in documents if item["state"] in _ENDS]
        for item in ended:
            if item["id"] not in self._counted:
                self._ended[item["state"]] += 1
                self._moved_bytes += item["moved_bytes"]
        self._counted = frozenset(item["id"] for item in ended)
        return {
            "oserve_switches": {state: [float(count)] for state, count in self._ended.items()},
            "oserve_switch_moved_bytes": {"": [float(self._moved_bytes)]},
        }


_ENDS = tuple(
    state.value
    for state in (
        SwitchStatus.DONE,
        SwitchStatus.ROLLED_BACK,
        SwitchStatus.SUPERSEDED,
        SwitchStatus.FAILED,
    )
)
