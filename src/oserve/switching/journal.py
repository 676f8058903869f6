"""Journal files: one per switch, one JSON object per line, each synced before it takes effect.

A file without an end record determines the plan of the next server.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from oserve.core import DeploymentPlan, OServeError
from oserve.switch.journal import (
    EndLine,
    JournalLine,
    SwitchLine,
    TransactionLine,
    decode_line,
    encode_line,
    restored,
)
from oserve.switch.transaction import TransactionPhase

# The number of files kept; the oldest are deleted first.
_MOST_FILES = 100


class Journal(Protocol):
    """Appends lines; raises OSError if a write fails."""

    def write(self, line: JournalLine) -> None: ...

    def close(self) -> None: ...


class FileJournal:
    """A new journal file, which must not exist yet."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        _sync_folder(path.parent)

    def write(self, line: JournalLine) -> None:
        """Write a line and sync it to disk."""
        data = encode_line(line) + b"\n"
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            os.close(self._file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """An unfinished switch: the plan in force, and the reason."""

    id: str
    plan: DeploymentPlan
    reason: str


def journal_folder(state_dir: str) -> Path:
    """Return the folder of journals."""
    return Path(state_dir) / "switches"


def recover(
    folder: Path, at_s: float, read_plan: Callable[[str], DeploymentPlan]
) -> Recovered | None:
    """Return the switch that was running when the last server ended, and close its journal.

    Its engines have stopped, or are observed again. The plan in force is that of the last wave with
    a decided commit. An unreadable journal is renamed. ``read_plan`` parses a plan file.
    """
    for path in reversed(journals(folder)):
        try:
            lines = _lines(path)
            if lines and isinstance(lines[-1], EndLine):
                return None
            found = _recovered(lines, read_plan)
        except OServeError:
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".unreadable"))
            continue
        end = EndLine(at_s=at_s, state="recovered", reason=found.reason)
        with contextlib.suppress(OSError), path.open("ab") as file:
            torn = path.stat().st_size and path.read_bytes()[-1:] != b"\n"
            file.write((b"\n" if torn else b"") + encode_line(end) + b"\n")
        return found
    return None


def journals(folder: Path) -> list[Path]:
    """The journal files of all switches, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def prune(folder: Path) -> None:
    """Delete the oldest journals."""
    for path in journals(folder)[:-_MOST_FILES]:
        with contextlib.suppress(OSError):
            path.unlink()


def _recovered(lines: list[JournalLine], read_plan: Callable[[str], DeploymentPlan]) -> Recovered:
    """Raises OServeError for invalid lines."""
    head = lines[0] if lines else None
    if not isinstance(head, SwitchLine):
        raise _torn("its first line holds no plans")
    waves: dict[int, list[TransactionLine]] = {}
    for line in lines[1:]:
        if isinstance(line, SwitchLine | EndLine):
            raise _torn("it has lines after its end")
        waves.setdefault(line.wave, []).append(line)
    plan, reason = head.before, "the server ended before anything was decided"
    for wave in sorted(waves):
        if not 0 <= wave < len(head.plans):
            raise _torn(f"wave {wave} has no plan")
        state = restored(waves[wave])
        if state.phase in {TransactionPhase.COMMIT, TransactionPhase.DRAIN, TransactionPhase.DONE}:
            plan = head.plans[wave]
            reason = f"the server ended after wave {wave} was committed"
        else:
            reason = f"the server ended in phase {state.phase} of wave {wave}"
    return Recovered(id=head.id, plan=read_plan(plan), reason=reason)


def _lines(path: Path) -> list[JournalLine]:
    """Return all complete lines; the driver never acted on an incomplete last line."""
    found = []
    with contextlib.suppress(OSError):
        for data in path.read_bytes().split(b"\n"):
            line = decode_line(data)
            if line is not None:
                found.append(line)
    return found


def _torn(reason: str) -> OServeError:
    return OServeError(
        f"the journal of a switch is unreadable: {reason}",
        place="journal",
        remedy="move the file away; the server then keeps the plan of its settings",
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
