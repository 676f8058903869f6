"""The journal of a switch: one file, a JSON object a line, each on disk before it is acted on.

The first line holds both plans; then come the records of each wave's transaction, and the end. What
a file without an end says tells which plan holds when the server starts again.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from oserve.core import DeploymentPlan, OServeError
from oserve.switch.journal import restored
from oserve.switch.transaction import Phase

# Files kept; the oldest go first.
_MOST_FILES = 100


class Journal(Protocol):
    """Takes records; raises OSError where one cannot be kept."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class FileJournal:
    """A new file; it must not be there yet."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        _sync_folder(path.parent)

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns."""
        line = msgspec.json.encode(record) + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def close(self) -> None:
        """No more records."""
        with contextlib.suppress(OSError):
            os.close(self._file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """An unfinished switch: the plan that holds, and why it is that one."""

    id: str
    plan: DeploymentPlan
    reason: str


def journal_folder(state_dir: str) -> Path:
    """Where switches are recorded."""
    return Path(state_dir) / "switches"


def first_record(
    switch: str,
    at_s: float,
    before: DeploymentPlan,
    plans: tuple[DeploymentPlan, ...],
    plan_text: Callable[[DeploymentPlan], str],
) -> dict[str, Any]:
    """``plans``: in force after each wave; ``plan_text`` writes one as a plan file."""
    return {
        "kind": "switch",
        "id": switch,
        "at_s": at_s,
        "before": plan_text(before),
        "plans": [plan_text(plan) for plan in plans],
    }


def end_record(at_s: float, state: str, reason: str) -> dict[str, Any]:
    """The last line."""
    return {"kind": "end", "at_s": at_s, "state": state, "reason": reason}


def recover(
    folder: Path, at_s: float, read_plan: Callable[[str], DeploymentPlan]
) -> Recovered | None:
    """The switch that was under way when a server last ended, which is ended by this.

    Its engines are gone or will be looked at anew; what remains to be told is which plan holds: of
    the last wave whose commit was decided. A journal that cannot be read is set aside.
    """
    for path in reversed(journals(folder)):
        records = _records(path)
        if records and records[-1].get("kind") == "end":
            return None
        try:
            found = _recovered(records, read_plan)
        except (OServeError, KeyError, IndexError, TypeError):
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".unreadable"))
            continue
        line = msgspec.json.encode(end_record(at_s, "recovered", found.reason)) + b"\n"
        with contextlib.suppress(OSError), path.open("ab") as file:
            torn = path.stat().st_size and path.read_bytes()[-1:] != b"\n"
            file.write((b"\n" if torn else b"") + line)
        return found
    return None


def journals(folder: Path) -> list[Path]:
    """Of all switches, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def prune(folder: Path) -> None:
    """Let the oldest journals go."""
    for path in journals(folder)[:-_MOST_FILES]:
        with contextlib.suppress(OSError):
            path.unlink()


def _recovered(
    records: list[dict[str, Any]], read_plan: Callable[[str], DeploymentPlan]
) -> Recovered:
    head = records[0]
    if head.get("kind") != "switch":
        raise KeyError("switch")
    waves: dict[int, list[dict[str, Any]]] = {}
    for record in records[1:]:
        wave = int(record.pop("wave"))
        waves.setdefault(wave, []).append(record)
    plan, reason = head["before"], "the server ended before anything was decided"
    for wave in sorted(waves):
        state = restored(waves[wave])
        if state.phase in {Phase.COMMIT, Phase.DRAIN, Phase.DONE}:
            plan = head["plans"][wave]
            reason = f"the server ended after wave {wave} was committed"
        else:
            reason = f"the server ended in phase {state.phase} of wave {wave}"
    return Recovered(id=str(head["id"]), plan=read_plan(plan), reason=reason)


def _records(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that was torn off was never acted on."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n"):
            try:
                found.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.DecodeError:
                continue
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
