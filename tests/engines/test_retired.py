"""Retired replicas end their processes: no engine is kept with its memory and its context."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engines.test_cluster import FakeProbe
from oserve.control.energy import held_devices
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    LengthClass,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import split_cores
from oserve.engines.group import group_members
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import SpawnLauncher

# Like vLLM: a leader, and a worker that ignores TERM.
SERVER = """
import subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", worker])
time.sleep(600)
"""
SHAPE = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=2)


class WellProbe(FakeProbe):
    """Its engine serves at once, and is idle."""

    async def healthy(self) -> bool:
        self.well = True
        return True

    async def load(self) -> None:
        return None


def plan(*names: str) -> DeploymentPlan:
    replicas = tuple(
        ReplicaSpec(id=name, shape=SHAPE, devices=(f"cpu:{index}",))
        for index, name in enumerate(names)
    )
    return DeploymentPlan(
        id="-".join(names),
        replicas=replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={},
    )


class World:
    """A cluster of stand-in engines in real processes, kept at a plan by the live loop."""

    def __init__(self, folder: Path) -> None:
        settings = EngineSettings(stop_grace_s=5.0, log_dir=str(folder), kv_cache_memory_bytes=1)
        self.cluster = EngineCluster(
            split_cores([0], 2),
            model="tiny",
            served_model_name="tiny",
            run_dir=folder,
            clock=LiveClock(),
            settings=settings,
            launcher=SpawnLauncher((sys.executable, "-c", SERVER)),
            probe=WellProbe,
        )
        policy = ReconcilePolicy(drain_settle_s=0.0)
        self.loop = ControlLoop(self.cluster, LiveClock(), plan("a", "b"), policy=policy)

    async def phases(self) -> dict[str, ReplicaPhase]:
        observation = await self.cluster.observe()
        return {state.spec.id: state.phase for state in observation.replicas}

    async def until(
        self, done: Callable[[dict[str, ReplicaPhase]], bool], *, loop: bool = True
    ) -> None:
        async with asyncio.timeout(30):
            while not done(await self.phases()):
                if loop:
                    await self.loop.step()
                await asyncio.sleep(0.02)

    async def leader(self, name: str) -> int:
        """The process that leads an engine's two."""
        state = (await self.cluster.observe()).replica(name)
        assert state is not None, f"{name} is gone"
        async with asyncio.timeout(30):
            while len(group_members(state.pid)) < 2:  # noqa: ASYNC110 - it looks at processes
                await asyncio.sleep(0.02)
        return state.pid


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.cluster.close()


def ready(*names: str) -> Callable[[dict[str, ReplicaPhase]], bool]:
    return lambda phases: all(phases.get(name) is ReplicaPhase.READY for name in names)


async def test_a_smaller_plan_leaves_no_process_of_what_it_retires(world: World) -> None:
    await world.until(ready("a", "b"))
    kept, retired = await world.leader("a"), await world.leader("b")
    world.loop.plan = plan("a")
    await world.until(lambda phases: phases["b"] is ReplicaPhase.GONE)
    # Gone means gone: only now are its devices free, and counted as idle.
    assert group_members(retired) == []
    assert held_devices(await world.cluster.observe()) == {"cpu:0"}
    assert len(group_members(kept)) == 2


async def test_a_standby_that_no_switch_holds_ends(world: World) -> None:
    world.loop.plan = plan("a")
    await world.until(ready("a"))
    spare = ReplicaSpec(id="s", shape=SHAPE, devices=("cpu:1",))
    await world.cluster.apply(StartReplica(spec=spare, standby=True))
    await world.until(lambda phases: phases["s"] is ReplicaPhase.STANDBY, loop=False)
    pid = await world.leader("s")
    await world.until(lambda phases: phases["s"] is ReplicaPhase.GONE)
    assert group_members(pid) == []
