"""The door to a fleet: starts take their phases, drains last, faults strike when they are due."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    VirtualClock,
)
from oserve.perf import TokenCosts
from oserve.sim import Faults, Phases, SimulatedCluster
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables
from oserve.sim.types import RequestTable, Status

DEVICES = tuple(Device(id=f"d{n}", kind="any") for n in range(3))
SHAPE = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=4)
STEP_S = 0.01


def tables() -> StepTables:
    steps = np.full(65, int(STEP_S * 1e12), dtype=np.int64)
    nothing = np.zeros(5, dtype=np.int64)
    return StepTables(prompts=steps, joint=nothing, decodes=steps[:5], kv_rate=0, pair_rate=0)


class World:
    """A fleet behind its door, on a clock, kept at a plan by the live loop."""

    def __init__(
        self, requests: RequestTable, *, phases: Phases, faults: Faults | None = None
    ) -> None:
        self.clock = VirtualClock()
        self.fleet = SimulatedFleet(requests)
        self.cluster = FleetCluster(
            self.fleet,
            self._add,
            DEVICES,
            self.clock,
            phases=phases,
            faults=faults,
            weights_bytes=lambda shape: 1e9 * shape.device_count,
        )

    def _add(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        costs = TokenCosts(prefill_s_per_token=1e-3, decode_s_per_token=1e-3)
        self.fleet.add_replica(
            spec.id, SHAPE, tables(), kv_tokens=1024, costs=costs, ready_at_s=ready_at_s
        )

    async def play(self, plans: list[tuple[float, DeploymentPlan]], until_s: float) -> FleetResults:
        """Rounds each half second; each plan is in force from its moment on."""
        policy = ReconcilePolicy(drain_settle_s=0.5)
        loop = ControlLoop(self.cluster, self.clock, plans[0][1], policy=policy)
        while self.clock.now() < until_s:
            loop.plan = [plan for at_s, plan in plans if at_s <= self.clock.now()][-1]
            await loop.step()
            await self.clock.advance(0.5)
        self.fleet.advance(until_s)
        return self.fleet.results()


def plan(*replicas: tuple[str, str]) -> DeploymentPlan:
    return DeploymentPlan(
        id="p",
        replicas=tuple(ReplicaSpec(id=n, shape=SHAPE, devices=(d,)) for n, d in replicas),
        length_classes=(LengthClass(name="all"),),
        routing_shares={},
    )


PHASES = Phases(start_s=1.0, read_bytes_per_s=1e9, warm_up_s=0.25)


def test_a_replica_serves_once_all_phases_are_over() -> None:
    world = World(RequestTable.of([0.0], [10], [3]), phases=PHASES)
    results = asyncio.run(world.play([(0.0, plan(("a", "d0")))], 5.0))
    # Not at the loop's next round but at the very moment.
    assert results.first_token_s[0] == pytest.approx(2.25 + STEP_S)


def test_a_draining_replica_keeps_its_devices_until_its_requests_end() -> None:
    world = World(RequestTable.of([0.0], [10], [400]), phases=Phases(start_s=0.0))
    results = asyncio.run(world.play([(0.0, plan(("a", "d0"))), (1.0, plan(("b", "d0")))], 20.0))
    first, second = world.cluster.lives
    assert results.status[0] == Status.COMPLETED
    assert results.replays[0] == 0
    assert first.end_s is not None
    assert second.start_s >= first.end_s >= float(results.finish_s[0])


def test_a_crash_strikes_at_its_moment_and_requests_start_over() -> None:
    world = World(
        RequestTable.of([0.0], [10], [400]),
        phases=PHASES,
        faults=Faults(crashes=((3.1, "a"),)),
    )
    results = asyncio.run(world.play([(0.0, plan(("a", "d0"), ("b", "d1")))], 20.0))
    served_first = results.replica_names[0]
    assert served_first == "a"
    assert results.status[0] == Status.COMPLETED
    assert results.replays[0] == 1
    again = [life for life in world.cluster.lives if life.spec.id == "a"]
    assert len(again) == 2


def test_a_replica_that_hangs_stands_still_until_it_is_ended() -> None:
    world = World(
        RequestTable.of([0.0, 4.0], [10, 10], [400, 400]),
        phases=PHASES,
        faults=Faults(hangs=((3.1, "a"),), hang_after_s=8.0),
    )
    results = asyncio.run(world.play([(0.0, plan(("a", "d0"), ("b", "d1")))], 40.0))
    assert (results.status == Status.COMPLETED).all()
    assert results.replays[0] == 1
    # What it had made by then is kept; the rest was made elsewhere, after it was found.
    assert results.finish_s[0] > 3.1 + 8.0
    assert results.totals[0].generated_tokens < 400
    again = [life for life in world.cluster.lives if life.spec.id == "a"]
    assert again[0].end_s == pytest.approx(11.1, abs=0.51)
    assert len(again) == 2


@pytest.mark.parametrize("seed", range(5))
def test_no_request_is_lost_under_all_faults_at_once(seed: int) -> None:
    arrivals = np.linspace(0.0, 20.0, 40)
    world = World(
        RequestTable.of(arrivals, [20] * 40, [30] * 40),
        phases=PHASES,
        faults=Faults(
            lost_action=0.2,
            repeated_action=0.2,
            failed_start=0.2,
            slow_start=0.3,
            stale_observation=0.3,
            crashes=((6.0, "a"), (9.0, "c")),
            hangs=((3.0, "b"), (12.0, "d")),
            hang_after_s=2.0,
            seed=seed,
        ),
    )
    plans = [
        (0.0, plan(("a", "d0"), ("b", "d1"))),
        (8.0, plan(("b", "d1"), ("c", "d0"), ("d", "d2"))),
        (15.0, plan(("e", "d0"), ("d", "d2"))),
    ]
    results = asyncio.run(world.play(plans, 200.0))
    assert (results.status == Status.COMPLETED).all()
    alive = {life.spec.id for life in world.cluster.lives if life.end_s is None}
    assert alive == {"d", "e"}
    for life in world.cluster.lives:
        for other in world.cluster.lives:
            if life is not other and set(life.spec.devices) & set(other.spec.devices):
                first, second = sorted((life, other), key=lambda item: item.start_s)
                assert first.end_s is not None
                assert first.end_s <= second.start_s


async def observed(cluster: SimulatedCluster, clock: VirtualClock, after_s: float) -> Observation:
    await clock.advance(after_s)
    return await cluster.observe()


async def test_slow_and_failed_starts() -> None:
    start = StartReplica(spec=plan(("a", "d0")).replicas[0])
    clock = VirtualClock()
    slow = SimulatedCluster(
        DEVICES, clock, phases=Phases(start_s=2.0), faults=Faults(slow_start=1.0, slow_factor=3.0)
    )
    await slow.apply(start)
    assert (await observed(slow, clock, 5.9)).replicas[0].phase is ReplicaPhase.LOADING
    assert (await observed(slow, clock, 0.2)).replicas[0].phase is ReplicaPhase.READY
    clock = VirtualClock()
    failing = SimulatedCluster(
        DEVICES, clock, phases=Phases(start_s=2.0), faults=Faults(failed_start=1.0)
    )
    await failing.apply(start)
    seen = await observed(failing, clock, 2.0)
    assert seen.replicas[0].phase is ReplicaPhase.GONE
    assert seen.failures["a"].count == 1


async def test_a_stale_observation_is_the_last_one() -> None:
    clock = VirtualClock()
    cluster = SimulatedCluster(DEVICES, clock, phases=Phases(start_s=1.0))
    await cluster.apply(StartReplica(spec=plan(("a", "d0")).replicas[0]))
    before = await cluster.observe()
    cluster.faults = replace(cluster.faults, stale_observation=1.0)
    assert await observed(cluster, clock, 5.0) is before
    # What follows from it may be impossible: then it is ignored.
    await cluster.apply(StartReplica(spec=plan(("b", "d0")).replicas[0]))
    cluster.faults = Faults()
    seen = await cluster.observe()
    assert [state.spec.id for state in seen.replicas] == ["a"]
    assert seen.replicas[0].phase is ReplicaPhase.READY
