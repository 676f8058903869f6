"""The door to a fleet: what the control loop asks for happens to replicas that serve requests.

A replica takes requests from the very moment it has loaded, whenever the loop looks next, and
drains as long as its requests run. Time is the fleet's: it catches up with the clock whenever the
cluster is looked at or acted upon.
"""

from collections.abc import Callable
from dataclasses import replace

from oserve.core import (
    Action,
    Clock,
    Device,
    EngineWork,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
)
from oserve.sim.cluster import SimulatedCluster
from oserve.sim.fleet import Fleet
from oserve.sim.phases import Faults, Phases
from oserve.sim.types import ReplicaObservation

Add = Callable[[ReplicaSpec, float], None]
"""Adds a replica to the fleet, ready at a moment in seconds."""

# As good as never, in the fleet's picoseconds.
_NEVER_S = 4e6


class FleetCluster(SimulatedCluster):
    """A ``SimulatedCluster`` whose replicas are those of ``fleet``; ``add`` puts one into it."""

    def __init__(
        self,
        fleet: Fleet,
        add: Add,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        phases: Phases | None = None,
        weights_bytes: Callable[[ReplicaShape], float] = lambda _: 0.0,
        stable_s: float = 60.0,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(
            devices,
            clock,
            phases=phases,
            weights_bytes=weights_bytes,
            stable_s=stable_s,
            faults=faults,
        )
        self._fleet = fleet
        self._add = add

    async def apply(self, action: Action) -> None:
        """Do as asked, at the clock's time."""
        self.catch_up(self._clock.now())
        await super().apply(action)

    def _come_up(self, now_s: float) -> None:
        self._fleet.advance(now_s)
        super()._come_up(now_s)

    def _began(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        self._add(spec, min(ready_at_s, _NEVER_S))

    def _committed(self, name: str) -> None:
        raise ValueError(f"the fleet cannot put {name} to work once it stands by")

    def _drains(self, name: str) -> None:
        self._fleet.drain(name)

    def _hangs(self, name: str) -> None:
        self._fleet.hang(name)

    def _ended(self, name: str) -> None:
        self._fleet.remove(name, replay=self.faults.replay)

    def _seen(self) -> Observation:
        observation = super()._seen()
        serving = {item.name: item for item in self._fleet.observe().replicas}
        states = []
        for state in observation.replicas:
            item = serving.get(state.spec.id)
            if item is not None and state.phase is not ReplicaPhase.GONE:
                states.append(
                    replace(
                        state,
                        running=item.running,
                        # What is on its way between replicas still needs both.
                        waiting=max(item.waiting, item.inflight - item.running),
                        kv_cache_usage=item.kv_usage,
                        work=_work(item, state.spec),
                    )
                )
            else:
                states.append(state)
        return replace(observation, replicas=tuple(states))


def _work(item: ReplicaObservation, spec: ReplicaSpec) -> EngineWork:
    """As an engine counts it: each step goes through every pipeline stage."""
    return EngineWork(
        steps=item.steps,
        prompt_tokens=item.prompt_tokens,
        prompts=item.prompts,
        output_tokens=item.generated_tokens,
        gaps=item.steps,
        gap_s=item.busy_s * spec.shape.pipeline_parallel_size,
    )
