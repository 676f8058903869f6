"""A cluster on a virtual clock: replicas that load, stand by, serve, drain, hang and crash."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

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
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartFailures,
    StartReplica,
    StopReplica,
)
from oserve.sim.nodes import SimulatedNodes
from oserve.sim.phases import Faults, Phases


@dataclass(slots=True, kw_only=True)
class Life:
    """The lifetime of a replica, in seconds; its end is ``None`` while it lives."""

    spec: ReplicaSpec
    start_s: float
    end_s: float | None = None


@dataclass(slots=True, kw_only=True)
class _Replica:
    state: ReplicaState
    life: Life
    ready_at_s: float
    fails: bool
    standby: bool = False
    stopped_at_s: float = math.inf
    found_at_s: float = math.inf
    powerless: bool = False


def _returns(item: _Replica) -> bool:
    """Whether it drains and was not told to stop, so that it can serve again."""
    return item.state.phase is ReplicaPhase.DRAINING and item.stopped_at_s == math.inf


class SimulatedCluster:
    """A cluster on a virtual clock. Raises ValueError if two live replicas share a device.

    ``weights_bytes`` returns the bytes that a replica of a shape loads; see ``Phases``.
    ``overlapping``: draining replicas are hidden and their devices count as free, which no real
    cluster can do; it bounds the gain from faster switches. Replicas started while ``warm`` is set
    serve at once, for those that serve from the beginning. ``lives`` holds all replicas, past ones
    included, in order of their starts. Subclasses whose replicas serve override ``on_...``.
    """

    def __init__(
        self,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        phases: Phases | None = None,
        weights_bytes: Callable[[ReplicaShape], float] = lambda _: 0.0,
        stable_s: float = 60.0,
        faults: Faults | None = None,
        overlapping: bool = False,
    ) -> None:
        self._overlapping = overlapping
        self._devices = devices
        self._clock = clock
        self._phases = phases or Phases()
        self._weights_bytes = weights_bytes
        self._stable_s = stable_s
        self.faults = faults or Faults()
        self.warm = False
        self.lives: list[Life] = []
        self._random = random.Random(self.faults.seed)
        self._replicas: dict[str, _Replica] = {}
        self._failures: dict[str, StartFailures] = {}
        scheduled: list[tuple[float, str, Callable[[str], None]]] = []
        scheduled += [(at_s, name, self.crash) for at_s, name in self.faults.crashes]
        scheduled += [(at_s, name, self.hang) for at_s, name in self.faults.hangs]
        scheduled += [(loss.at_s, loss.node, self.cut_node) for loss in self.faults.node_losses]
        scheduled += [
            (loss.back_s, loss.node, self.restore_node)
            for loss in self.faults.node_losses
            if math.isfinite(loss.back_s)
        ]
        self._scheduled = sorted(scheduled, key=lambda item: item[:2], reverse=True)
        self._nodes = SimulatedNodes(devices, self.faults.node_losses)
        self._last: Observation | None = None

    async def observe(self) -> Observation:
        """Process all due events, then observe; a fault may return the last observation again."""
        self.catch_up(self._clock.now())
        if self._last is not None and self.draws_fault(self.faults.stale_observation):
            return self._last
        self._last = self._observation()
        return self._last

    async def apply(self, action: Action) -> None:
        """Execute an action; a fault may lose or repeat it."""
        if self.draws_fault(self.faults.lost_action):
            return
        self._do(action)
        if self.draws_fault(self.faults.repeated_action):
            self._do(action)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices, held or not."""
        return self._devices

    @property
    def settled(self) -> bool:
        """Whether every live replica serves and nothing drains."""
        done = {ReplicaPhase.READY}
        if self._overlapping:
            done.add(ReplicaPhase.DRAINING)
        return all(item.state.phase in done for item in self._alive())

    def catch_up(self, now_s: float) -> None:
        """Let replicas become ready, fail, hang and crash, each at its time."""
        while self._scheduled and self._scheduled[-1][0] <= now_s:
            at_s, name, fault = self._scheduled.pop()
            self._become_ready(at_s)
            fault(name)
        self._become_ready(now_s)

    def hang(self, name: str) -> None:
        """Make a replica hang, until the cluster detects that and ends it."""
        item = self._replicas.get(name)
        if item is None or item.state.phase is ReplicaPhase.GONE or math.isfinite(item.found_at_s):
            return
        item.found_at_s = self._clock.now() + self.faults.hang_after_s
        item.ready_at_s = math.inf
        self.on_hang(name)

    def cut_node(self, node: str) -> None:
        """Take the power from a node: its replicas stand still, and end once that is noticed."""
        self._nodes.cut(node, self._clock.now())
        for item in self._alive():
            if self._nodes.holds(node, item.state.spec):
                self._cut(item)

    def restore_node(self, node: str) -> None:
        """Give it power again; none of its replicas has survived."""
        self._nodes.restore(node)
        for item in self._alive():
            if item.powerless and self._nodes.holds(node, item.state.spec):
                self._end(item)

    def crash(self, name: str, reason: str = "crashed") -> None:
        """Make a replica exit unexpectedly."""
        item = self._replicas.get(name)
        if item is None or item.state.phase is ReplicaPhase.GONE:
            return
        spec, previous = item.state.spec, self._failures.get(name)
        count = previous.count + 1 if previous is not None and previous.spec == spec else 1
        self._failures[name] = StartFailures(
            spec=spec, count=count, last_s=self._clock.now(), reason=reason
        )
        self._end(item)

    def draws_fault(self, chance: float) -> bool:
        """Draw whether a fault of this probability occurs."""
        return self._random.random() < chance

    # -- hooks of clusters whose replicas serve ------------------------------------------------
    def on_advance(self, now_s: float) -> None:
        """The clock has reached ``now_s``; changes of phases follow."""

    def on_start(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        """A replica starts. It can serve from ``ready_at_s`` on; infinite: once committed."""

    def on_commit(self, name: str) -> None:
        """A replica on standby serves from now on."""

    def on_drain(self, name: str) -> None:
        """A replica takes no more requests."""

    def on_hang(self, name: str) -> None:
        """A replica hangs."""

    def on_end(self, name: str) -> None:
        """A replica has ended."""

    def observed(self, state: ReplicaState) -> ReplicaState:
        """Return the state of a live replica with its load."""
        return state

    # -- phases ---------------------------------------------------------------------------------
    def _observation(self) -> Observation:
        states = []
        for item in self._replicas.values():
            state = item.state
            if state.phase is not ReplicaPhase.GONE:
                state = self.observed(state)
            if self._overlapping and state.phase is ReplicaPhase.DRAINING:
                if state.running + state.waiting == 0:
                    self._end(item)
                continue
            states.append(state)
        now_s = self._clock.now()
        return Observation(
            now_s=now_s,
            devices=self._nodes.devices(now_s),
            replicas=tuple(states),
            failures=dict(self._failures),
            nodes=self._nodes.sightings(now_s),
        )

    def _become_ready(self, now_s: float) -> None:
        self.on_advance(now_s)
        for item in self._alive():
            state = item.state
            if now_s >= (item.found_at_s if item.powerless else item.stopped_at_s):
                self._end(item)
            elif now_s >= item.found_at_s and not item.powerless:
                self.crash(state.spec.id, "hangs")
            elif state.phase is ReplicaPhase.LOADING and now_s >= item.ready_at_s:
                if item.fails:
                    self.crash(state.spec.id)
                else:
                    phase = ReplicaPhase.STANDBY if item.standby else ReplicaPhase.READY
                    self._set(item, phase)
            elif state.phase is ReplicaPhase.READY and now_s - state.since_s >= self._stable_s:
                self._failures.pop(state.spec.id, None)

    def _do(self, action: Action) -> None:
        match action:
            case StartReplica(spec=spec, standby=standby):
                self._start(spec, standby=standby)
            case CommitReplicas(ready=ready, drain=drain):
                self._commit(ready, drain)
            case DrainReplica(replica=name):
                item = self._replicas.get(name)
                if item is not None and item.state.phase is ReplicaPhase.READY:
                    self._set(item, ReplicaPhase.DRAINING)
                    self.on_drain(name)
            case StopReplica(replica=name):
                item = self._replicas.get(name)
                if item is not None and item.state.phase is not ReplicaPhase.GONE:
                    self._stop(item)

    def _commit(self, ready: tuple[str, ...], drain: tuple[str, ...]) -> None:
        able = {ReplicaPhase.STANDBY, ReplicaPhase.READY}
        items = [self._replicas.get(name) for name in ready]
        if any(
            item is None or (item.state.phase not in able and not _returns(item)) for item in items
        ):
            raise ValueError(f"not all of {list(ready)} are on standby")
        for item in items:
            if item is not None and _returns(item):
                self._set(item, ReplicaPhase.READY)
            if item is not None and item.state.phase is ReplicaPhase.STANDBY:
                item.standby = False
                self._set(item, ReplicaPhase.READY)
                self.on_commit(item.state.spec.id)
        for name in drain:
            self._do(DrainReplica(replica=name))

    def _start(self, spec: ReplicaSpec, *, standby: bool) -> None:
        if any(item.state.spec.id == spec.id for item in self._alive()):
            return
        wrong = self._wrong(spec, standby=standby)
        if wrong and self.faults.stale_observation > 0:
            return
        if wrong:
            raise ValueError(wrong)
        now_s = self._clock.now()
        load_s = 0.0 if self.warm else self._load_s(spec, standby=standby)
        if self.draws_fault(self.faults.slow_start):
            load_s *= self.faults.slow_factor
        fails = self.draws_fault(self.faults.failed_start)
        life = Life(spec=spec, start_s=now_s)
        self.lives.append(life)
        self._replicas[spec.id] = _Replica(
            state=ReplicaState(
                spec=spec,
                phase=ReplicaPhase.LOADING,
                endpoint=Endpoint(url=f"sim://{spec.id}"),
                since_s=now_s,
                started_s=now_s,
            ),
            life=life,
            ready_at_s=now_s + load_s,
            fails=fails,
            standby=standby,
        )
        self.on_start(spec, math.inf if fails or standby else now_s + load_s)
        if self._nodes.powerless(spec):
            self._cut(self._replicas[spec.id])

    def _cut(self, item: _Replica) -> None:
        """A replica without power stands still until that is noticed."""
        item.powerless, item.ready_at_s = True, math.inf
        item.found_at_s = self._nodes.noticed_s(item.state.spec)
        self.on_hang(item.state.spec.id)

    def _load_s(self, spec: ReplicaSpec, *, standby: bool) -> float:
        """Return the seconds that a replica takes to load if it starts now."""
        if not standby:
            return self._phases.load_s(self._weights_bytes(spec.shape))
        nodes = {device.id: device.node for device in self._devices}
        own = {nodes[device] for device in spec.devices}
        others = sum(
            item.state.phase is ReplicaPhase.LOADING
            and not own.isdisjoint(nodes[device] for device in item.state.spec.devices)
            for item in self._alive()
        )
        return self._phases.standby_s + others * self._phases.further_standby_s

    def _stop(self, item: _Replica) -> None:
        """End the replica's processes; its devices become free ``stop_s`` later."""
        if self._phases.stop_s <= 0.0:
            self._end(item)
        elif math.isinf(item.stopped_at_s):
            item.stopped_at_s = self._clock.now() + self._phases.stop_s
            self._set(item, ReplicaPhase.DRAINING)
            self.on_end(item.state.spec.id)

    def _wrong(self, spec: ReplicaSpec, *, standby: bool) -> str:
        """Return why a replica cannot be started; empty if it can."""
        if isinstance(spec.backend, AttachedBackend):
            return ""
        if not set(spec.devices) <= {device.id for device in self._devices}:
            return f"replica {spec.id} names a device that does not exist"
        if set(spec.devices) & self._taken(standby=standby):
            return f"replica {spec.id} names a device that is in use"
        return ""

    def _taken(self, *, standby: bool) -> set[str]:
        """Return devices on which no replica may start; a standby may share devices."""
        return {
            device
            for item in self._alive()
            if item.standby or not standby
            if not (self._overlapping and item.state.phase is ReplicaPhase.DRAINING)
            for device in item.state.spec.devices
        }

    def _alive(self) -> list[_Replica]:
        return [i for i in self._replicas.values() if i.state.phase is not ReplicaPhase.GONE]

    def _end(self, item: _Replica) -> None:
        self._set(item, ReplicaPhase.GONE)
        item.life.end_s = self._clock.now()
        self.on_end(item.state.spec.id)

    def _set(self, item: _Replica, phase: ReplicaPhase) -> None:
        item.state = replace(item.state, phase=phase, since_s=self._clock.now())
