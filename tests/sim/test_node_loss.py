"""Nodes are lost and come back under the real loop: no request is lost, no token made twice."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.loop import ControlLoop
from oserve.control.node_view import NodeView
from oserve.control.nodes import NodeBook, NodePolicy
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    Action,
    DeploymentPlan,
    Device,
    LengthClass,
    NodePhase,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    VirtualClock,
)
from oserve.perf import TokenCosts
from oserve.sim import Faults, Phases
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.phases import NodeLoss
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables
from oserve.sim.types import RequestTable, Status

NODES = 4
DEVICES = tuple(
    Device(id=f"n{node}/d{n}", kind="any", node=f"n{node}") for node in range(NODES) for n in (0, 1)
)
SHAPE = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=4)
WIDE = ReplicaShape(pipeline_parallel_size=2, max_num_batched_tokens=64, max_num_seqs=4)
HOLD_S = 20.0
POLICY = NodePolicy(hold_s=HOLD_S, max_hold_s=160.0)
ROUND_S = 0.5


def tables() -> StepTables:
    steps = np.full(65, int(0.01 * 1e12), dtype=np.int64)
    nothing = np.zeros(5, dtype=np.int64)
    return StepTables(prompts=steps, joint=nothing, decodes=steps[:5], kv_rate=0, pair_rate=0)


def plan() -> DeploymentPlan:
    """One replica on each device, but for one whose stages lie on two nodes."""
    across = ReplicaSpec(id="wide", shape=WIDE, devices=("n2/d1", "n3/d1"))
    single = [device.id for device in DEVICES if device.id not in across.devices]
    return DeploymentPlan(
        id="p",
        replicas=(
            across,
            *(ReplicaSpec(id=f"on-{name}", shape=SHAPE, devices=(name,)) for name in single),
        ),
        length_classes=(LengthClass(name="all"),),
        routing_shares={},
    )


@dataclass
class World:
    """A fleet on four nodes under the live loop; each round is kept."""

    losses: tuple[NodeLoss, ...]
    clock: VirtualClock = field(default_factory=VirtualClock)
    rounds: list[tuple[Observation, tuple[Action, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = 120
        arrivals = np.linspace(0.0, 60.0, count)
        self.outputs = [40 + 13 * (n % 30) for n in range(count)]
        self.fleet = SimulatedFleet(RequestTable.of(arrivals, [20] * count, self.outputs))
        self.cluster = FleetCluster(
            self.fleet,
            self._add,
            DEVICES,
            self.clock,
            phases=Phases(start_s=3.0),
            faults=Faults(node_losses=self.losses),
        )
        self.loop = ControlLoop(
            self.cluster,
            self.clock,
            plan(),
            policy=ReconcilePolicy(),
            observed=lambda seen, done: self.rounds.append((seen, done)),
            nodes=NodeView(NodeBook(POLICY)),
        )

    def _add(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        costs = TokenCosts(prefill_s_per_token=1e-3, decode_s_per_token=1e-3)
        self.fleet.add_replica(
            spec.id, SHAPE, tables(), kv_tokens=1024, costs=costs, ready_at_s=ready_at_s
        )

    async def play(self, until_s: float) -> FleetResults:
        while self.clock.now() < until_s:
            await self.loop.step()
            await self.clock.advance(ROUND_S)
        self.fleet.advance(until_s)
        return self.fleet.results()


def check(world: World, results: FleetResults) -> None:
    """Whatever happened to nodes: all is served once, and nothing starts where it must not."""
    assert (results.status == Status.COMPLETED).all()
    assert sum(total.generated_tokens for total in results.totals) == sum(world.outputs)
    for seen, actions in world.rounds:
        states = {state.name: state for state in seen.node_states}
        for state in seen.replicas:
            if state.phase is ReplicaPhase.READY:
                assert all(states[d.split("/")[0]].reachable for d in state.spec.devices)
        for action in actions:
            if isinstance(action, StartReplica):
                assert all(states[d.split("/")[0]].startable for d in action.spec.devices)


def served(world: World, at_s: float) -> set[str]:
    seen = next(seen for seen, _ in world.rounds if seen.now_s >= at_s)
    return {s.spec.id for s in seen.replicas if s.phase is ReplicaPhase.READY}


@pytest.mark.parametrize(("told_s", "noticed_s"), [(float("inf"), 5.5), (0.5, 1.0)])
def test_a_lost_node_leaves_at_once_and_is_taken_up_again(told_s: float, noticed_s: float) -> None:
    loss = NodeLoss(node="n2", at_s=10.0, back_s=40.0, told_after_s=told_s)
    world = World((loss,))
    results = asyncio.run(world.play(150.0))
    check(world, results)
    everything = {spec.id for spec in plan().replicas}
    gone = {"on-n2/d0", "wide"}
    assert served(world, 9.5) == everything
    assert served(world, 10.0 + noticed_s) == everything - gone
    # The node is back, but held down; then its replicas start again by themselves.
    assert served(world, 40.0 + HOLD_S - 1.0) == everything - gone
    assert served(world, 40.0 + HOLD_S + 5.0) == everything
    assert (results.replays > 0).any()


LOSSES = st.lists(
    st.builds(
        lambda node, at_s, away_s, told_s: NodeLoss(
            node=f"n{node}", at_s=at_s, back_s=at_s + away_s, told_after_s=told_s
        ),
        st.integers(0, NODES - 2),
        st.floats(4.0, 70.0),
        st.floats(1.0, 30.0),
        st.sampled_from((float("inf"), 0.7)),
    ),
    max_size=5,
)


@given(LOSSES)
@settings(deadline=None, max_examples=10)
def test_no_course_of_losses_loses_a_request_or_repeats_a_token(losses: list[NodeLoss]) -> None:
    # Node n3 stays, so that there is always a place to go on.
    world = World(tuple(losses))
    check(world, asyncio.run(world.play(130.0)))


async def test_a_cordoned_node_serves_on_and_a_draining_one_empties() -> None:
    world = World(())
    while world.clock.now() < 8.0:
        await world.loop.step()
        await world.clock.advance(ROUND_S)
    world.loop.nodes.book.cordon("n0")
    world.loop.nodes.book.drain("n1")
    world.loop.nodes.evacuated |= {"n1"}
    world.cluster.crash("on-n0/d0")
    results = await world.play(60.0)
    seen, _ = world.rounds[-1]
    states = {state.name: state.phase for state in seen.node_states}
    assert states["n0"] is NodePhase.CORDONED
    assert states["n1"] is NodePhase.DRAINING
    assert world.loop.nodes.on_node("n0", seen) == ["on-n0/d1"]
    assert world.loop.nodes.on_node("n1", seen) == []
    world.loop.nodes.book.uncordon("n0")
    world.loop.nodes.book.uncordon("n1")
    results = await world.play(120.0)
    check(world, results)
    assert served(world, world.rounds[-1][0].now_s) == {spec.id for spec in plan().replicas}
