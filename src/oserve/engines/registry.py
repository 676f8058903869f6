"""What a keeper holds, on disk and on its line: the file is replaced whole with each change.

While the keeper lives, its word counts; the file is for whoever comes after it was killed, to end
what may be left on devices, and for people. It does not know replicas: ``note`` is the server's.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from oserve.engines.group import (
    boot_id,
    end_group,
    group_members,
    release_leftovers,
    start_ticks,
)

_GRACE_S = 2.0


class RegistryEntry(msgspec.Struct, kw_only=True):
    """One engine, or one other process. ``pid`` is 0 until it is there.

    ``started_ticks``: see ``group.start_ticks``. ``folder``: its temporary folder.
    ``ending``: it was told to end.
    """

    name: str
    engine: bool
    log: str
    pid: int = 0
    started_ticks: int = 0
    folder: str = ""
    ending: bool = False
    note: Any = None


class Registry(msgspec.Struct, kw_only=True):
    """All that one keeper holds."""

    boot: str
    pid: int
    held: list[RegistryEntry]


class Start(msgspec.Struct, kw_only=True, tag=True):
    """Start an engine; see ``spawner.Launcher``."""

    name: str
    argv: list[str]
    env: dict[str, str]
    cores: list[int]
    log: str
    note: Any = None


class Hold(msgspec.Struct, kw_only=True, tag=True):
    """Start another process and write ``orders`` to its standard input, which stays open.

    At the end it gets ``grace_s`` between TERM and KILL.
    """

    name: str
    argv: list[str]
    orders: str
    log: str
    grace_s: float
    note: Any = None


class Mark(msgspec.Struct, kw_only=True, tag=True):
    """Replace a note."""

    name: str
    note: Any


class Signal(msgspec.Struct, kw_only=True, tag=True):
    """Send a signal to every process of what has that name."""

    name: str
    number: int


class Greet(msgspec.Struct, kw_only=True, tag=True):
    """A server's first word: for how long all is to be held once it is gone."""

    grace_s: float


class Close(msgspec.Struct, kw_only=True, tag=True):
    """End everything, at once, then the keeper."""


class Hello(msgspec.Struct, kw_only=True, tag=True):
    """The keeper's first word."""

    identity: str
    pid: int
    held: list[RegistryEntry]


class Started(msgspec.Struct, kw_only=True, tag=True):
    """It runs."""

    name: str
    pid: int


class Refused(msgspec.Struct, kw_only=True, tag=True):
    """It could not be started."""

    name: str
    reason: str


class Ended(msgspec.Struct, kw_only=True, tag=True):
    """Nothing of it is left; a negative status is a signal."""

    name: str
    status: int


Ask = Start | Hold | Mark | Signal | Greet | Close
Tell = Hello | Started | Refused | Ended
# A gateway process' orders hold what it is to know of earlier requests.
MAX_LINE_BYTES = 64 * 1024 * 1024


def write_registry(path: Path, held: list[RegistryEntry]) -> None:
    """Replace the file in one step. A full disk must not end serving: then it stays as it was."""
    registry = Registry(boot=boot_id(), pid=os.getpid(), held=held)
    fresh = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(registry))
        fresh.replace(path)


def read_registry(path: Path) -> Registry | None:
    """What was written last; ``None`` where there is nothing that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Registry)
    except (OSError, msgspec.DecodeError):
        return None


def end_leftovers(path: Path) -> list[str]:
    """End what a keeper that was killed has left; returns names. Blocks for seconds at most.

    Only what is surely its own is touched: a process that started when the file says, or one of a
    leader's group that has the engine's folder in its environment.
    """
    registry = read_registry(path)
    if registry is None or registry.boot != boot_id():
        return []
    ended = []
    for entry in registry.held:
        if entry.pid <= 0:
            continue
        leads = start_ticks(entry.pid) == entry.started_ticks != 0
        if not entry.engine:
            if leads:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(entry.pid, signal.SIGTERM)
            continue
        if leads or _has_members(entry):
            end_group(entry.pid, grace_s=_GRACE_S)
            ended.append(entry.name)
        if not group_members(entry.pid):
            release_leftovers(entry.pid, entry.folder)
    return ended


def _has_members(entry: RegistryEntry) -> bool:
    """Whether helpers of an engine outlived its leader."""
    if not entry.folder or start_ticks(entry.pid):
        return False
    mark = b"TMPDIR=" + entry.folder.encode()
    for pid in group_members(entry.pid):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
    return False
