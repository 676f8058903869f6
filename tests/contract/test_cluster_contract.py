"""What every implementation of the cluster API promises: one suite, simulated and real.

Real clusters run vLLM on this machine; or fake engines that keepers hold, on this machine or on two
nodes behind hatches.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from engines.test_cluster import FakeProbe
from hatches import running_hatch
from keepers import FakeNode
from oserve.control.cluster import Cluster
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    CommitReplicas,
    DeploymentPlan,
    Device,
    DrainReplica,
    Endpoint,
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
from oserve.engines.holding import HatchDial, HeldEngines, KeeperPlace, LocalDial
from oserve.engines.probe import EngineLoad
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
_LIMIT_S = 300.0


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
    devices: tuple[Device, ...] = DEVICES

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


class WellProbe(FakeProbe):
    """Its engine serves at once, and is idle."""

    async def healthy(self) -> bool:
        self.well = True
        return True

    async def load(self) -> EngineLoad:
        self.computed += self.core.is_set()
        return EngineLoad(tokens=self.computed)


class Kept:
    """A cluster whose fake engines are held by keepers: its own, or those of two nodes."""

    def __init__(self, folder: Path) -> None:
        self.clock = VirtualClock()
        self.nodes: list[FakeNode] = []
        self.probes: dict[str, WellProbe] = {}
        self._folder = folder

    def node(self, name: str, run: Path, identity: str = "") -> FakeNode:
        self.nodes.append(FakeNode(name, self._folder, self.clock, run, identity))
        return self.nodes[-1]

    async def subject(
        self, devices: tuple[Device, ...], keeper: HeldEngines | None, *remote: HeldEngines
    ) -> Subject:
        for node in self.nodes:
            await node.begun()
        self.cluster = EngineCluster(
            devices,
            model="some/model",
            served_model_name="tiny",
            run_dir=self._folder,
            clock=self.clock,
            settings=EngineSettings(kv_cache_memory_bytes=1 << 20, hang_after_s=4.0),
            keeper=keeper,
            remote=remote,
            probe=self._probe,
        )
        if keeper is not None:
            await keeper.connect()
        assert await self.cluster.adopt() == ([], [])
        return Subject(self.cluster, self.clock, self._wait, self._crash, self._hang, devices)

    def _probe(self, endpoint: Endpoint) -> WellProbe:
        self.probes[Path(endpoint.unix_socket).parent.name] = probe = WellProbe(endpoint)
        return probe

    async def _wait(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        for _ in range(20):
            await asyncio.sleep(0)

    async def _engine(self, replica: str) -> str:
        state = (await self.cluster.observe()).replica(replica)
        assert state is not None
        return Path(state.endpoint.unix_socket).parent.name

    async def _crash(self, replica: str) -> None:
        engine = await self._engine(replica)
        next(node for node in self.nodes if engine in node.keeper._children).crash(engine)

    async def _hang(self, replica: str) -> None:
        self.probes[await self._engine(replica)].core.clear()

    async def close(self) -> None:
        closing = asyncio.create_task(self.cluster.close())
        while not closing.done():
            await self._wait(0.1)
        for node in self.nodes:
            await node.close()


@contextlib.asynccontextmanager
async def kept(folder: Path) -> AsyncIterator[Subject]:
    """The engines of this machine's keeper."""
    kept, run = Kept(folder), Path(tempfile.mkdtemp(prefix="k"))
    place = KeeperPlace(
        folder=run, state_dir=folder / "local", log_dir=folder, method="spawn", grace_s=600.0
    )
    kept.node("local", run, place.identity)
    yield await kept.subject(DEVICES, HeldEngines(LocalDial(place), grace_s=600.0))
    await kept.close()


@contextlib.asynccontextmanager
async def hatches(folder: Path) -> AsyncIterator[Subject]:
    """Two nodes, each reached through its hatch alone."""
    kept, base = Kept(folder), Path(tempfile.mkdtemp(prefix="h"))
    async with running_hatch(base) as one, running_hatch(base) as two:
        remote = []
        for name, hatch in (("one", one), ("two", two)):
            kept.node(name, hatch.folder)
            # The clock is quicker than any wire: that a node is silent is tested elsewhere.
            dial = HatchDial(name, hatch.address, clock=kept.clock, silence_s=1e6)
            remote.append(HeldEngines(dial, grace_s=600.0))
        devices = tuple(replace(device, node="one") for device in DEVICES)
        other = Device(id="cpu:2", kind="cpu", node="two", cores=(0,))
        yield await kept.subject((*devices, other), None, *remote)
        await kept.close()
    shutil.rmtree(base)


@pytest.fixture(
    params=[
        "simulated",
        "fleet",
        "kept",
        "hatches",
        pytest.param("local", marks=pytest.mark.engine),
    ]
)
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
    if kind in {"kept", "hatches"}:
        async with {"kept": kept, "hatches": hatches}[kind](tmp_path) as made:
            yield made
        return
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
        settings=EngineSettings(max_model_len=1024, hang_after_s=8.0),
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
    assert observation.devices == subject.devices
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
