"""Real engines kept at a plan, and a switcher: what the tests of switches share."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from oserve.config import plan_yaml
from oserve.config.settings import Settings, SwitchSettings
from oserve.control.cluster import Cluster
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    Clock,
    DeploymentPlan,
    Device,
    LengthClass,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.control import EngineControl
from oserve.engines.devices import split_cores
from oserve.engines.holding import HeldEngines
from oserve.engines.mover import Mover
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher
from oserve.startup.switch_facts import switch_facts
from oserve.switching.engine_weights import EngineWeightFacts, EngineWeights
from oserve.switching.journal import journal_folder
from oserve.switching.report import SwitchReport
from oserve.switching.switcher import Switcher, SwitcherFacts

LIMIT_S = 300.0
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
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1.0 / len(replicas) for spec in replicas}},
    )


@dataclass
class Stage:
    """A cluster kept at a plan, and a switcher."""

    cluster: EngineCluster
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

    async def switch(self, plan: DeploymentPlan, **settings: float) -> SwitchReport:
        return await self.finished(*self.begin(plan, **settings))

    def begin(self, plan: DeploymentPlan, **settings: float) -> tuple[Switcher, SwitchReport]:
        facts = self.facts
        if settings:
            limits = SwitchSettings(**settings)  # type: ignore[arg-type]
            facts = replace(facts, **_limits(limits, facts.cluster, facts.clock))
        switcher = Switcher(facts)
        return switcher, switcher.want(plan, "test")

    async def finished(self, switcher: Switcher, report: SwitchReport) -> SwitchReport:
        async with asyncio.timeout(LIMIT_S):
            while switcher.active:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert report.method == "transfer", report
        return report

    async def answers(self, name: str) -> list[str]:
        async with EngineControl((await self.state(name)).endpoint) as engine:
            return [await engine.complete("tiny", prompt, 24, 60) for prompt in PROMPTS]


def _limits(settings: SwitchSettings, cluster: Cluster, clock: Clock) -> dict[str, Any]:
    facts = EngineWeightFacts(
        cluster=cluster,
        model="tiny",
        mover=partial(Mover, clock=clock, bytes_per_s=settings.bytes_per_s),
        transfer_limit_s=settings.transfer_limit_s,
        max_perplexity_rise=settings.max_perplexity_rise,
    )
    return {
        "weights": partial(EngineWeights, facts),
        "transfer_limit_s": settings.transfer_limit_s,
    }


@contextlib.asynccontextmanager
async def staged(
    model: Path,
    folder: Path,
    plan: DeploymentPlan,
    variants: Mapping[str, str],
    launcher: Launcher,
    *,
    devices: tuple[Device, ...] = (),
    remote: Sequence[HeldEngines] = (),
) -> AsyncIterator[Stage]:
    """Four devices, the plan's replicas ready, what the first of them answers as reference.

    Or other ``devices``, of nodes whose keepers ``remote`` reaches.
    """
    settings = Settings(
        model=str(model),
        state_dir=str(folder / "state"),
        engines=EngineSettings(
            variants=dict(variants), kv_cache_memory_bytes=64 << 20, max_model_len=1024
        ),
    )
    clock = LiveClock()
    devices = devices or split_cores(sorted(os.sched_getaffinity(0)), 4)
    cluster = EngineCluster(
        devices,
        model=str(model),
        served_model_name="tiny",
        run_dir=folder / "run",
        clock=clock,
        settings=settings.engines,
        launcher=launcher,
        remote=remote,
    )
    await cluster.adopt()
    loop = ControlLoop(
        cluster, clock, plan, policy=ReconcilePolicy(drain_settle_s=0.3), interval_s=0.1
    )
    settled: list[tuple[str, str]] = []

    async def publish() -> None:
        await loop.step()

    facts = SwitcherFacts(
        folder=journal_folder(settings.state_dir),
        movable=switch_facts(settings, devices),
        cluster=cluster,
        loop=loop,
        clock=clock,
        settle=lambda outcome: settled.append((outcome.plan.id, outcome.reason)),
        publish=publish,
        plan_text=plan_yaml,
        unix_s=time.time,
        **_limits(settings.switch, cluster, clock),
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
