"""A cluster on a virtual clock: replicas that load, serve, drain, hang and crash."""

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
from oserve.sim.phases import Faults, Phases


@dataclass(slots=True, kw_only=True)
class Life:
    """A replica from its start to its end (seconds; ``None`` while it lives)."""

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


LoadTime = Callable[["SimulatedCluster", ReplicaSpec], float]
"""Returns the seconds from the start of a replica in a cluster until it can serve."""


class SimulatedCluster:
    """Behind the door. Raises ValueError if a device is ever given to two live replicas.

    ``weights_bytes`` says what a replica of a shape must load; see ``Phases``. Replicas started
    while ``warm`` is set serve at once, for what is there before the first second. ``lives`` holds
    every replica there ever was, in order of their starts.

    ``load_s`` replaces the time that ``phases`` gives for a start. With ``instant_drains`` a
    draining replica is not shown and its devices count as free: no real cluster can do that, it
    bounds what quicker switches could gain.
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
        load_s: LoadTime | None = None,
        instant_drains: bool = False,
    ) -> None:
        self._devices = devices
        self._load_time = load_s
        self._instant_drains = instant_drains
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
        strokes: list[tuple[float, str, Callable[[str], None]]] = []
        strokes += [(at_s, name, self.crash) for at_s, name in self.faults.crashes]
        strokes += [(at_s, name, self.hang) for at_s, name in self.faults.hangs]
        self._strokes = sorted(strokes, key=lambda item: item[:2], reverse=True)
        self._last: Observation | None = None

    async def observe(self) -> Observation:
        """Let everything due happen, then tell what there is (or was, if a fault has it so)."""
        self.catch_up(self._clock.now())
        if self._last is not None and self._strikes(self.faults.stale_observation):
            return self._last
        self._last = self._without_drains(self._seen()) if self._instant_drains else self._seen()
        return self._last

    async def apply(self, action: Action) -> None:
        """Do as asked, unless a fault has it otherwise."""
        if self._strikes(self.faults.lost_action):
            return
        self._do(action)
        if self._strikes(self.faults.repeated_action):
            self._do(action)

    @property
    def settled(self) -> bool:
        """Whether every live replica serves, and nothing drains that would be shown."""
        return all(state.phase is ReplicaPhase.READY for state in self.alive)

    @property
    def alive(self) -> tuple[ReplicaState, ...]:
        """The replicas that are not gone; with instant drains without those that drain."""
        return tuple(item.state for item in self._alive() if not self._is_hidden(item.state))

    def catch_up(self, now_s: float) -> None:
        """Let replicas come up, fail to, hang and crash, each at its moment."""
        while self._strokes and self._strokes[-1][0] <= now_s:
            at_s, name, strike = self._strokes.pop()
            self._come_up(at_s)
            strike(name)
        self._come_up(now_s)

    def hang(self, name: str) -> None:
        """A replica stands still from now on, until that is noticed and it is ended."""
        item = self._replicas.get(name)
        if item is None or item.state.phase is ReplicaPhase.GONE or math.isfinite(item.found_at_s):
            return
        item.found_at_s = self._clock.now() + self.faults.hang_after_s
        item.ready_at_s = math.inf
        self._hangs(name)

    def crash(self, name: str, reason: str = "crashed") -> None:
        """A replica ends without being asked to."""
        item = self._replicas.get(name)
        if item is None or item.state.phase is ReplicaPhase.GONE:
            return
        spec, previous = item.state.spec, self._failures.get(name)
        count = previous.count + 1 if previous is not None and previous.spec == spec else 1
        self._failures[name] = StartFailures(
            spec=spec, count=count, last_s=self._clock.now(), reason=reason
        )
        self._end(item)

    # -- for a cluster whose replicas really serve ---------------------------------------------
    def _load_s(self, spec: ReplicaSpec) -> float:
        """Seconds until a replica that starts now can serve."""
        if self._load_time is not None:
            return self._load_time(self, spec)
        return self._phases.load_s(self._weights_bytes(spec.shape))

    def _began(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        """A replica starts; it can serve from ``ready_at_s`` on (infinite: never)."""

    def _committed(self, name: str) -> None:
        """A replica on standby serves."""

    def _drains(self, name: str) -> None:
        """A replica takes no more requests."""

    def _hangs(self, name: str) -> None:
        """A replica stands still."""

    def _ended(self, name: str) -> None:
        """A replica is gone, asked to or not."""

    # -- within ---------------------------------------------------------------------------------
    def _seen(self) -> Observation:
        return Observation(
            now_s=self._clock.now(),
            devices=self._devices,
            replicas=tuple(item.state for item in self._replicas.values()),
            failures=dict(self._failures),
        )

    def _come_up(self, now_s: float) -> None:
        for item in self._alive():
            state = item.state
            if now_s >= item.stopped_at_s:
                self._end(item)
            elif now_s >= item.found_at_s:
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
                    self._drains(name)
            case StopReplica(replica=name):
                item = self._replicas.get(name)
                if item is not None and item.state.phase is not ReplicaPhase.GONE:
                    self._stop(item)

    def _commit(self, ready: tuple[str, ...], drain: tuple[str, ...]) -> None:
        able = {ReplicaPhase.STANDBY, ReplicaPhase.READY}
        items = [self._replicas.get(name) for name in ready]
        if any(item is None or item.state.phase not in able for item in items):
            raise ValueError(f"not all of {list(ready)} stand by")
        for item in items:
            if item is not None and item.state.phase is ReplicaPhase.STANDBY:
                item.standby = False
                self._set(item, ReplicaPhase.READY)
                self._committed(item.state.spec.id)
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
        load_s = 0.0 if self.warm else self._load_s(spec)
        if self._strikes(self.faults.slow_start):
            load_s *= self.faults.slow_factor
        fails = self._strikes(self.faults.failed_start)
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
        self._began(spec, float("inf") if fails or standby else now_s + load_s)

    def _stop(self, item: _Replica) -> None:
        """Its processes end now; its devices are free a little later."""
        if self._phases.stop_s <= 0.0:
            self._end(item)
        elif math.isinf(item.stopped_at_s):
            item.stopped_at_s = self._clock.now() + self._phases.stop_s
            self._set(item, ReplicaPhase.DRAINING)
            self._ended(item.state.spec.id)

    def _wrong(self, spec: ReplicaSpec, *, standby: bool) -> str:
        """Why a replica cannot be started; empty if it can."""
        if isinstance(spec.backend, AttachedBackend):
            return ""
        if not set(spec.devices) <= {device.id for device in self._devices}:
            return f"replica {spec.id} names a device that is not there"
        if set(spec.devices) & self._taken(standby=standby):
            return f"replica {spec.id} names a device that is taken"
        return ""

    def _taken(self, *, standby: bool) -> set[str]:
        """Devices that a replica may not be started on; one on standby may be beside others."""
        return {
            device
            for item in self._alive()
            if (item.standby or not standby) and not self._is_hidden(item.state)
            for device in item.state.spec.devices
        }

    def _is_hidden(self, state: ReplicaState) -> bool:
        return self._instant_drains and state.phase is ReplicaPhase.DRAINING

    def _without_drains(self, observation: Observation) -> Observation:
        """The observation without draining replicas; those that are empty end."""
        for state in observation.replicas:
            if self._is_hidden(state) and state.running + state.waiting == 0:
                self._end(self._replicas[state.spec.id])
        shown = tuple(state for state in observation.replicas if not self._is_hidden(state))
        return replace(observation, replicas=shown)

    def _alive(self) -> list[_Replica]:
        return [i for i in self._replicas.values() if i.state.phase is not ReplicaPhase.GONE]

    def _end(self, item: _Replica) -> None:
        self._set(item, ReplicaPhase.GONE)
        item.life.end_s = self._clock.now()
        self._ended(item.state.spec.id)

    def _set(self, item: _Replica, phase: ReplicaPhase) -> None:
        item.state = replace(item.state, phase=phase, since_s=self._clock.now())

    def _strikes(self, chance: float) -> bool:
        return self._random.random() < chance
