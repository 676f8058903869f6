"""The engines of one node: how they start there, and where their files and endpoints are."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from oserve.control.progress import Activity
from oserve.core import Device, Endpoint, ReplicaSpec, ReplicaState
from oserve.engines.adoption import note_of, read_note
from oserve.engines.arguments import engine_cores
from oserve.engines.dial import LOCAL_NODE
from oserve.engines.engine_starts import (
    EngineCommand,
    EngineFiles,
    LaunchFacts,
    engine_command,
    engine_name,
    is_short,
    log_name,
)
from oserve.engines.group import CACHES_FOLDER, boot_id
from oserve.engines.held_process import HeldProcess
from oserve.engines.holding import HeldEngines
from oserve.engines.keeper_children import make_engine_folder, remove_engine_folder
from oserve.engines.logs import rotate_log
from oserve.engines.spawner import Launcher, launcher_for
from oserve.engines.watched import OwnProcess, WatchedProcess


class NodeEngines:
    """Starts engines on one node. Reported ones keep their notes: ``note_ready``, ``clear``.

    ``name`` is the node's. Subclasses say by whom the engines are started.
    """

    name: str

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        """The files of a new engine; ``number`` tells its folder from earlier ones."""
        raise NotImplementedError

    async def start(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> WatchedProcess:
        """Start an engine. Raises ``OServeError`` or ``OSError`` if it cannot be started."""
        raise NotImplementedError

    async def launch(
        self,
        spec: ReplicaSpec,
        devices: Sequence[Device],
        files: EngineFiles,
        command: EngineCommand,
        *,
        standby: bool,
    ) -> WatchedProcess:
        """Start an engine, or the part of one on these devices, by this command; see ``start``."""
        raise NotImplementedError

    def note_ready(self, state: ReplicaState, step_s: float) -> None:
        """Note that a replica serves, so that the next server knows it."""

    def clear(self, state: ReplicaState) -> None:
        """Forget an engine that has ended, and remove what it has left here."""

    async def close(self) -> None:
        """End every engine and what starts them; remove the sockets."""
        raise NotImplementedError


class LaunchedEngines(NodeEngines):
    """Engines that end with this process. ``look``: see ``group_activity``."""

    def __init__(
        self,
        name: str,
        facts: LaunchFacts,
        run_dir: Path,
        launcher: Launcher | None,
        look: Callable[[int, Path], Activity | None],
    ) -> None:
        self.name = name
        self._facts = facts
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log_dir = Path(facts.settings.log_dir or run_dir / "logs").resolve()
        self._run_dir = run_dir.resolve()
        self._sockets: Path | None = None
        self._launcher = launcher or _launcher_of(facts, self._log_dir)
        self._moves_caches = moves_caches(facts)
        self._look = look

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        """See ``NodeEngines.files``."""
        if self._sockets is None:
            self._sockets = _socket_folder(self._run_dir)
        folder = self._sockets / engine_name(spec.id, number)
        return EngineFiles(
            folder=folder,
            log_path=self._log_dir / f"{log_name(spec.id)}.log",
            endpoint=local_endpoint(folder, moves_caches=self._moves_caches),
        )

    async def start(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> WatchedProcess:
        """See ``NodeEngines.start``."""
        command = engine_command(
            self._facts,
            spec,
            devices,
            files.folder,
            standby=standby,
            moves_caches=self._moves_caches,
        )
        return await self.launch(spec, devices, files, command, standby=standby)

    async def launch(
        self,
        spec: ReplicaSpec,
        devices: Sequence[Device],
        files: EngineFiles,
        command: EngineCommand,
        *,
        standby: bool,
    ) -> WatchedProcess:
        """See ``NodeEngines.launch``."""
        del spec, standby  # nobody takes the engine over
        rotate_log(files.log_path)
        # A zygote that ended has removed its parent.
        make_engine_folder(files.folder)
        process = await self._launcher.start(
            command.argv, command.env, engine_cores(devices), files.log_path
        )
        return OwnProcess(process, files.log_path, self._look)

    def clear(self, state: ReplicaState) -> None:
        """See ``NodeEngines.clear``."""
        if state.endpoint.unix_socket:
            remove_engine_folder(str(Path(state.endpoint.unix_socket).parent))

    async def close(self) -> None:
        """See ``NodeEngines.close``."""
        await self._launcher.close()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)


@dataclass(kw_only=True)
class KeptEngines(NodeEngines):
    """Engines that a keeper holds: they outlive this process for a while.

    ``held``: what the keeper holds for each replica, by id. ``free_bytes``: main memory for
    engines, on another node.
    """

    name: str
    facts: LaunchFacts
    keeper: HeldEngines
    free_bytes: float | None = None
    held: dict[str, HeldProcess] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        """Whether the node is another machine, which may be lost."""
        return self.keeper.hatch is not None

    @property
    def _moves_caches(self) -> bool:
        # Caches move through a folder, which two machines do not share.
        return moves_caches(self.facts) and not self.remote

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        """See ``NodeEngines.files``; the keeper must have been reached once."""
        folder = self.keeper.folder / engine_name(spec.id, number)
        log_path = self.keeper.logs / f"{log_name(spec.id)}.log"
        return EngineFiles(folder=folder, log_path=log_path, endpoint=self._endpoint(folder))

    def held_files(self, process: HeldProcess) -> EngineFiles:
        """The files of an engine that was found with the keeper."""
        folder = Path(process.entry.folder)
        return EngineFiles(
            folder=folder, log_path=Path(process.entry.log), endpoint=self._endpoint(folder)
        )

    def _endpoint(self, folder: Path) -> Endpoint:
        hatch = self.keeper.hatch
        if hatch is not None:
            return Endpoint(unix_socket=f"{folder.name}/api.sock", hatch=hatch)
        return local_endpoint(folder, moves_caches=self._moves_caches)

    async def start(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> WatchedProcess:
        """See ``NodeEngines.start``."""
        command = self._command(spec, devices, files, standby=standby)
        return await self.launch(spec, devices, files, command, standby=standby)

    async def launch(
        self,
        spec: ReplicaSpec,
        devices: Sequence[Device],
        files: EngineFiles,
        command: EngineCommand,
        *,
        standby: bool,
    ) -> WatchedProcess:
        """See ``NodeEngines.launch``."""
        note = note_of(spec, self.facts.stamp(devices), standby=standby)
        process = self.held[spec.id] = await self.keeper.launch(
            files.folder.name,
            command.argv,
            command.env,
            engine_cores(devices),
            files.log_path,
            msgspec.to_builtins(note),
            folder=files.folder,
            model=model_folder(command.argv),
        )
        return process

    def _command(
        self, spec: ReplicaSpec, devices: Sequence[Device], files: EngineFiles, *, standby: bool
    ) -> EngineCommand:
        return engine_command(
            self.facts,
            spec,
            devices,
            files.folder,
            standby=standby,
            moves_caches=self._moves_caches,
            free_bytes=self.free_bytes,
        )

    def note_ready(self, state: ReplicaState, step_s: float) -> None:
        """See ``NodeEngines.note_ready``."""
        process = self.held.get(state.spec.id)
        note = read_note(process.entry.note) if process is not None else None
        if process is not None and note is not None and note.ready_s != state.since_s:
            fresh = msgspec.structs.replace(
                note,
                ready_s=state.since_s,
                boot=boot_id(),
                max_model_len=state.max_model_len,
                step_s=step_s,
            )
            process.mark(msgspec.to_builtins(fresh))

    def clear(self, state: ReplicaState) -> None:
        """See ``NodeEngines.clear``; its folder is the keeper's to remove."""
        self.held.pop(state.spec.id, None)

    async def close(self) -> None:
        """See ``NodeEngines.close``; the keeper does it."""
        await self.keeper.close()


def own_engines(
    facts: LaunchFacts,
    keeper: HeldEngines | None,
    run_dir: Path,
    launcher: Launcher | None,
    look: Callable[[int, Path], Activity | None],
) -> NodeEngines:
    """The engines of this machine: a keeper's, or without one those that end with this process."""
    if keeper is not None:
        return KeptEngines(name=LOCAL_NODE, facts=facts, keeper=keeper)
    return LaunchedEngines(LOCAL_NODE, facts, run_dir, launcher, look)


def model_folder(argv: Sequence[str]) -> str:
    """The folder that the arguments of an engine name as its model; empty if it is a hub's name.

    The folder may be on another node: a path is told from a name by its form.
    """
    model = argv[argv.index("--model") + 1] if "--model" in argv[:-1] else ""
    return model if Path(model).is_absolute() else ""


def moves_caches(facts: LaunchFacts) -> bool:
    """Whether KV caches can move between the engines of a machine."""
    return facts.settings.move_caches and facts.platform == "cpu"


def local_endpoint(folder: Path, *, moves_caches: bool) -> Endpoint:
    """The endpoint of an engine of this machine."""
    caches = str(folder.parent / CACHES_FOLDER) if moves_caches else ""
    return Endpoint(unix_socket=str(folder / "api.sock"), caches=caches)


def _launcher_of(facts: LaunchFacts, log_dir: Path) -> Launcher:
    method = facts.settings.method(on_cpu=facts.platform == "cpu")
    return launcher_for(method, log_dir / "zygote.log")


def _socket_folder(run_dir: Path) -> Path:
    """A folder for engines' folders, with a name short enough for sockets in them."""
    inside = run_dir / "sockets"
    if is_short(inside):
        # A run that was killed has left it.
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(mode=0o700, exist_ok=True)
        return inside
    made = Path(tempfile.mkdtemp(prefix="oserve-"))
    if is_short(made):
        return made
    made.rmdir()
    return Path(tempfile.mkdtemp(prefix="oserve-", dir="/tmp"))
