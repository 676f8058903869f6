"""The door to a simulated fleet: the live control loop starts, drains and stops replicas of it.

Starting takes the modelled time, draining as long as running requests do. A device that is given
to two live replicas at once raises ValueError: no policy may gain by a mistake.
"""

from dataclasses import dataclass

from oserve.app.simulated import Levers, Simulator
from oserve.core import (
    Action,
    Clock,
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
from oserve.sim.fleet import Fleet
from oserve.study.scene import Phases


@dataclass(slots=True)
class Life:
    """A replica from start to end, both in seconds; ``end_s`` is ``None`` while it lives."""

    spec: ReplicaSpec
    start_s: float
    since_s: float
    phase: ReplicaPhase
    end_s: float | None = None


class FleetCluster:
    """Behind the door stands a ``Fleet``; ``warm`` replicas serve at once.

    With ``free`` starting takes no time and draining replicas are hidden from the loop, so that
    their devices count as free (see ``Conduct``).
    """

    def __init__(
        self,
        fleet: Fleet,
        simulator: Simulator,
        levers: Levers,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        phases: Phases,
        free: bool = False,
    ) -> None:
        self._fleet = fleet
        self._simulator = simulator
        self._levers = levers
        self._devices = devices
        self._clock = clock
        self._phases = phases
        self._free = free
        self.warm = True
        self.lives: list[Life] = []

    async def observe(self) -> Observation:
        """Let the fleet catch up with the clock, then tell what there is."""
        now_s = self._clock.now()
        self._fleet.advance(now_s)
        seen = {item.name: item for item in self._fleet.observe().replicas}
        states = []
        for life in self._alive():
            item = seen[life.spec.id]
            if item.phase is not life.phase:
                life.phase, life.since_s = item.phase, now_s
            busy = item.running + item.waiting + item.inflight
            if self._free and life.phase is ReplicaPhase.DRAINING:
                if not busy:
                    self._stop(life)
                continue
            states.append(
                ReplicaState(
                    spec=life.spec,
                    phase=life.phase,
                    endpoint=Endpoint(url=f"sim://{life.spec.id}"),
                    since_s=life.since_s,
                    running=item.running,
                    # What is on its way between replicas still needs its devices.
                    waiting=max(item.waiting, item.inflight - item.running),
                    kv_cache_usage=item.kv_usage,
                )
            )
        return Observation(now_s=now_s, devices=self._devices, replicas=tuple(states))

    async def apply(self, action: Action) -> None:
        """Do as asked."""
        match action:
            case StartReplica(spec=spec):
                self._start(spec)
            case DrainReplica(replica=name):
                for life in self._alive():
                    if life.spec.id == name and life.phase is ReplicaPhase.READY:
                        self._fleet.drain(name)
                        life.phase, life.since_s = ReplicaPhase.DRAINING, self._clock.now()
            case StopReplica(replica=name):
                for life in self._alive():
                    if life.spec.id == name:
                        self._stop(life)

    @property
    def settled(self) -> bool:
        """Whether every live replica serves and nothing drains."""
        return all(
            life.phase is ReplicaPhase.READY
            or (self._free and life.phase is ReplicaPhase.DRAINING)
            for life in self._alive()
        )

    def _alive(self) -> list[Life]:
        return [life for life in self.lives if life.end_s is None]

    def _start(self, spec: ReplicaSpec) -> None:
        alive = self._alive()
        if any(life.spec.id == spec.id for life in alive):
            return
        holders = [
            life for life in alive if not (self._free and life.phase is ReplicaPhase.DRAINING)
        ]
        taken = {device for life in holders for device in life.spec.devices}
        known = {device.id for device in self._devices}
        if not set(spec.devices) <= known or taken & set(spec.devices):
            raise ValueError(f"replica {spec.id} names a device that is taken or not there")
        now_s = self._clock.now()
        quick = self.warm or self._free
        load_s = 0.0 if quick else self._phases.load_s(self._simulator.source, spec.shape)
        self._simulator.add(self._fleet, spec, self._levers, ready_at_s=now_s + load_s)
        self.lives.append(
            Life(
                spec=spec,
                start_s=now_s,
                since_s=now_s,
                phase=ReplicaPhase.READY if quick else ReplicaPhase.LOADING,
            )
        )

    def _stop(self, life: Life) -> None:
        self._fleet.remove(life.spec.id, replay=True)
        life.phase, life.since_s = ReplicaPhase.GONE, self._clock.now()
        life.end_s = life.since_s
