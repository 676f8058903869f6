"""The decision loop on a virtual clock: it counts each second, decides when due, and switches."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from oserve.app.controller import ControllerService
from oserve.app.decisions import DecisionLoop
from oserve.config import load_settings
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, VirtualClock
from oserve.gateway.process.supervisor import GatewaySupervisor
from oserve.sim import SimulatedCluster
from oserve.startup.cluster_view import ClusterView
from oserve.startup.deployment import prepare
from oserve.switch.transaction import FailedTask, Task
from oserve.switching.driver import SwitchOutcome
from oserve.switching.report import SwitchReport
from oserve.switching.switcher import Switcher

START_S = 1_700_000_000
SMALL = """
id: small
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [cpu:0]
"""


@dataclass
class FakeGateway:
    """Requests at a steady rate, counted up to the present."""

    controller: ControllerService
    clock: VirtualClock
    rates: Sequence[float]
    told: int = START_S

    @property
    def counted_until_s(self) -> float:
        return START_S + self.clock.now()

    def batches(self) -> list[Batch]:
        first, self.told = self.told, int(START_S + self.clock.now())
        names = self.controller.controller.names
        arrivals = {second: list(self.rates) for second in range(first, self.told)}
        return [Batch(names=names, arrivals=arrivals)]


@dataclass
class FakeSwitcher:
    """Takes plans and does nothing with them."""

    active: bool = False
    wanted: list[DeploymentPlan] = field(default_factory=list)

    def want(self, plan: DeploymentPlan, by: str) -> SwitchReport:
        self.active = True
        self.wanted.append(plan)
        return SwitchReport(id="1", plan=plan.id, by=by, began_s=0.0)


@pytest.mark.slow
async def test_it_counts_decides_and_switches_once(model: str, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    plan_file.write_text(SMALL, encoding="utf-8")
    given = prepare(
        load_settings(
            None,
            {
                "model": model,
                "plan": str(plan_file),
                "state_dir": str(tmp_path / "state"),
                "cluster.devices": "cpu",
                "cluster.cpu_slots": 2,
                "cluster.cpu_flags": "avx2",
                "planning.rates": "chats:60x120=4,documents:1500x20=0.1",
                "control.mode": "auto",
                "control.simulate": False,
                "control.decision_interval_s": 4,
                "control.min_dwell_s": 5,
                "control.start_s": 5,
            },
            {},
        )
    )
    assert given.plan_request is not None
    clock = VirtualClock()
    cluster = SimulatedCluster(given.devices, clock)
    loop = ControlLoop(cluster, clock, given.plan, policy=ReconcilePolicy())
    controller = ControllerService(given, given.plan_request, now_s=START_S)
    gateway = FakeGateway(controller, clock, (400.0, 0.0))
    switcher = FakeSwitcher()
    view = ClusterView()
    decisions = DecisionLoop(
        controller,
        gateway=cast(GatewaySupervisor, gateway),
        loop=loop,
        switcher=cast(Switcher, switcher),
        view=view,
        clock=clock,
        unix_s=lambda: START_S + clock.now(),
    )
    running = asyncio.ensure_future(decisions.run())
    try:
        for _ in range(120):
            await loop.step()
            view.observation = await cluster.observe()
            await clock.advance(1.0)
            # A decision is made in a thread: time stands still until it is.
            await asyncio.sleep(0.001)
            while decisions.busy:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if switcher.wanted:
                break
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert len(switcher.wanted) == 1
    (plan,) = switcher.wanted
    assert plan == controller.controller.plan
    assert len(plan.replicas) == 2
    # A shape that could not be started is excluded, and the controller is back at the old plan.
    failed = plan.replicas[-1]
    cause = FailedTask(task=Task.START, replica=failed.id)
    decisions.switch_ended(SwitchOutcome(plan=given.plan, reason="it did not", cause=cause))
    assert failed.shape in controller.planner.barred
    assert [spec.id for spec in controller.controller.plan.replicas] == ["one"]
    await decisions.close()
    await decisions.save_last()
