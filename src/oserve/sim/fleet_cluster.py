"""The cluster API over a fleet: actions of a controller change replicas that serve requests.

A replica takes requests as soon as it has loaded, or is committed, and drains as long as its
requests run. The fleet advances to the clock whenever the cluster is observed or acted upon.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from oserve.core import (
    Action,
    Clock,
    Device,
    EngineWork,
    Observation,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
)
from oserve.sim.cluster import SimulatedCluster
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.phases import Faults, Phases
from oserve.sim.types import ReplicaObservation

Add = Callable[[ReplicaSpec, float], None]
"""Adds a replica to the fleet, ready at a time in seconds."""

# Practically never, in the fleet's picoseconds.
_NEVER_S = 4e6


class FleetCluster(SimulatedCluster):
    """A ``SimulatedCluster`` whose replicas are those of ``fleet``; ``add`` adds one to it.

    ``moves_after_s``: the drain limit, after which requests migrate with the tokens that they have,
    as in the gateway.
    """

    def __init__(
        self,
        fleet: SimulatedFleet,
        add: Add,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        phases: Phases | None = None,
        weights_bytes: Callable[[ReplicaShape], float] = lambda _: 0.0,
        stable_s: float = 60.0,
        faults: Faults | None = None,
        overlapping: bool = False,
        moves_after_s: float = math.inf,
    ) -> None:
        super().__init__(
            devices,
            clock,
            phases=phases,
            weights_bytes=weights_bytes,
            stable_s=stable_s,
            faults=faults,
            overlapping=overlapping,
        )
        self._fleet = fleet
        self._add = add
        self._moves_after_s = moves_after_s
        self._draining: dict[str, float] = {}
        self._serving: dict[str, ReplicaObservation] = {}

    async def observe(self) -> Observation:
        """Process all due events, then observe."""
        self.catch_up(self._clock.now())
        self._serving = {item.name: item for item in self._fleet.observe().replicas}
        return await super().observe()

    async def apply(self, action: Action) -> None:
        """Execute an action at the clock's time."""
        self.catch_up(self._clock.now())
        await super().apply(action)

    def on_advance(self, now_s: float) -> None:
        """Migrate requests of replicas that reach the drain limit, each at its time."""
        due = sorted(
            (since_s + self._moves_after_s, name) for name, since_s in self._draining.items()
        )
        for at_s, name in due:
            if at_s <= now_s:
                self._fleet.advance(at_s)
                self._fleet.remove(name)
                del self._draining[name]
        self._fleet.advance(now_s)

    def on_start(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        """Add it to the fleet."""
        self._add(spec, min(ready_at_s, _NEVER_S))

    def on_commit(self, name: str) -> None:
        """Make the fleet's replica ready now."""
        self._fleet.serve(name)

    def on_drain(self, name: str) -> None:
        """Let the fleet's replica drain."""
        self._fleet.drain(name)
        self._draining[name] = self._clock.now()

    def on_hang(self, name: str) -> None:
        """Make the fleet's replica hang."""
        self._fleet.hang(name)

    def on_end(self, name: str) -> None:
        """Remove the fleet's replica; its requests start over elsewhere or are lost."""
        self._draining.pop(name, None)
        self._fleet.remove(name, replay=self.faults.replay)

    def observed(self, state: ReplicaState) -> ReplicaState:
        """Add the fleet's load of a replica."""
        item = self._serving.get(state.spec.id)
        if item is None:
            return state
        return replace(
            state,
            running=item.running,
            # A transfer between replicas still needs both.
            waiting=max(item.waiting, item.inflight - item.running),
            kv_cache_usage=item.kv_usage,
            work=_work(item, state.spec),
        )


def _work(item: ReplicaObservation, spec: ReplicaSpec) -> EngineWork:
    """Return work as an engine counts it: each step passes every pipeline stage."""
    return EngineWork(
        steps=item.steps,
        prompt_tokens=item.prompt_tokens,
        prompts=item.prompts,
        output_tokens=item.generated_tokens,
        gaps=item.steps,
        gap_s=item.busy_s * spec.shape.pipeline_parallel_size,
    )
