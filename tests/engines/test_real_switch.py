"""Real vLLM engines give their weights to others: any layout to any, all or nothing."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.stage import LIMIT_S, Stage, plan_of, replica, staged
from oserve.core import Precision, StartReplica, StopReplica
from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.spawner import Launcher

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

SINGLES = plan_of("singles", replica("a", "cpu:0"), replica("b", "cpu:1"))
WIDE = plan_of("wide", replica("w", "cpu:0", "cpu:1", tp=2))
DEEP = plan_of("deep", replica("p", "cpu:0", "cpu:1", pp=2))
MIXED = plan_of(
    "mixed",
    replica("t", "cpu:0", "cpu:1", tp=2),
    replica("i", "cpu:2", precision=Precision.INT8),
)
OTHER = plan_of(
    "other",
    replica("i2", "cpu:0", "cpu:1", tp=2, precision=Precision.INT8),
    replica("f2", "cpu:2", "cpu:3", pp=2),
)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def stage(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Launcher
) -> AsyncIterator[Stage]:
    int8 = make_int8_variant(tiny_model, tiny_model.parent / "tiny-int8")
    folder = tmp_path_factory.mktemp("switch")
    async with staged(tiny_model, folder, SINGLES, {"int8": str(int8)}, zygote) as stage:
        yield stage


async def test_layouts_of_one_precision(stage: Stage) -> None:
    """Tokens are those of engines that were loaded from disk, in every layout."""
    await stage.reset(SINGLES)
    report = await stage.switch(WIDE)
    assert report.state == "done", report
    await stage.at("w")
    assert await stage.answers("w") == stage.reference
    report = await stage.switch(SINGLES)
    assert report.state == "done", report
    await stage.at("a", "b")
    assert await stage.answers("b") == stage.reference
    report = await stage.switch(DEEP)
    assert report.state == "done", report
    assert report.moved_bytes > 0
    await stage.at("p")
    assert await stage.answers("p") == stage.reference
    assert [entry.phase for entry in report.phases] == [
        *("prepare", "transfer", "verify", "commit", "drain", "done")
    ]


async def test_int8_is_made_on_the_way_and_layouts_mix(stage: Stage) -> None:
    """From fp32 alone to fp32 and int8, and on to others of both; int8 is that of the disk."""
    await stage.reset(SINGLES)
    report = await stage.switch(MIXED)
    assert report.state == "done", report
    await stage.at("t", "i")
    assert await stage.answers("t") == stage.reference
    made = await stage.answers("i")
    loaded = replica("disk", "cpu:3", precision=Precision.INT8)
    stage.loop.held = frozenset({"disk"})
    await stage.cluster.apply(StartReplica(spec=loaded))
    await stage.at("t", "i", "disk")
    assert made == await stage.answers("disk")
    await stage.cluster.apply(StopReplica(replica="disk"))
    await stage.at("t", "i")
    stage.loop.held = frozenset()
    report = await stage.switch(OTHER)
    assert report.state == "done", report
    await stage.at("i2", "f2")
    assert await stage.answers("f2") == stage.reference


async def test_a_source_or_a_target_that_dies_leaves_the_old_plan(stage: Stage) -> None:
    await stage.reset(OTHER)
    for victim in ("f2", "s"):
        plan = plan_of("late", replica("s", "cpu:0"))
        switcher, report = stage.begin(plan, bytes_per_s=100_000.0)
        async with asyncio.timeout(LIMIT_S):
            while not report.moved_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        os.kill((await stage.state(victim)).pid, signal.SIGKILL)
        await stage.finished(switcher, report)
        assert report.state == "rolled_back"
        assert victim in report.reason
        assert stage.settled[-1] == ("other", report.reason)
        # What was killed comes back from disk; nothing else was touched.
        await stage.at("i2", "f2")
        assert await stage.answers("f2") == stage.reference


async def test_a_transfer_that_stalls_ends_at_its_limit(stage: Stage) -> None:
    await stage.reset(OTHER)
    plan = plan_of("never", replica("s", "cpu:0"))
    report = await stage.switch(plan, bytes_per_s=1000.0, transfer_limit_s=1.0)
    assert report.state == "rolled_back"
    assert "deadline" in report.reason or "longer" in report.reason
    await stage.at("i2", "f2")
    assert await stage.answers("f2") == stage.reference
    # The engines are none the worse for it.
    report = await stage.switch(plan)
    assert report.state == "done", report
    await stage.at("s")
    assert await stage.answers("s") == stage.reference


async def test_bf16_makes_int8(stage: Stage) -> None:
    """By way of bf16, itself made of fp32: both are those of the disk."""
    await stage.reset(SINGLES)
    for name, precision in (("h", Precision.BF16), ("e", Precision.INT8)):
        report = await stage.switch(plan_of(name, replica(name, "cpu:0", precision=precision)))
        assert report.state == "done", report
        await stage.at(name)
        loaded = replica("disk", "cpu:3", precision=precision)
        stage.loop.held = frozenset({"disk"})
        await stage.cluster.apply(StartReplica(spec=loaded))
        await stage.at(name, "disk")
        assert await stage.answers(name) == await stage.answers("disk")
        await stage.cluster.apply(StopReplica(replica="disk"))
        await stage.at(name)
        stage.loop.held = frozenset()
