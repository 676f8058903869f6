"""The keeper's registry on disk: each change replaces the whole file.

While the keeper lives, its memory counts. The file lets the next keeper end what one that was
killed has left on devices, and people see what runs. ``note`` is the server's; the keeper stores it
without reading it.
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

ProcessNote = dict[str, Any] | str | None
"""What a server stores with a process, as plain JSON: see ``adoption.EngineNote``."""


class RegistryEntry(msgspec.Struct, kw_only=True):
    """An engine, or another process. ``pid`` is 0 until it has started.

    ``started_ticks``: see ``group.start_ticks``. ``folder``: its temporary folder.
    ``ending``: it was told to end. ``stays``: see ``keeper_messages.ProcessStart``.
    """

    name: str
    engine: bool
    log: str
    pid: int = 0
    started_ticks: int = 0
    folder: str = ""
    ending: bool = False
    stays: bool = False
    note: ProcessNote = None


class Registry(msgspec.Struct, kw_only=True):
    """All processes that one keeper holds. ``boot``: see ``group.boot_id``."""

    boot: str
    pid: int
    held: list[RegistryEntry]


_REGISTRY_DECODER = msgspec.json.Decoder(Registry)


def write_registry(path: Path, held: list[RegistryEntry]) -> None:
    """Replace the file in one step. If the disk is full the file stays as it was."""
    registry = Registry(boot=boot_id(), pid=os.getpid(), held=held)
    fresh = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(registry))
        fresh.replace(path)


def read_registry(path: Path) -> Registry | None:
    """The last state written; ``None`` if there is no readable file."""
    try:
        return _REGISTRY_DECODER.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def end_leftovers(path: Path) -> list[str]:
    """End the engines that a killed keeper has left; returns their names. Blocks for seconds.

    It touches only processes that are surely the keeper's: one that started when the file says, or
    members of such a leader's group that have the engine's folder in their environment.
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
    """Whether helper processes of an engine outlived its leader."""
    if not entry.folder or start_ticks(entry.pid):
        return False
    variable = b"TMPDIR=" + entry.folder.encode()
    for pid in group_members(entry.pid):
        with contextlib.suppress(OSError):
            if variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return True
    return False
