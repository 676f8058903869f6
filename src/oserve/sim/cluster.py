"""A cluster on a virtual clock: replicas that load, serve, drain and crash."""

import random
from dataclasses import dataclass, replace

from oserve.core import (
    Action,
    AttachedBackend,
    Clock,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances in [0, 1], drawn from one seeded generator.

    Per action: that it is lost, or done twice. Per loading replica: that its start fails.
    """

    lost_action: float = 0.0
    repeated_action: float = 0.0
    failed_start: float = 0.0
    seed: int = 0


class SimulatedCluster:
    """Behind the door. Raises ValueError if a device is ever given to two live replicas."""

    def __init__(
        self,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        load_s: float = 4.0,
        stable_s: float = 60.0,
        faults: Faults | None = None,
    ) -> None:
        self._devices = devices
        self._clock = clock
        self._load_s = load_s
        self._stable_s = stable_s
        self.faults = faults or Faults()
        self._random = random.Random(self.faults.seed)
        self._replicas: dict[str, ReplicaState] = {}
        self._failures: dict[str, StartFailures] = {}

    async def observe(self) -> Observation:
        """Let loading replicas come up, then tell what there is."""
        now_s = self._clock.now()
        for state in list(self._replicas.values()):
            if state.phase is ReplicaPhase.LOADING and now_s - state.since_s >= self._load_s:
                if self._random.random() < self.faults.failed_start:
                    self.crash(state.spec.id)
                else:
                    self._set(state.spec.id, ReplicaPhase.READY)
            elif state.phase is ReplicaPhase.READY and now_s - state.since_s >= self._stable_s:
                self._failures.pop(state.spec.id, None)
        return Observation(
            now_s=now_s,
            devices=self._devices,
            replicas=tuple(self._replicas.values()),
            failures=dict(self._failures),
        )

    async def apply(self, action: Action) -> None:
        """Do as asked, unless a fault has it otherwise."""
        if self._random.random() < self.faults.lost_action:
            return
        self._do(action)
        if self._random.random() < self.faults.repeated_action:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case StartReplica(spec=spec):
                self._start(spec)
            case DrainReplica(replica=name):
                if self._alive(name) and self._replicas[name].phase is ReplicaPhase.READY:
                    self._set(name, ReplicaPhase.DRAINING)
            case StopReplica(replica=name):
                if self._alive(name):
                    self._set(name, ReplicaPhase.GONE)

    def _start(self, spec: ReplicaSpec) -> None:
        if self._alive(spec.id):
            return
        known = {device.id for device in self._devices}
        taken = {
            device
            for name, state in self._replicas.items()
            if self._alive(name)
            for device in state.spec.devices
        }
        if not isinstance(spec.backend, AttachedBackend):
            if not set(spec.devices) <= known:
                raise ValueError(f"replica {spec.id} names a device that is not there")
            if set(spec.devices) & taken:
                raise ValueError(f"replica {spec.id} names a device that is taken")
        self._replicas[spec.id] = ReplicaState(
            spec=spec,
            phase=ReplicaPhase.LOADING,
            endpoint=Endpoint(url=f"sim://{spec.id}"),
            since_s=self._clock.now(),
        )

    def crash(self, name: str) -> None:
        """A replica ends without being asked to."""
        if not self._alive(name):
            return
        state = self._replicas[name]
        previous = self._failures.get(name)
        count = previous.count + 1 if previous is not None and previous.spec == state.spec else 1
        self._failures[name] = StartFailures(
            spec=state.spec, count=count, last_s=self._clock.now(), reason="crashed"
        )
        self._set(name, ReplicaPhase.GONE)

    def _alive(self, name: str) -> bool:
        state = self._replicas.get(name)
        return state is not None and state.phase is not ReplicaPhase.GONE

    def _set(self, name: str, phase: ReplicaPhase) -> None:
        state = self._replicas[name]
        self._replicas[name] = replace(state, phase=phase, since_s=self._clock.now())
