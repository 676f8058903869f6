"""Real engines kept at a plan, and a switcher: what the tests of switches share."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import LocalCluster
from oserve.engines.control import EngineControl
from oserve.engines.devices import split_cores
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher

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

    async def reset(self, plan: DeploymentPlan) -> None:
        """This plan is in force, whatever was: others go, what is missing is loaded from disk."""
        self.loop.held = frozenset()
        self.loop.plan = plan
        await self.at(*(spec.id for spec in plan.replicas))

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


@contextlib.asynccontextmanager
async def staged(
    model: Path,
    folder: Path,
    plan: DeploymentPlan,
    variants: Mapping[str, str],
    launcher: Launcher,
) -> AsyncIterator[Stage]:
    """Four devices, the plan's replicas ready, what the first of them answers as reference."""
    settings = Settings(
        model=str(model),
        state_dir=str(folder / "state"),
        engines=EngineSettings(
            variants=dict(variants), kv_cache_memory_bytes=64 << 20, max_model_len=1024
        ),
    )
    clock = LiveClock()
    devices = split_cores(sorted(os.sched_getaffinity(0)), 4)
    cluster = LocalCluster(
        devices,
        model=str(model),
        served_model_name="tiny",
        run_dir=folder / "run",
        clock=clock,
        settings=settings.engines,
        launcher=launcher,
    )
    loop = ControlLoop(
        cluster, clock, plan, policy=ReconcilePolicy(drain_settle_s=0.3), interval_s=0.1
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
        await stage.at(*(spec.id for spec in plan.replicas))
        stage.reference = await stage.answers(plan.replicas[0].id)
        yield stage
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await cluster.close()
