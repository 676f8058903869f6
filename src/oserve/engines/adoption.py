"""What a server notes with the keeper of an engine, so that the next server can take it over."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from oserve import __version__
from oserve.core import Clock, Device, ReplicaShape, ReplicaSpec, VllmBackend
from oserve.engines.clock import LiveClock
from oserve.engines.group import boot_id
from oserve.engines.held_process import HeldProcess
from oserve.engines.registry import ProcessNote
from oserve.engines.settings import EngineSettings

# Settings of monitoring, which do not change the engine itself.
_MONITORING = {
    *("start_timeout_s", "health_interval_s", "health_timeout_s", "hang_after_s", "hang_steps"),
    *("stop_grace_s", "stable_s", "orphan_grace_s", "log_dir"),
}


class EngineNote(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's spec, and a ``stamp`` of everything else that it was started with.

    ``ready_s``: when it became ready, on the monotonic clock of the server's machine, whose
    ``boot_id`` is ``boot``; ``None`` before. ``standby``: it was started without weights.
    ``step_s``: seconds that a whole chunk took.
    """

    replica: str
    shape: ReplicaShape
    devices: tuple[str, ...]
    engine_args: tuple[str, ...]
    stamp: str
    standby: bool = False
    ready_s: float | None = None
    boot: str = ""
    max_model_len: int = 0
    step_s: float = 0.0

    @property
    def spec(self) -> ReplicaSpec:
        """The replica that the engine serves."""
        backend = VllmBackend(engine_args=self.engine_args)
        return ReplicaSpec(id=self.replica, shape=self.shape, devices=self.devices, backend=backend)

    def since_s(self, now_s: float) -> float:
        """When it became ready, on this machine's clock; ``now_s`` if another one's told it."""
        known = self.ready_s is not None and self.boot in {"", boot_id()}
        return self.ready_s if known and self.ready_s is not None else now_s


def note_of(spec: ReplicaSpec, stamp: str, *, standby: bool = False) -> EngineNote:
    """The note of an engine that is about to start."""
    backend = spec.backend
    return EngineNote(
        replica=spec.id,
        shape=spec.shape,
        devices=spec.devices,
        engine_args=backend.engine_args if isinstance(backend, VllmBackend) else (),
        stamp=stamp,
        standby=standby,
    )


def read_note(note: ProcessNote) -> EngineNote | None:
    """The note of an engine that was found; ``None`` if this version cannot read it."""
    try:
        return msgspec.convert(note, EngineNote)
    except msgspec.ValidationError:
        return None


def stamp_of(
    model: str, served_model_name: str, settings: EngineSettings, devices: Sequence[Device]
) -> str:
    """A digest of an engine's model (of a folder's files too), settings and devices."""
    given = {
        name: value
        for name, value in msgspec.to_builtins(settings).items()
        if name not in _MONITORING
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
    """Engines by replica, and those that cannot be assigned: without a readable note, or doubled.

    Of two engines of one replica, one that was not told to end is kept.
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


async def end(process: HeldProcess, *, grace_s: float, clock: Clock | None = None) -> None:
    """Send TERM, after ``grace_s`` seconds KILL; returns when the process is gone.

    Raises ``NodeLostError`` if its node is lost meanwhile.
    """
    process.terminate()
    ended = asyncio.ensure_future(process.wait())
    passed = asyncio.ensure_future((clock or LiveClock()).sleep(grace_s))
    try:
        await asyncio.wait({ended, passed}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.kill()
        await ended
    finally:
        passed.cancel()
        ended.cancel()


def highest_number(names: Sequence[str]) -> int:
    """The highest number at the end of the names of held engines; 0 without any.

    Folders go by these names: a new engine must not find the folder of another.
    """
    digits = [name.rpartition("-")[2] for name in names]
    return max((int(word) for word in digits if word.isdigit()), default=0)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the files in a model's folder."""
    if not folder.is_dir():
        return []
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
