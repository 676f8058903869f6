"""What every implementation of the cluster API promises: one suite, simulated and real."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from oserve.control.cluster import Cluster
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    CommitReplicas,
    DeploymentPlan,
    Device,
    DrainReplica,
    LengthClass,
    Observation,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
    VirtualClock,
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher
from oserve.perf import TokenCosts
from oserve.sim import SimulatedCluster
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.steps import StepTables
from oserve.sim.types import RequestTable

pytestmark = pytest.mark.asyncio(loop_scope="session")

CORES = len(os.sched_getaffinity(0))
DEVICES = tuple(Device(id=f"cpu:{n}", kind="cpu", cores=(n % CORES,)) for n in range(2))
_LIMIT_S = 120.0


def spec(name: str, *devices: str) -> ReplicaSpec:
    shape = ReplicaShape(
        precision=Precision.FP32, max_num_seqs=4, tensor_parallel_size=len(devices)
    )
    return ReplicaSpec(id=name, shape=shape, devices=devices)


@dataclass
class Subject:
    """A cluster, how to let time pass on it, and how to make a replica crash or hang."""

    cluster: Cluster
    clock: VirtualClock | LiveClock
    wait: Callable[[float], Awaitable[None]]
    crash: Callable[[str], Awaitable[None]]
    hang: Callable[[str], Awaitable[None]]

    async def until(self, condition: Callable[[Observation], bool]) -> Observation:
        deadline_s = time.monotonic() + _LIMIT_S
        while not condition(observation := await self.cluster.observe()):
            assert time.monotonic() < deadline_s, observation
            await self.wait(0.2)
        return observation

    async def phase(self, name: str, phase: ReplicaPhase) -> Observation:
        def reached(observation: Observation) -> bool:
            found = [s for s in observation.replicas if s.spec.id == name]
            return bool(found) and found[-1].phase is phase

        return await self.until(reached)


def fleet_cluster(clock: VirtualClock) -> FleetCluster:
    """A fleet with one long request on its way, so that draining takes time."""
    shape = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=4)
    steps = np.full(65, 10**10, dtype=np.int64)
    tables = StepTables(prompts=steps, joint=steps[:5], decodes=steps[:5], kv_rate=0, pair_rate=0)
    fleet = SimulatedFleet(RequestTable.of([0.0], [10], [100]))

    def add(spec: ReplicaSpec, ready_at_s: float) -> None:
        fleet.add_replica(
            spec.id,
            shape,
            tables,
            kv_tokens=1024,
            costs=TokenCosts(prefill_s_per_token=1e-3, decode_s_per_token=1e-3),
            ready_at_s=ready_at_s,
        )

    return FleetCluster(fleet, add, DEVICES, clock)


@pytest.fixture(params=["simulated", "fleet", pytest.param("local", marks=pytest.mark.engine)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def real(request: pytest.FixtureRequest, kind: str) -> tuple[Path, Launcher] | None:
    """A model, and what starts engines of it, for the kind that has any."""
    if kind != "local":
        return None
    return request.getfixturevalue("tiny_model"), request.getfixturevalue("zygote")


@pytest_asyncio.fixture(loop_scope="session")
async def subject(
    kind: str, real: tuple[Path, Launcher] | None, tmp_path: Path
) -> AsyncIterator[Subject]:
    if real is None:
        virtual = VirtualClock()
        simulated = SimulatedCluster(DEVICES, virtual)
        if kind == "fleet":
            simulated = fleet_cluster(virtual)

        async def crash_simulated(name: str) -> None:
            simulated.crash(name)

        async def hang_simulated(name: str) -> None:
            simulated.hang(name)

        yield Subject(simulated, virtual, virtual.advance, crash_simulated, hang_simulated)
        return
    model, launcher = real
    clock = LiveClock()
    local = EngineCluster(
        DEVICES,
        model=str(model),
        served_model_name="tiny",
        run_dir=tmp_path / "run",
        clock=clock,
        settings=EngineSettings(max_model_len=1024, hang_after_s=4.0),
        launcher=launcher,
    )

    async def signalled(name: str, number: int) -> None:
        state = (await local.observe()).replica(name)
        assert state is not None
        os.kill(state.pid, number)

    async def crash_local(name: str) -> None:
        await signalled(name, signal.SIGKILL)

    async def hang_local(name: str) -> None:
        await signalled(name, signal.SIGSTOP)

    yield Subject(local, clock, asyncio.sleep, crash_local, hang_local)
    await local.close()


async def test_the_life_of_a_replica(subject: Subject) -> None:
    cluster = subject.cluster
    start = StartReplica(spec=spec("a", "cpu:0"))
    await cluster.apply(start)
    await subject.phase("a", ReplicaPhase.LOADING)
    # Asking twice is harmless, in every phase.
    await cluster.apply(start)
    observation = await subject.phase("a", ReplicaPhase.READY)
    assert [state.spec for state in observation.replicas] == [start.spec]
    assert observation.devices == DEVICES
    await cluster.apply(start)
    # No device is ever given twice, and none that is not there.
    with pytest.raises(ValueError, match=r"cpu:0|in use"):
        await cluster.apply(StartReplica(spec=spec("b", "cpu:0", "cpu:1")))
    with pytest.raises(ValueError, match=r"cpu:9|does not exist"):
        await cluster.apply(StartReplica(spec=spec("b", "cpu:9")))
    # What is unknown is nothing to drain or stop.
    await cluster.apply(DrainReplica(replica="unknown"))
    await cluster.apply(StopReplica(replica="unknown"))
    await cluster.apply(DrainReplica(replica="a"))
    await subject.phase("a", ReplicaPhase.DRAINING)
    await cluster.apply(DrainReplica(replica="a"))
    await cluster.apply(StopReplica(replica="a"))
    observation = await subject.phase("a", ReplicaPhase.GONE)
    assert observation.failures == {}
    await cluster.apply(StopReplica(replica="a"))
    # An unexpected exit is counted, and its devices are free again.
    await cluster.apply(StartReplica(spec=spec("c", "cpu:0")))
    await subject.phase("c", ReplicaPhase.READY)
    await subject.crash("c")
    observation = await subject.phase("c", ReplicaPhase.GONE)
    assert observation.failures["c"].count == 1
    assert observation.failures["c"].reason
    await cluster.apply(StartReplica(spec=spec("d", "cpu:0")))
    await subject.phase("d", ReplicaPhase.READY)
    # One that hangs is ended too, though it does not hear what it is told.
    await subject.hang("d")
    observation = await subject.phase("d", ReplicaPhase.GONE)
    assert observation.failures["d"].count == 1
    assert "hangs" in observation.failures["d"].reason
    await cluster.apply(StartReplica(spec=spec("e", "cpu:0")))
    await subject.phase("e", ReplicaPhase.READY)


async def test_standby_beside_others_until_it_is_committed(subject: Subject) -> None:
    cluster = subject.cluster
    await cluster.apply(StartReplica(spec=spec("a", "cpu:0")))
    await subject.phase("a", ReplicaPhase.READY)
    wide = StartReplica(spec=spec("wide", "cpu:0", "cpu:1"), standby=True)
    for _ in range(2):
        await cluster.apply(wide)
    # Two on standby do not share a device, and nothing else starts where one stands.
    for other in (
        StartReplica(spec=spec("b", "cpu:1"), standby=True),
        StartReplica(spec=spec("b", "cpu:1")),
    ):
        with pytest.raises(ValueError, match=r"cpu:1|in use"):
            await cluster.apply(other)
    with pytest.raises(ValueError, match="stand"):
        await cluster.apply(CommitReplicas(ready=("wide",), drain=("a",)))
    observation = await subject.phase("wide", ReplicaPhase.STANDBY)
    assert observation.replica("a") is not None
    commit = CommitReplicas(ready=("wide",), drain=("a", "unknown"))
    for _ in range(2):
        await cluster.apply(commit)
        observation = await cluster.observe()
        phases = {state.spec.id: state.phase for state in observation.replicas}
        assert phases == {"a": ReplicaPhase.DRAINING, "wide": ReplicaPhase.READY}
    await cluster.apply(StopReplica(replica="a"))
    await subject.phase("a", ReplicaPhase.GONE)


async def test_the_loop_moves_it_from_plan_to_plan(subject: Subject) -> None:
    def plan(name: str, *replicas: ReplicaSpec) -> DeploymentPlan:
        return DeploymentPlan(
            id=name,
            replicas=replicas,
            length_classes=(LengthClass(name="all"),),
            routing_shares={"all": {replicas[0].id: 1.0}},
        )

    async def settle(loop: ControlLoop) -> None:
        def settled(observation: Observation) -> bool:
            alive = [s for s in observation.replicas if s.phase is not ReplicaPhase.GONE]
            ready = all(state.phase is ReplicaPhase.READY for state in alive)
            return ready and {state.spec for state in alive} == set(loop.plan.replicas)

        deadline_s = time.monotonic() + _LIMIT_S
        while not settled(await subject.cluster.observe()):
            assert time.monotonic() < deadline_s
            await loop.step()
            await subject.wait(0.2)

    policy = ReconcilePolicy(drain_settle_s=0.5)
    first = plan("p1", spec("a", "cpu:0"), spec("b", "cpu:1"))
    loop = ControlLoop(subject.cluster, subject.clock, first, policy=policy)
    await settle(loop)
    await subject.crash("b")
    await subject.phase("b", ReplicaPhase.GONE)
    await settle(loop)
    loop.plan = plan("p2", spec("wide", "cpu:0", "cpu:1"))
    await settle(loop)
