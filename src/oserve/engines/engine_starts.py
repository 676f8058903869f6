"""Starts engines: their command lines, folders and environment, by a launcher or a keeper."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oserve.core import Device, Endpoint, ReplicaSpec, ReplicaState
from oserve.engines.adoption import note_of, read_note, stamp_of
from oserve.engines.arguments import (
    Platform,
    engine_arguments,
    engine_cores,
    engine_environment,
    runs_eagerly,
)
from oserve.engines.group import CACHES_FOLDER
from oserve.engines.holding import HeldEngines
from oserve.engines.keeper_connection import HeldProcess
from oserve.engines.logs import open_log
from oserve.engines.memory_check import cache_sized, unsized
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess, Launcher, launcher_for

# Socket paths must stay under 108 bytes, and vLLM's own are 37 longer than their folder.
_MAX_FOLDER_BYTES = 68
_MAX_NAME_BYTES = 24
_LONGEST_NAME = "x" * _MAX_NAME_BYTES + "-999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFacts:
    """What all engines of a cluster have in common.

    ``model`` is a folder or a hub name; ``served_model_name`` the name in requests. ``sized``: the
    KV cache size in ``settings`` was computed, so that engines of another size may be taken over.
    """

    model: str
    served_model_name: str
    settings: EngineSettings
    platform: Platform
    sized: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFiles:
    """The folder of one engine, its log, and the endpoint in the folder."""

    folder: Path
    log_path: Path
    endpoint: Endpoint


class EngineStarter:
    """Starts engines in ``run_dir``. With a ``keeper`` they outlive this process for a while.

    ``held``: what the keeper holds for each replica, by id.
    """

    def __init__(
        self,
        facts: LaunchFacts,
        run_dir: Path,
        keeper: HeldEngines | None,
        launcher: Launcher | None,
    ) -> None:
        self._facts = facts
        self._keeper = keeper
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log_dir = Path(facts.settings.log_dir or run_dir / "logs").resolve()
        self._sockets = _socket_folder(run_dir.resolve(), keep=keeper is not None)
        self._launcher = launcher or _launcher_of(facts, self._log_dir)
        self._moves_caches = facts.settings.move_caches and facts.platform == "cpu"
        self.held: dict[str, HeldProcess] = {}

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        """The files of a new engine; ``number`` tells its folder from earlier ones."""
        name = re.sub(r"[^A-Za-z0-9_-]", "_", spec.id)[:_MAX_NAME_BYTES]
        folder = self._sockets / f"{name}-{number}"
        log_path = open_log(self._log_dir, name)
        return EngineFiles(folder=folder, log_path=log_path, endpoint=self._endpoint(folder))

    def held_files(self, process: HeldProcess) -> EngineFiles:
        """The files of an engine that an earlier server has started."""
        folder = Path(process.entry.folder)
        return EngineFiles(
            folder=folder, log_path=Path(process.entry.log), endpoint=self._endpoint(folder)
        )

    def _endpoint(self, folder: Path) -> Endpoint:
        caches = str(folder.parent / CACHES_FOLDER) if self._moves_caches else ""
        return Endpoint(unix_socket=str(folder / "api.sock"), caches=caches)

    def stamp(self, devices: Sequence[Device]) -> str:
        """See ``adoption.stamp_of``."""
        facts = self._facts
        settings = unsized(facts.settings) if facts.sized else facts.settings
        return stamp_of(facts.model, facts.served_model_name, settings, devices)

    async def start(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> EngineProcess:
        """Start an engine. Raises ``OServeError`` or ``OSError`` if it cannot be started."""
        arguments, environment = self._command(spec, devices, files.folder, standby=standby)
        cores = engine_cores(devices)
        if self._keeper is None:
            return await self._launcher.start(arguments, environment, cores, files.log_path)
        note = note_of(spec, self.stamp(devices), standby=standby)
        held = self.held[spec.id] = await self._keeper.launch(
            files.folder.name,
            arguments,
            environment,
            cores,
            files.log_path,
            msgspec.to_builtins(note),
        )
        return held

    def _command(
        self, spec: ReplicaSpec, devices: Sequence[Device], folder: Path, *, standby: bool
    ) -> tuple[list[str], dict[str, str]]:
        facts = self._facts
        arguments = engine_arguments(
            spec,
            model=facts.model,
            served_model_name=facts.served_model_name,
            unix_socket=str(folder / "api.sock"),
            platform=facts.platform,
            settings=cache_sized(facts.settings, facts.model, devices, spec.shape),
            standby=standby,
            moves_caches=self._moves_caches,
        )
        environment = engine_environment(
            devices,
            platform=facts.platform,
            local_model=Path(facts.model).is_dir(),
            eager=runs_eagerly(arguments),
            folder=str(folder),
            keep_weights=facts.settings.keep_weights,
            caches=str(folder.parent / CACHES_FOLDER) if self._moves_caches else "",
        )
        # A zygote, or a keeper, that ended has removed it.
        self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        (self._sockets / CACHES_FOLDER).mkdir(mode=0o700, exist_ok=True)
        return arguments, environment

    def note_ready(self, state: ReplicaState, step_s: float) -> None:
        """Note with the keeper that a replica serves, so that the next server knows it."""
        process = self.held.get(state.spec.id)
        note = read_note(process.entry.note) if process is not None else None
        if process is not None and note is not None and note.ready_s != state.since_s:
            fresh = msgspec.structs.replace(
                note, ready_s=state.since_s, max_model_len=state.max_model_len, step_s=step_s
            )
            process.mark(msgspec.to_builtins(fresh))

    def clear(self, state: ReplicaState) -> None:
        """Remove the folder of an engine that has ended."""
        self.held.pop(state.spec.id, None)
        if state.endpoint.unix_socket:
            shutil.rmtree(Path(state.endpoint.unix_socket).parent, ignore_errors=True)

    async def close(self) -> None:
        """End every engine and what starts them; remove the sockets."""
        await (self._keeper or self._launcher).close()
        shutil.rmtree(self._sockets, ignore_errors=True)


def _launcher_of(facts: LaunchFacts, log_dir: Path) -> Launcher:
    method = facts.settings.method(on_cpu=facts.platform == "cpu")
    return launcher_for(method, log_dir / "zygote.log")


def _socket_folder(run_dir: Path, *, keep: bool) -> Path:
    """A folder for sockets, short enough; ``keep``: what is in it belongs to running engines."""
    inside = run_dir / "sockets"
    if _is_short(inside):
        if not keep:
            # A run that was killed has left it.
            shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(mode=0o700, exist_ok=True)
        return inside
    made = Path(tempfile.mkdtemp(prefix="oserve-"))
    if _is_short(made):
        return made
    made.rmdir()
    return Path(tempfile.mkdtemp(prefix="oserve-", dir="/tmp"))


def _is_short(folder: Path) -> bool:
    return len(str(folder / _LONGEST_NAME).encode()) <= _MAX_FOLDER_BYTES
