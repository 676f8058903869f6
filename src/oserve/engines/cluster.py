"""The live cluster: replicas as engines on this machine and other nodes, or as attached servers.

Each replica has one task (see ``replica``), which reports to ``ReplicaStates``. This class gives no
device to two replicas at once, except to a standby replica beside another. It makes no decisions:
an engine that exits shows in the next observation, and starts again only when the controller asks.
A node whose connection is lost is out of the observation with its devices, and its replicas are
gone; it is back once all that still runs there is taken up or ended.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path

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
    StartReplica,
    StopReplica,
)
from oserve.engines.adoption import EngineNote, end, highest_number, sorted_out
from oserve.engines.attached import AttachedReplica
from oserve.engines.cluster_nodes import ClusterNodes
from oserve.engines.engine_starts import LaunchFacts, platform_of
from oserve.engines.group import group_activity
from oserve.engines.held_process import HeldProcess, NodeLostError
from oserve.engines.holding import HeldEngines
from oserve.engines.node_engines import KeptEngines, NodeEngines, own_engines
from oserve.engines.part_adoption import PartsGathering, finished
from oserve.engines.probe import Probe
from oserve.engines.replica import Prober, ReplicaTask, VllmReplica
from oserve.engines.replica_states import ReplicaStates
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher
from oserve.engines.watched import WatchedProcess

_log = logging.getLogger("oserve.engines")

_ABLE = {ReplicaPhase.STANDBY, ReplicaPhase.READY}


class EngineCluster:
    """Implements ``control.cluster.Cluster``. ``close`` leaves no process and no socket behind.

    ``model``, ``served_model_name``, ``sized``: see ``LaunchFacts``. ``run_dir`` holds sockets and
    logs. ``api_keys``: values of the variables that attached replicas name. ``keeper`` holds the
    engines, which then outlive this process for a while; see ``adopt``. ``remote``: the keepers of
    other nodes, for ``devices`` there. ``launcher``, ``probe`` and ``look`` are for tests.
    ``on_change`` is called at once, in the event loop, whenever a replica's phase changes;
    ``on_node`` with a node that is up (an empty reason) or down (why).
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
        remote: Sequence[HeldEngines] = (),
        launcher: Launcher | None = None,
        probe: Callable[[Endpoint], Prober] | None = None,
        look: Callable[[int, Path], Activity | None] = group_activity,
        on_change: Callable[[ReplicaState], None] | None = None,
        on_node: Callable[[str, str], None] | None = None,
    ) -> None:
        self.on_change = on_change
        self._clock = clock
        self._settings = settings or EngineSettings()
        self._served_model_name = served_model_name
        self._api_keys = api_keys or {}
        elsewhere = {held.node for held in remote}
        self._facts = LaunchFacts(
            model=model,
            served_model_name=served_model_name,
            settings=self._settings,
            platform=platform_of([one for one in devices if one.node not in elsewhere]),
            sized=sized,
        )
        own = own_engines(self._facts, keeper, run_dir, launcher, look)
        self.nodes = ClusterNodes(
            own, devices, facts=self._facts, clock=clock, adopt=self._adopt, on_node=on_node
        )
        self._probe = probe or partial(Probe, timeout_s=self._settings.health_timeout_s)
        # Seconds per prompt token that engines of a shape have shown, by the shape's name.
        self._token_s: dict[str, float] = {}
        self._states = ReplicaStates(clock, self._changed)
        self._running: dict[str, tuple[ReplicaTask, asyncio.Task[None]]] = {}
        self._placed: dict[str, NodeEngines] = {}
        self._standby: set[str] = set()
        # Replicas over several nodes of which parts were found; only while nodes are first asked.
        self._gathering: dict[str, PartsGathering] | None = None
        self._count = 0
        self._closed = False
        for held in remote:
            self.nodes.join(held)

    async def observe(self) -> Observation:
        """The present state of all replicas; it asks no engine."""
        return Observation(
            now_s=self._clock.now(),
            devices=self.nodes.book.usable(),
            replicas=tuple(self._states.values()),
            failures=dict(self._states.failures),
            nodes=self.nodes.sightings(),
        )

    async def apply(self, action: Action) -> None:
        """See ``oserve.control.cluster.Cluster``.

        Raises ``ValueError`` for a start on devices that are unknown or taken, and for a commit of
        replicas that are not on standby.
        """
        match action:
            case StartReplica(spec=spec, standby=standby):
                self._start(spec, standby=standby)
            case CommitReplicas(ready=ready, drain=drain):
                self._commit(ready, drain)
            case DrainReplica(replica=name):
                self._drain(name)
            case StopReplica(replica=name):
                self._stop(name)

    async def adopt(self) -> tuple[list[str], list[str]]:
        """Take over the engines that the keeper holds for an earlier server.

        Those of the same model, settings and devices go on, and are ready in the next observation
        if they were before. The others are ended, and keep their devices until they are gone.
        Returns the ids of both.
        """
        self._gathering = {}
        own = self.nodes.own
        found = [await self._adopt(own)] if isinstance(own, KeptEngines) else []
        self.nodes.begin()
        found += await self.nodes.adopted()
        gathered, self._gathering = self._gathering, None
        found.append(finished(gathered))
        kept = [name for names, _ in found for name in names]
        return kept, [name for _, names in found for name in names]

    async def close(self) -> None:
        """End every engine, forget attached servers, remove sockets. It can be called twice."""
        self._closed = True
        await self.nodes.close()
        for name in list(self._running):
            self._stop(name)
        await asyncio.gather(*(task for _, task in self._running.values()))
        await asyncio.gather(*(node.close() for node in self.nodes.all()))

    def node_of(self, replica: str, rank: int) -> str:
        """The node of a replica's rank; ranks are in the order of its devices."""
        return self.nodes.book.of(self._states[replica].spec)[rank].node

    # -- actions --------------------------------------------------------------------------------
    def _start(self, spec: ReplicaSpec, *, standby: bool) -> None:
        # One that was found may still be asked whether it fits; it has its place already.
        if self._closed or spec.id in self._running or spec.id in self._placed:
            return
        if isinstance(spec.backend, AttachedBackend):
            replica = self._attached(spec, spec.backend)
        else:
            rivals = self._running if not standby else self._standby & self._running.keys()
            self.nodes.book.check(spec, (self._states[name].spec for name in rivals))
            replica = self._engine(spec, standby=standby)
        self._run(spec, replica)
        self._changed(self._states[spec.id])

    def _run(self, spec: ReplicaSpec, replica: ReplicaTask) -> None:
        self._running[spec.id] = (replica, asyncio.create_task(self._live(spec, replica)))

    def _commit(self, ready: Sequence[str], drain: Sequence[str]) -> None:
        missing = [name for name in ready if name not in self._running or not self._may_serve(name)]
        if missing:
            raise ValueError(f"{missing} are not on standby")
        for name in ready:
            self._standby.discard(name)
            self._running[name][0].standby = False
            self._states.report(name, phase=ReplicaPhase.READY)
        for name in drain:
            self._drain(name)

    def _may_serve(self, name: str) -> bool:
        phase = self._states[name].phase
        returns = phase is ReplicaPhase.DRAINING and not self._running[name][0].stop.is_set()
        return phase in _ABLE or returns

    def _drain(self, name: str) -> None:
        if name in self._running and self._states[name].phase is ReplicaPhase.READY:
            self._states.report(name, phase=ReplicaPhase.DRAINING)

    def _stop(self, name: str) -> None:
        """End a replica. Its devices stay taken, and it is not gone, until its processes are."""
        self._drain(name)
        if name in self._running:
            self._running[name][0].stop.set()

    # -- tasks of replicas ----------------------------------------------------------------------
    def _attached(self, spec: ReplicaSpec, backend: AttachedBackend) -> ReplicaTask:
        endpoint = backend.endpoint(self._api_keys)
        self._states.start(spec, endpoint)
        return AttachedReplica(
            clock=self._clock,
            settings=self._settings,
            probe=self._probe(endpoint),
            report=partial(self._states.report, spec.id),
            stable=partial(self._states.stable, spec.id),
            endpoint=endpoint,
            wanted=backend.model or self._served_model_name,
        )

    def _engine(self, spec: ReplicaSpec, *, standby: bool) -> ReplicaTask:
        node = self._placed[spec.id] = self.nodes.engines_for(spec)
        self._count += 1
        if standby:
            self._standby.add(spec.id)
        files = node.files(spec, self._count)
        devices = self.nodes.book.of(spec)
        start = partial(node.start, spec, devices, files, standby=standby)
        replica = self._vllm(spec, files.endpoint, start)
        replica.standby = standby
        replica.step_s = self._step_s(spec)
        return replica

    def _vllm(
        self,
        spec: ReplicaSpec,
        endpoint: Endpoint,
        start: Callable[[], Coroutine[None, None, WatchedProcess]],
    ) -> VllmReplica:
        self._states.start(spec, endpoint)
        return VllmReplica(
            clock=self._clock,
            settings=self._settings,
            probe=self._probe(endpoint),
            report=partial(self._states.report, spec.id),
            stable=partial(self._states.stable, spec.id),
            start=start,
            model=self._served_model_name,
            chunk_tokens=spec.shape.max_num_batched_tokens,
            learned=partial(self._token_s.__setitem__, spec.shape.name),
        )

    def _step_s(self, spec: ReplicaSpec) -> float:
        """Seconds of a whole chunk, as this shape, or else the slowest known, has shown."""
        slowest_s = max(self._token_s.values(), default=0.0)
        token_s = self._token_s.get(spec.shape.name, slowest_s)
        return token_s * spec.shape.max_num_batched_tokens

    # -- engines that are found -----------------------------------------------------------------
    async def _adopt(self, node: KeptEngines) -> tuple[list[str], list[str]]:
        """Take over or end the engines that a keeper holds; returns the replicas of both.

        Of a replica that runs elsewhere by now, the engine found is ended.
        """
        found = node.keeper.engines()
        self._count = max(self._count, highest_number(list(found)))
        known, strange = sorted_out(found)
        for name in [name for name, one in known.items() if self._gathers(node, *one)]:
            del known[name]
        for name in [name for name in known if name in self._placed]:
            strange.append(known.pop(name)[1])
        # First: this reads files, and a fault must leave no replica without a task.
        fits = {name: self._fits(node, *one) for name, one in known.items()}
        self._placed.update(dict.fromkeys(known, node))
        fit, _ = await asyncio.gather(
            asyncio.gather(*(self._take_over(node, *known[one], fits[one]) for one in known)),
            asyncio.gather(*(self._end(process) for process in strange)),
        )
        kept = [name for name, is_fit in zip(known, fit, strict=True) if is_fit]
        return kept, [name for name in known if name not in kept]

    async def _end(self, process: HeldProcess) -> None:
        with contextlib.suppress(NodeLostError):
            await end(process, grace_s=self._settings.stop_grace_s, clock=self._clock)

    async def _take_over(
        self, node: KeptEngines, note: EngineNote, process: HeldProcess, fits: bool
    ) -> bool:
        """Give an engine that was found a task; returns whether it goes on."""
        spec = note.spec
        node.held[spec.id] = process
        replica = self._vllm(spec, node.held_files(process).endpoint, process.begun)
        replica.was_ready = note.ready_s is not None
        replica.step_s = note.step_s
        if fits and note.ready_s is not None:
            # An engine that does not answer now may be busy: its task judges it.
            models = await replica.probe.models()
            fits = models is None or self._served_model_name in [model.name for model in models]
        if not fits:
            self._states.report(spec.id, phase=ReplicaPhase.DRAINING, pid=process.pid)
            replica.stop.set()
        else:
            self._report_ready(note, process.pid)
        self._run(spec, replica)
        return fits

    def _gathers(self, node: KeptEngines, note: EngineNote, process: HeldProcess) -> bool:
        """Whether it is a part of a replica that may be taken over; the first gives it a task."""
        spec = note.spec
        waits = note.standby and note.ready_s is None
        if self._gathering is None or waits or process.entry.ending:
            return False
        gathering = self._gathering.get(spec.id)
        if gathering is None:
            engines = self.nodes.parts_for(spec) if spec.id not in self._placed else None
            if engines is None:
                return False
            gathering = PartsGathering(spec, engines)
        part = gathering.part_on(node.name)
        if part is None or gathering.spec != spec:
            return False
        if note.stamp != self._facts.stamp(part.devices):
            return False
        gathering.add(part, process)
        node.held[spec.id] = process
        if self._gathering.setdefault(spec.id, gathering) is gathering and (
            spec.id not in self._placed
        ):
            self._placed[spec.id] = gathering.engines
            endpoint = gathering.engines.endpoint_of(Path(process.entry.folder).name)
            self._resume(note, endpoint, gathering.begun, process.pid)
        return True

    def _resume(
        self,
        note: EngineNote,
        endpoint: Endpoint,
        start: Callable[[], Coroutine[None, None, WatchedProcess]],
        pid: int,
    ) -> None:
        """Give a replica a task that goes on where an earlier server's was."""
        replica = self._vllm(note.spec, endpoint, start)
        replica.was_ready = note.ready_s is not None
        replica.step_s = note.step_s
        self._report_ready(note, pid)
        self._run(note.spec, replica)

    def _report_ready(self, note: EngineNote, pid: int) -> None:
        """As an earlier server has noted, if it has."""
        if note.ready_s is not None:
            self._states.report(
                note.spec.id,
                phase=ReplicaPhase.READY,
                since_s=note.since_s(self._clock.now()),
                pid=pid,
                max_model_len=note.max_model_len,
            )

    def _fits(self, node: KeptEngines, note: EngineNote, process: HeldProcess) -> bool:
        """Whether an engine is what this server would start there."""
        spec = note.spec
        if process.entry.ending or not self.nodes.has(node, spec):
            return False
        if note.standby and note.ready_s is None:
            return False  # the weights that it waits for will not come
        return note.stamp == self._facts.stamp(self.nodes.book.of(spec))

    # -- tasks, to their end --------------------------------------------------------------------
    async def _live(self, spec: ReplicaSpec, replica: ReplicaTask) -> None:
        """Run one engine or server to its end."""
        exit_ = None
        try:
            exit_ = await replica.run()
            reason = exit_.reason if exit_ is not None else None
        except Exception as error:
            # The replica must be gone, or its devices stay taken; the policy bounds its restarts.
            _log.exception("the task of replica %s failed", spec.id)
            reason = f"{type(error).__name__}: {error}"
        if replica.stop.is_set():
            reason = None
        node = self._placed.pop(spec.id, None)
        if node is not None:
            node.clear(self._states[spec.id])
        del self._running[spec.id]
        self._standby.discard(spec.id)
        self._states.end(spec.id, reason, counts=exit_ is None or not exit_.lost)

    def _changed(self, state: ReplicaState) -> None:
        node = self._placed.get(state.spec.id)
        if state.phase is ReplicaPhase.READY and node is not None:
            node.note_ready(state, self._step_s(state.spec))
        if self.on_change is not None:
            self.on_change(state)
