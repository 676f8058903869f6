"""Real vLLM engines give their weights to others: any layout to any, all or nothing."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from oserve.app.clock import LiveClock
from oserve.app.switching.drive import Report
from oserve.app.switching.prices import switch_facts
from oserve.app.switching.switcher import Switcher, SwitcherFacts
from oserve.config.settings import Settings, SwitchSettings
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    LengthClass,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartReplica,
    StopReplica,
)
from oserve.engines.cluster import LocalCluster
from oserve.engines.control import EngineControl
from oserve.engines.devices import split_cores
from oserve.engines.settings import EngineSettings
from oserve.engines.tiny import make_int8_variant

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LIMIT_S = 150.0
PROMPTS = [[5] * 20, [72, 101, 108] * 9, list(range(60, 120)), [90] * 100]


def replica(
    name: str, *devices: str, tp: int = 1, pp: int = 1, precision: Precision = Precision.FP32
) -> ReplicaSpec:
    shape = ReplicaShape(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=precision,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    )
    return ReplicaSpec(id=name, shape=shape, devices=devices)


def plan_of(name: str, *replicas: ReplicaSpec) -> DeploymentPlan:
    return DeploymentPlan(
        id=name,
        replicas=replicas,
        workload_types=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1.0 / len(replicas) for spec in replicas}},
    )


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


@dataclass
class Stage:
    """A cluster kept at a plan, and a switcher."""

    cluster: LocalCluster
    loop: ControlLoop
    facts: SwitcherFacts
    settled: list[tuple[str, str]] = field(default_factory=list)
    reference: list[str] = field(default_factory=list)

    async def state(self, name: str) -> ReplicaState:
        state = (await self.cluster.observe()).replica(name)
        assert state is not None, name
        return state

    async def until(self, true: Callable[[Mapping[str, ReplicaPhase]], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while True:
                states = (await self.cluster.observe()).replicas
                alive = {s.spec.id: s.phase for s in states if s.phase is not ReplicaPhase.GONE}
                if true(alive):
                    return
                await asyncio.sleep(0.05)

    async def at(self, *names: str) -> None:
        """These serve, and no others are there."""
        await self.until(lambda alive: alive == dict.fromkeys(names, ReplicaPhase.READY))

    async def switch(self, plan: DeploymentPlan, **settings: float) -> Report:
        return await self.finished(*self.begin(plan, **settings))

    def begin(self, plan: DeploymentPlan, **settings: float) -> tuple[Switcher, Report]:
        facts = self.facts
        if settings:
            limits = SwitchSettings(**settings)  # type: ignore[arg-type]
            facts = SwitcherFacts(
                **{
                    name: getattr(facts, name)
                    for name in facts.__dataclass_fields__
                    if name != "settings"
                },
                settings=Settings(**{**_fields(facts.settings), "switch": limits}),
            )
        switcher = Switcher(facts)
        return switcher, switcher.want(plan, "test")

    async def finished(self, switcher: Switcher, report: Report) -> Report:
        async with asyncio.timeout(LIMIT_S):
            while switcher.active:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert report.method == "transfer", report
        return report

    async def answers(self, name: str) -> list[str]:
        async with EngineControl((await self.state(name)).endpoint) as engine:
            return [await engine.complete("tiny", prompt, 24, 60) for prompt in PROMPTS]


def _fields(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("switch")
    int8 = make_int8_variant(tiny_model, tiny_model.parent / "tiny-int8")
    settings = Settings(
        model=str(tiny_model),
        state_dir=str(folder / "state"),
        engines=EngineSettings(
            variants={"int8": str(int8)}, kv_cache_memory_bytes=64 << 20, max_model_len=1024
        ),
    )
    clock = LiveClock()
    devices = split_cores(sorted(os.sched_getaffinity(0)), 4)
    cluster = LocalCluster(
        devices,
        model=str(tiny_model),
        served_model_name="tiny",
        run_dir=folder / "run",
        clock=clock,
        settings=settings.engines,
    )
    loop = ControlLoop(
        cluster, clock, SINGLES, policy=ReconcilePolicy(drain_settle_s=0.3), interval_s=0.1
    )
    settled: list[tuple[str, str]] = []

    async def publish() -> None:
        await loop.step()

    facts = SwitcherFacts(
        settings=settings,
        movable=switch_facts(settings, devices),
        model="tiny",
        cluster=cluster,
        loop=loop,
        clock=clock,
        settle=lambda plan, reason: settled.append((plan.id, reason)),
        publish=publish,
    )
    running = asyncio.create_task(loop.run())
    stage = Stage(cluster, loop, facts, settled)
    try:
        await stage.at("a", "b")
        stage.reference = await stage.answers("a")
        yield stage
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await cluster.close()


async def test_layouts_of_one_precision(stage: Stage) -> None:
    """Tokens are those of engines that were loaded from disk, in every layout."""
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
    assert [phase for _, phase, _ in report.phases] == [
        *("prepare", "transfer", "verify", "commit", "drain", "done")
    ]


async def test_int8_is_made_on_the_way_and_layouts_mix(stage: Stage) -> None:
    """From fp32 alone to fp32 and int8, and on to others of both; int8 is that of the disk."""
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
