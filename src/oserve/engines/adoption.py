"""What a server notes of an engine, so that the next can tell whether to go on with it."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from oserve import __version__
from oserve.core import Device, ReplicaShape, ReplicaSpec, VllmBackend
from oserve.engines.keeper_connection import HeldProcess
from oserve.engines.settings import EngineSettings

# Settings of whoever looks after an engine: the engine is the same whatever they are.
_ABOUT_WATCHING = {
    *("start_timeout_s", "health_interval_s", "health_timeout_s", "hang_after_s", "hang_steps"),
    *("stop_grace_s", "stable_s", "orphan_grace_s", "log_dir"),
}


class EngineNote(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's spec, and ``stamp`` of all else that it was started with.

    ``ready_s``: when it became ready, on the machine's monotonic clock; ``None`` before.
    ``standby``: it was started without weights of its own. ``step_s``: what a whole chunk took it.
    """

    replica: str
    shape: ReplicaShape
    devices: tuple[str, ...]
    engine_args: tuple[str, ...]
    stamp: str
    standby: bool = False
    ready_s: float | None = None
    max_model_len: int = 0
    step_s: float = 0.0

    @property
    def spec(self) -> ReplicaSpec:
        """The replica that it is an incarnation of."""
        backend = VllmBackend(engine_args=self.engine_args)
        return ReplicaSpec(id=self.replica, shape=self.shape, devices=self.devices, backend=backend)


def note_of(spec: ReplicaSpec, stamp: str, *, standby: bool = False) -> EngineNote:
    """The note of an engine that is about to start."""
    assert isinstance(spec.backend, VllmBackend)
    return EngineNote(
        replica=spec.id,
        shape=spec.shape,
        devices=spec.devices,
        engine_args=spec.backend.engine_args,
        stamp=stamp,
        standby=standby,
    )


def read_note(note: Any) -> EngineNote | None:
    """The note of an engine that was found; ``None`` where it cannot be read."""
    try:
        return msgspec.convert(note, EngineNote)
    except msgspec.ValidationError:
        return None


def stamp_of(
    model: str, served_model_name: str, settings: EngineSettings, devices: Sequence[Device]
) -> str:
    """Of the model (a folder's files too), the settings and the devices of one engine."""
    given = {
        name: value
        for name, value in msgspec.to_builtins(settings).items()
        if name not in _ABOUT_WATCHING
    }
    facts = (
        *(__version__, model, served_model_name, given),
        [_files(Path(name)) for name in (model, *settings.variants.values())],
        [(device.id, device.kind, device.cores) for device in devices],
    )
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


def sorted_out(
    found: Mapping[str, HeldProcess],
) -> tuple[dict[str, tuple[EngineNote, HeldProcess]], list[HeldProcess]]:
    """Engines by the replica that they are, and those that nobody can tell or that there are twice.

    Of two, one that was not told to end comes first.
    """
    known: dict[str, tuple[EngineNote, HeldProcess]] = {}
    strange = []
    for process in sorted(found.values(), key=lambda item: item.entry.ending):
        note = read_note(process.entry.note)
        if note is None or note.replica in known:
            strange.append(process)
        else:
            known[note.replica] = (note, process)
    return known, strange


async def end(process: HeldProcess, *, grace_s: float) -> None:
    """TERM, ``grace_s`` seconds, KILL; returns when it is gone."""
    process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def highest_number(names: Sequence[str]) -> int:
    """The highest last part of names under which engines are held, 0 without any."""
    digits = [name.rpartition("-")[2] for name in names]
    return max((int(word) for word in digits if word.isdigit()), default=0)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of what is in a model's folder."""
    if not folder.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
