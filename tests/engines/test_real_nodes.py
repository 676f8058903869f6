"""A real engine on another node: started, asked, watched and ended through a hatch alone."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from engines.test_real_engines import in_phase, replica, until
from hatches import RunningHatch, running_hatch
from oserve.core import Clock, Observation, ReplicaPhase, ReplicaState, StartReplica
from oserve.engines.cluster import EngineCluster
from oserve.engines.control import EngineControl
from oserve.engines.devices import split_cores
from oserve.engines.group import group_members
from oserve.engines.holding import HatchDial, HeldEngines
from oserve.engines.keeper import Keeper
from oserve.engines.probe import Probe
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


class World:
    """One node behind a hatch, and one server after another."""

    def __init__(self, hatch: RunningHatch, model: Path, folder: Path, clock: Clock) -> None:
        self.hatch = hatch
        self._model = model
        self._folder = folder
        self._clock = clock
        self.cluster: EngineCluster

    async def server(self) -> tuple[list[str], list[str]]:
        dial = HatchDial("far", self.hatch.address, clock=self._clock)
        devices = split_cores(sorted(os.sched_getaffinity(0)), 2)
        self.cluster = EngineCluster(
            tuple(replace(item, id=f"far/{item.id}", node="far") for item in devices),
            model=str(self._model),
            served_model_name="tiny",
            run_dir=self._folder / "server",
            clock=self._clock,
            settings=EngineSettings(),
            remote=[HeldEngines(dial, grace_s=600.0)],
        )
        return await self.cluster.adopt()

    async def ready(self, name: str) -> ReplicaState:
        """It serves, perhaps again."""

        def true(observation: Observation) -> bool:
            state = observation.replica(name)
            return state is not None and state.phase is ReplicaPhase.READY

        state = (await until(self.cluster, true)).replica(name)
        assert state is not None
        return state


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    tiny_model: Path, tmp_path: Path, live_clock: Clock, zygote: Launcher
) -> AsyncIterator[World]:
    base = Path(tempfile.mkdtemp(prefix="r"))
    async with running_hatch(base) as hatch:
        keeper = Keeper(
            folder=hatch.folder,
            registry=tmp_path / "keeper.json",
            launcher=zygote,
            identity="far",
            grace_s=600.0,
        )
        running = asyncio.create_task(keeper.run())
        while not (hatch.folder / "keeper.sock").exists():  # noqa: ASYNC110
            await asyncio.sleep(0)
        world = World(hatch, tiny_model, tmp_path, live_clock)
        yield world
        await world.cluster.close()
        keeper.stop(patient=False)
        await running
    shutil.rmtree(base)


async def test_an_engine_behind_a_hatch(world: World, tmp_path: Path) -> None:
    assert await world.server() == ([], [])
    await world.cluster.apply(StartReplica(spec=replica("a", "far/cpu:0")))
    state = await world.ready("a")
    assert state.endpoint.hatch == world.hatch.address
    assert state.endpoint.unix_socket == "a-1/api.sock"
    async with Probe(state.endpoint, timeout_s=30) as probe:
        assert await probe.complete("tiny", "Hello", 8, 30)
        assert await probe.load() is not None
        assert await probe.alive()
    async with EngineControl(state.endpoint) as control:
        text = await control.complete("tiny", [5] * 8, 8, 30.0)
    # The connection breaks: the replica is gone, its engine is not, and is taken up again.
    world.cluster.nodes.lose("far", "the cable is out")
    gone = await until(world.cluster, in_phase(ReplicaPhase.GONE, "a"))
    assert gone.replicas[0].detail == "node far is lost: the cable is out"
    back = await world.ready("a")
    assert (back.pid, back.since_s) == (state.pid, state.since_s)
    async with EngineControl(back.endpoint) as control:
        assert await control.complete("tiny", [5] * 8, 8, 30.0) == text
    # What it does is asked of its node, and so is why it ended.
    process = next(iter(world.cluster.nodes.all()[1].keeper.engines().values()))  # type: ignore[attr-defined]
    activity = await process.activity()
    assert activity is not None
    assert activity.work_s > 0.1
    assert "Application startup complete" in (tmp_path / "a.log").read_text()
    os.kill(state.pid, signal.SIGKILL)
    gone = await until(world.cluster, in_phase(ReplicaPhase.GONE, "a"))
    assert gone.failures["a"].reason == "ended by SIGKILL"
    assert group_members(state.pid) == []
    assert not (world.hatch.folder / "a-1").exists()


async def test_an_engine_that_hangs_behind_a_hatch(world: World) -> None:
    await world.server()
    world.cluster._settings = EngineSettings(hang_after_s=8.0)
    await world.cluster.apply(StartReplica(spec=replica("a", "far/cpu:0")))
    state = await world.ready("a")
    os.kill(state.pid, signal.SIGSTOP)
    gone = await until(world.cluster, in_phase(ReplicaPhase.GONE, "a"))
    # That a process is stopped is seen on its node alone.
    assert "a process of it has been stopped" in gone.failures["a"].reason
    assert group_members(state.pid) == []
