"""The live cluster behind the door: replicas as processes of this machine, or attached servers.

Every replica has one task (see ``replica``); this class holds the picture they paint and sees that
no device is ever given to two replicas at once, but to one on standby beside another. It decides
nothing: an engine that ended is told of in the next observation, and started again only when asked.
"""

import asyncio
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from oserve.control.progress import Activity
from oserve.core import (
    Action,
    AttachedBackend,
    Clock,
    CommitReplicas,
    Device,
    DrainReplica,
    Endpoint,
    Observation,
    ReplicaPhase,
    ReplicaSpec,
    ReplicaState,
    StartFailures,
    StartReplica,
    StopReplica,
)
from oserve.engines.adoption import (
    EngineNote,
    end,
    highest_number,
    note_of,
    read_note,
    sorted_out,
    stamp_of,
)
from oserve.engines.arguments import (
    Platform,
    engine_arguments,
    engine_cores,
    engine_environment,
    runs_eagerly,
)
from oserve.engines.attached import AttachedReplica
from oserve.engines.group import CACHES_FOLDER, group_activity
from oserve.engines.holding import HeldEngines, HeldProcess
from oserve.engines.logs import open_log
from oserve.engines.probe import Probe
from oserve.engines.replica import Prober, ReplicaTask, VllmReplica
from oserve.engines.room import cache_sized, unsized
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess, Launcher, launcher_for

log = logging.getLogger(__name__)

# Socket paths must stay under 108 bytes, and vLLM's own are 37 longer than their folder.
_MAX_FOLDER_BYTES = 68
_MAX_NAME_BYTES = 24
_MAX_REMEMBERED = 256
_AFTER = {
    ReplicaPhase.DRAINING: {ReplicaPhase.HUNG, ReplicaPhase.GONE},
    ReplicaPhase.HUNG: {ReplicaPhase.GONE},
}


class LocalCluster:
    """Implements the door. Use ``close`` when done: nothing is left behind.

    ``model`` is a folder or a hub name; ``served_model_name`` what clients call it. ``run_dir``
    holds sockets and logs. ``api_keys``: values of the variables that attached replicas name.
    ``sized``: the size of KV caches in ``settings`` was computed, so that engines of another one
    may be taken up. ``keeper``: engines are held by it and outlive this process for a while; see
    ``adopt``. ``launcher``, ``probe`` and ``look`` are for tests.
    ``on_change`` is called in the event loop,
    at once, whenever a replica's phase changes.
    """

    def __init__(
        self,
        devices: tuple[Device, ...],
        *,
        model: str,
        served_model_name: str,
        run_dir: Path,
        clock: Clock,
        settings: EngineSettings | None = None,
        api_keys: Mapping[str, str] | None = None,
        sized: bool = False,
        keeper: HeldEngines | None = None,
        launcher: Launcher | None = None,
        probe: Callable[[Endpoint], Prober] | None = None,
        look: Callable[[int, Path], Activity | None] = group_activity,
        on_change: Callable[[ReplicaState], None] | None = None,
    ) -> None:
        self.on_change = on_change
        self._devices = {device.id: device for device in devices}
        self._model = model
        self._served_model_name = served_model_name
        self._clock = clock
        self._settings = settings or EngineSettings()
        self._stamped = unsized(self._settings) if sized else self._settings
        self._api_keys = api_keys or {}
        self._platform: Platform = (
            "cpu" if all(device.kind == "cpu" for device in devices) else "cuda"
        )
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._run_dir = run_dir.resolve()
        self._log_dir = Path(self._settings.log_dir or run_dir / "logs").resolve()
        self._keeper = keeper
        self._held: dict[str, HeldProcess] = {}
        self._sockets = self._socket_folder()
        self._launcher = launcher or self._default_launcher()
        self._probe = probe or partial(Probe, timeout_s=self._settings.health_timeout_s)
        self._look = look
        self._token_s: dict[str, float] = {}
        self._states: dict[str, ReplicaState] = {}
        self._failures: dict[str, StartFailures] = {}
        self._running: dict[str, tuple[ReplicaTask, asyncio.Task[None]]] = {}
        self._standby: set[str] = set()
        self._count = 0
        self._closed = False

    async def observe(self) -> Observation:
        """The current picture; costs nothing."""
        return Observation(
            now_s=self._clock.now(),
            devices=tuple(self._devices.values()),
            replicas=tuple(self._states.values()),
            failures=dict(self._failures),
        )

    async def apply(self, action: Action) -> None:
        """See ``oserve.control.cluster.Cluster``.

        Raises ``ValueError`` for a start on devices that are unknown or taken, and for a commit of
        replicas that do not stand by.
        """
        match action:
            case StartReplica(spec=spec, standby=standby):
                self._start(spec, standby=standby)
            case CommitReplicas(ready=ready, drain=drain):
                self._commit(ready, drain)
            case DrainReplica(replica=name):
                if name in self._running and self._states[name].phase is ReplicaPhase.READY:
                    self._report(name, phase=ReplicaPhase.DRAINING)
            case StopReplica(replica=name):
                self._stop(name)

    async def adopt(self) -> tuple[list[str], list[str]]:
        """Take up the engines that the keeper holds for a server before this one.

        Those of the same model, settings and devices go on: they are ready in the next observation
        if they were. All others are ended; until they are gone their devices are theirs. Returns
        the ids of both.
        """
        if self._keeper is None:
            return [], []
        found = self._keeper.engines()
        self._count = max(self._count, highest_number(list(found)))
        known, strange = sorted_out(found)
        grace_s = self._settings.stop_grace_s
        await asyncio.gather(*(end(process, grace_s=grace_s) for process in strange))
        fit = await asyncio.gather(*(self._take_up(*pair) for pair in known.values()))
        kept = [name for name, is_fit in zip(known, fit, strict=True) if is_fit]
        return kept, [name for name in known if name not in kept]

    async def close(self) -> None:
        """End every process, forget attached servers, remove sockets; asking twice is harmless."""
        self._closed = True
        for name in list(self._running):
            self._stop(name)
        await asyncio.gather(*(task for _, task in self._running.values()))
        await (self._keeper or self._launcher).close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _start(self, spec: ReplicaSpec, *, standby: bool) -> None:
        if spec.id in self._running or self._closed:
            return
        attached = isinstance(spec.backend, AttachedBackend)
        if not attached:
            self._check_devices(spec, standby=standby)
        self._count += 1
        failures = self._failures.get(spec.id)
        if failures is not None and failures.spec != spec:
            del self._failures[spec.id]
        replica = self._attached(spec) if attached else self._engine(spec, standby=standby)
        self._running[spec.id] = (replica, asyncio.create_task(self._live(spec, replica)))
        if self.on_change is not None:
            self.on_change(self._states[spec.id])

    def _commit(self, ready: Sequence[str], drain: Sequence[str]) -> None:
        able = {ReplicaPhase.STANDBY, ReplicaPhase.READY}
        missing = [
            name
            for name in ready
            if name not in self._running or self._states[name].phase not in able
        ]
        if missing:
            raise ValueError(f"{missing} do not stand by")
        for name in ready:
            self._standby.discard(name)
            self._running[name][0].standby = False
            self._report(name, phase=ReplicaPhase.READY)
        for name in drain:
            if name in self._running and self._states[name].phase is ReplicaPhase.READY:
                self._report(name, phase=ReplicaPhase.DRAINING)

    def _check_devices(self, spec: ReplicaSpec, *, standby: bool) -> None:
        wanted = set(spec.devices)
        if unknown := wanted - set(self._devices):
            raise ValueError(f"replica {spec.id} asks for unknown devices {sorted(unknown)}")
        for name in self._running:
            if standby and name not in self._standby:
                continue
            if taken := wanted & set(self._states[name].spec.devices):
                raise ValueError(
                    f"replica {spec.id} asks for devices {sorted(taken)}, which {name} has"
                )

    def _stop(self, name: str) -> None:
        """Its devices stay taken until its processes are gone, so it is not gone before that."""
        if name not in self._running:
            return
        if self._states[name].phase is ReplicaPhase.READY:
            self._report(name, phase=ReplicaPhase.DRAINING)
        self._running[name][0].stop.set()

    def _attached(self, spec: ReplicaSpec) -> ReplicaTask:
        assert isinstance(spec.backend, AttachedBackend)
        endpoint = spec.backend.endpoint(self._api_keys)
        self._put(spec, endpoint)
        return AttachedReplica(
            **self._common(spec, endpoint),
            endpoint=endpoint,
            wanted=spec.backend.model or self._served_model_name,
        )

    def _engine(self, spec: ReplicaSpec, *, standby: bool) -> ReplicaTask:
        if standby:
            self._standby.add(spec.id)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", spec.id)[:_MAX_NAME_BYTES]
        folder = self._sockets / f"{name}-{self._count}"
        log_path = open_log(self._log_dir, name)
        endpoint = self._endpoint(folder)
        self._put(spec, endpoint)
        return VllmReplica(
            **self._common(spec, endpoint),
            **self._watched(spec, log_path),
            start=partial(self._launch, spec, folder, log_path, standby=standby),
            standby=standby,
            step_s=self._step_s(spec),
        )

    def _endpoint(self, folder: Path) -> Endpoint:
        caches = str(folder.parent / CACHES_FOLDER) if self._moves_caches else ""
        return Endpoint(unix_socket=str(folder / "api.sock"), caches=caches)

    @property
    def _moves_caches(self) -> bool:
        return self._settings.move_caches and self._platform == "cpu"

    def _common(self, spec: ReplicaSpec, endpoint: Endpoint) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "settings": self._settings,
            "probe": self._probe(endpoint),
            "report": partial(self._report, spec.id),
            "stable": partial(self._failures.pop, spec.id, None),
        }

    def _watched(self, spec: ReplicaSpec, log_path: Path) -> dict[str, Any]:
        return {
            "log_path": log_path,
            "model": self._served_model_name,
            "chunk_tokens": spec.shape.max_num_batched_tokens,
            "learned": partial(self._token_s.__setitem__, spec.shape.name),
            "look": lambda pid: self._look(pid, log_path),
        }

    def _step_s(self, spec: ReplicaSpec) -> float:
        """What a whole chunk takes a replica of that shape, or else the slowest that is known."""
        slowest_s = max(self._token_s.values(), default=0.0)
        token_s = self._token_s.get(spec.shape.name, slowest_s)
        return token_s * spec.shape.max_num_batched_tokens

    def _put(self, spec: ReplicaSpec, endpoint: Endpoint) -> None:
        self._states.pop(spec.id, None)  # so that the newest come last
        self._states[spec.id] = ReplicaState(
            spec=spec,
            phase=ReplicaPhase.LOADING,
            endpoint=endpoint,
            since_s=self._clock.now(),
            started_s=self._clock.now(),
        )
        gone = [name for name in self._states if name not in self._running and name != spec.id]
        for name in gone[: max(0, len(gone) - _MAX_REMEMBERED)]:
            del self._states[name]
            self._failures.pop(name, None)

    async def _launch(
        self, spec: ReplicaSpec, folder: Path, log_path: Path, *, standby: bool
    ) -> EngineProcess:
        devices = [self._devices[name] for name in spec.devices]
        arguments, environment = self._command(spec, folder, devices, standby=standby)
        cores = engine_cores(devices)
        if self._keeper is None:
            return await self._launcher.start(arguments, environment, cores, log_path)
        note = msgspec.to_builtins(note_of(spec, self._stamp(spec), standby=standby))
        held = self._held[spec.id] = await self._keeper.launch(
            folder.name, arguments, environment, cores, log_path, note
        )
        return held

    # -- taking up what runs --------------------------------------------------------------------
    def _stamp(self, spec: ReplicaSpec) -> str:
        devices = [self._devices[name] for name in spec.devices]
        return stamp_of(self._model, self._served_model_name, self._stamped, devices)

    async def _take_up(self, note: EngineNote, process: HeldProcess) -> bool:
        """Give an engine its task again; tells whether it goes on."""
        spec = note.spec
        endpoint = self._endpoint(Path(process.entry.folder))
        self._put(spec, endpoint)
        self._held[spec.id] = process
        replica = VllmReplica(
            **self._common(spec, endpoint),
            **self._watched(spec, Path(process.entry.log)),
            start=process.begun,
            was_ready=note.ready_s is not None,
            step_s=note.step_s,
        )
        fit = set(spec.devices) <= set(self._devices) and note.stamp == self._stamp(spec)
        fit = fit and not process.entry.ending
        # Weights that it waited for do not come any more.
        fit = fit and not (note.standby and note.ready_s is None)
        if fit and note.ready_s is not None:
            # One that does not answer now may be busy: it is judged as any that is ready.
            models = await replica.probe.models()
            fit = models is None or self._served_model_name in [model.name for model in models]
        if not fit:
            self._report(spec.id, phase=ReplicaPhase.DRAINING, pid=process.pid)
            replica.stop.set()
        elif note.ready_s is not None:
            changes = {"pid": process.pid, "max_model_len": note.max_model_len}
            self._report(spec.id, phase=ReplicaPhase.READY, since_s=note.ready_s, **changes)
        self._running[spec.id] = (replica, asyncio.create_task(self._live(spec, replica)))
        return fit

    def _command(
        self, spec: ReplicaSpec, folder: Path, devices: Sequence[Device], *, standby: bool
    ) -> tuple[list[str], dict[str, str]]:
        arguments = engine_arguments(
            spec,
            model=self._model,
            served_model_name=self._served_model_name,
            unix_socket=str(folder / "api.sock"),
            platform=self._platform,
            settings=cache_sized(self._settings, self._model, devices, spec.shape),
            standby=standby,
            moves_caches=self._moves_caches,
        )
        environment = engine_environment(
            devices,
            platform=self._platform,
            local_model=Path(self._model).is_dir(),
            eager=runs_eagerly(arguments),
            folder=str(folder),
            keep_weights=self._settings.keep_weights,
            caches=str(folder.parent / CACHES_FOLDER) if self._moves_caches else "",
        )
        # A zygote, or a keeper, that ended has removed it.
        self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        (self._sockets / CACHES_FOLDER).mkdir(mode=0o700, exist_ok=True)
        return arguments, environment

    async def _live(self, spec: ReplicaSpec, replica: ReplicaTask) -> None:
        """Run one incarnation to its end and write down how it went."""
        try:
            reason = await replica.run()
        except Exception as error:
            log.exception("replica %s", spec.id)
            reason = f"{type(error).__name__}: {error}"
        if replica.stop.is_set():
            reason = None
        socket = self._states[spec.id].endpoint.unix_socket
        if socket:
            shutil.rmtree(Path(socket).parent, ignore_errors=True)
        del self._running[spec.id]
        self._held.pop(spec.id, None)
        self._standby.discard(spec.id)
        if reason is not None:
            log.warning("replica %s %s", spec.id, reason)
            before = self._failures.get(spec.id)
            self._failures[spec.id] = StartFailures(
                spec=spec,
                count=before.count + 1 if before is not None else 1,
                last_s=self._clock.now(),
                reason=reason,
            )
        self._report(
            spec.id,
            phase=ReplicaPhase.GONE,
            detail=reason or "",
            running=0,
            waiting=0,
            silent_s=0.0,
            pid=0,
        )

    def _report(self, name: str, **changes: Any) -> None:
        """Take up what a replica's task saw; one that leaves does not come back."""
        state = self._states[name]
        phase = changes.pop("phase", state.phase)
        if phase not in _AFTER.get(state.phase, ReplicaPhase):
            phase = state.phase
        if phase is not state.phase:
            changes = {"since_s": self._clock.now(), "detail": "", **changes}
        self._states[name] = replace(state, phase=phase, **changes)
        if phase is ReplicaPhase.READY and phase is not state.phase and name in self._held:
            self._note_ready(self._states[name])
        if phase is ReplicaPhase.HUNG and phase is not state.phase:
            log.warning("replica %s %s; its requests go on elsewhere", name, changes["detail"])
        if phase is not state.phase and self.on_change is not None:
            self.on_change(self._states[name])

    def _note_ready(self, state: ReplicaState) -> None:
        process = self._held[state.spec.id]
        note = read_note(process.entry.note)
        if note is not None and note.ready_s != state.since_s:
            ready = {
                "ready_s": state.since_s,
                "max_model_len": state.max_model_len,
                "step_s": self._step_s(state.spec),
            }
            process.mark(msgspec.to_builtins(msgspec.structs.replace(note, **ready)))

    def _default_launcher(self) -> Launcher:
        method = self._settings.method(on_cpu=self._platform == "cpu")
        return launcher_for(method, self._log_dir / "zygote.log")

    def _socket_folder(self) -> Path:
        inside = self._run_dir / "sockets"
        longest = inside / ("x" * _MAX_NAME_BYTES + "-999999")
        if len(str(longest).encode()) <= _MAX_FOLDER_BYTES:
            if self._keeper is None:
                # Left over from a run that had no chance to clear up.
                shutil.rmtree(inside, ignore_errors=True)
            inside.mkdir(mode=0o700, exist_ok=True)
            return inside
        made = Path(tempfile.mkdtemp(prefix="oserve-"))
        if len(str(made / ("x" * _MAX_NAME_BYTES + "-999999")).encode()) <= _MAX_FOLDER_BYTES:
            return made
        made.rmdir()
        return Path(tempfile.mkdtemp(prefix="oserve-", dir="/tmp"))
