"""Real engines on two nodes: weights move from one to the other, through the nodes' hatches."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from engines.stage import LIMIT_S, Stage, plan_of, replica, staged
from hatches import RunningHatch, running_hatch
from oserve.core import Clock
from oserve.engines.devices import split_cores
from oserve.engines.holding import HatchDial, HeldEngines
from oserve.engines.keeper import Keeper
from oserve.engines.spawner import Launcher
from oserve.nodes.hatch_messages import HatchReport, ReportQuery, ask_hatch

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

HERE = plan_of("here", replica("a", "near/cpu:0"))
THERE = plan_of("there", replica("w", "far/cpu:0", "far/cpu:1", tp=2))
BACK = plan_of("back", replica("c", "near/cpu:1"))


class World:
    """Two nodes, each a keeper behind a hatch."""

    def __init__(self, stage: Stage, hatches: dict[str, RunningHatch]) -> None:
        self.stage = stage
        self._hatches = hatches

    async def sent(self, node: str, other: str) -> int:
        """Bytes of weights that a node's ranks have sent to another node."""
        report = await ask_hatch(self._hatches[node].address, ReportQuery())
        assert isinstance(report, HatchReport)
        return report.sent_bytes.get(other, 0)


@contextlib.asynccontextmanager
async def keeping(hatch: RunningHatch, registry: Path, launcher: Launcher) -> AsyncIterator[None]:
    keeper = Keeper(
        folder=hatch.folder,
        registry=registry,
        launcher=launcher,
        identity=registry.stem,
        grace_s=600.0,
    )
    running = asyncio.create_task(keeper.run())
    while not (hatch.folder / "keeper.sock").exists():  # noqa: ASYNC110
        await asyncio.sleep(0)
    yield
    keeper.stop(patient=False)
    await running


@pytest_asyncio.fixture(loop_scope="session")
async def world(
    tiny_model: Path, tmp_path: Path, live_clock: Clock, zygote: Launcher
) -> AsyncIterator[World]:
    base = Path(tempfile.mkdtemp(prefix="r"))
    slots = split_cores(sorted(os.sched_getaffinity(0)), 2)
    async with contextlib.AsyncExitStack() as stack:
        hatches = {
            name: await stack.enter_async_context(running_hatch(base)) for name in ("near", "far")
        }
        hatches["near"].knows(far=hatches["far"])
        hatches["far"].knows(near=hatches["near"])
        for name, hatch in hatches.items():
            await stack.enter_async_context(keeping(hatch, tmp_path / f"{name}.json", zygote))
        stage = await stack.enter_async_context(
            staged(
                tiny_model,
                tmp_path / "server",
                HERE,
                {},
                zygote,
                devices=tuple(
                    replace(slot, id=f"{name}/{slot.id}", node=name)
                    for name in hatches
                    for slot in slots
                ),
                remote=[
                    HeldEngines(HatchDial(name, hatch.address, clock=live_clock), grace_s=600.0)
                    for name, hatch in hatches.items()
                ],
            )
        )
        yield World(stage, hatches)
    shutil.rmtree(base)


async def test_weights_move_to_another_node_and_back(world: World) -> None:
    stage = world.stage
    report = await stage.switch(THERE)
    assert report.state == "done", report
    await stage.at("w")
    assert await stage.answers("w") == stage.reference
    # They came by the hatches, each byte once.
    assert 0 < report.moved_bytes <= await world.sent("near", "far") < 1.1 * report.moved_bytes
    report = await stage.switch(BACK)
    assert report.state == "done", report
    await stage.at("c")
    assert await stage.answers("c") == stage.reference
    # The node of the target is lost in the middle: what serves has not noticed.
    switcher, report = stage.begin(THERE, bytes_per_s=100_000.0)
    async with asyncio.timeout(LIMIT_S):
        while not report.moved_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    stage.cluster.nodes.lose("far", "the cable is out")
    await stage.finished(switcher, report)
    assert report.state == "rolled_back"
    assert "node far is lost" in report.reason
    await stage.at("c")
    assert await stage.answers("c") == stage.reference
