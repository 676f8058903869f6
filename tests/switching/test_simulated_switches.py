"""Switches of a simulated fleet end whole, whatever is lost, fails, crashes or hangs on the way."""

import asyncio
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Observation,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    VirtualClock,
)
from oserve.perf import TokenCosts
from oserve.perf.known_models import find_model
from oserve.sim import Faults, FleetCluster, Phases
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.modelled_weights import ModelledWeightFacts, ModelledWeights
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables
from oserve.sim.types import RequestTable, Status
from oserve.switch.costs import SwitchCosts
from oserve.switch.journal import BeginLine, EndLine, JournalLine, TransactionLine, restored
from oserve.switch.layout import architecture_of
from oserve.switch.model import MovableModel
from oserve.switch.precision import format_of
from oserve.switch.programme import SwitchFacts
from oserve.switching.report import SwitchMethod, SwitchReport, SwitchStatus
from oserve.switching.switcher import Switcher, SwitcherFacts, at_once

DEVICES = tuple(Device(id=f"d{n}", kind="H100", node=f"n{n // 2}") for n in range(4))
SHAPE = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=4)
COUNT = 60
# No replica is given up, however often its start fails.
POLICY = ReconcilePolicy(drain_settle_s=0.5, max_backoff_s=4.0, max_failures=1000)
_STEP_S = 0.01
_LIMIT_S = 3000.0


def replica(name: str, *devices: str) -> ReplicaSpec:
    shape = replace(SHAPE, tensor_parallel_size=len(devices))
    return ReplicaSpec(id=name, shape=shape, devices=devices)


def plan_of(name: str, *replicas: ReplicaSpec) -> DeploymentPlan:
    return DeploymentPlan(
        id=name,
        replicas=replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1.0 / len(replicas) for spec in replicas}},
    )


SINGLES = plan_of("singles", *(replica(f"s{n}", f"d{n}") for n in range(4)))
PAIRS = plan_of("pairs", replica("p0", "d0", "d1"), replica("p1", "d2", "d3"))
MIXED = plan_of("mixed", replica("p0", "d0", "d1"), replica("s2", "d2"), replica("s3", "d3"))
PLANS = (SINGLES, PAIRS, MIXED)


class ListJournal:
    def __init__(self) -> None:
        self.lines: list[JournalLine] = []

    def write(self, line: JournalLine) -> None:
        self.lines.append(line)

    def close(self) -> None:
        pass


class World:
    """A fleet under the live loop and switcher, all on one virtual clock."""

    def __init__(self, first: DeploymentPlan, faults: Faults, *, releases: bool) -> None:
        arrivals = np.linspace(0.0, 120.0, COUNT)
        self.clock = VirtualClock()
        self.fleet = SimulatedFleet(RequestTable.of(arrivals, [20] * COUNT, [300] * COUNT))
        # What serves from the start comes up without a fault.
        later = replace(
            faults,
            lost_action=0.0,
            repeated_action=0.0,
            failed_start=0.0,
            slow_start=0.0,
            stale_observation=0.0,
        )
        self.cluster = FleetCluster(
            self.fleet,
            self._add,
            DEVICES,
            self.clock,
            phases=Phases(start_s=2.0, stop_s=0.5),
            moves_after_s=5.0,
            faults=later,
        )
        self.loop = ControlLoop(self.cluster, self.clock, first, policy=POLICY)
        self.journals: list[ListJournal] = []
        self.faults = faults
        self.switcher = self._switcher(releases=releases)

    def _switcher(self, *, releases: bool) -> Switcher:
        costs = SwitchCosts(engine_start_s=2.0)
        facts = SwitchFacts(
            model=MovableModel(
                architecture=architecture_of(find_model("llama-3.1-8b")),
                formats={Precision.BF16: format_of(Precision.BF16)},
            ),
            devices=DEVICES,
            kv_cache_memory_bytes=0,
            available_bytes=lambda: sys.maxsize,
            releases_cache=releases,
            costs=costs,
        )
        weights = ModelledWeightFacts(
            cluster=self.cluster,
            clock=self.clock,
            costs=costs,
            draws_fault=self.cluster.draws_fault,
            failed_transfer=self.faults.failed_transfer,
        )
        return Switcher(
            SwitcherFacts(
                folder=Path("unused"),
                movable=facts,
                cluster=self.cluster,
                loop=self.loop,
                clock=self.clock,
                settle=lambda _outcome: None,
                publish=self.round,
                weights=partial(ModelledWeights, weights),
                plan_text=lambda plan: plan.id,
                unix_s=self.clock.now,
                transfer_limit_s=20.0,
                journal=self._journal,
                compute=at_once,
                poll_s=0.25,
            )
        )

    def _journal(self, path: Path) -> ListJournal:
        self.journals.append(ListJournal())
        return self.journals[-1]

    def _add(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        steps = np.full(65, int(_STEP_S * 1e12), dtype=np.int64)
        nothing = np.zeros(5, dtype=np.int64)
        self.fleet.add_replica(
            spec.id,
            SHAPE,
            StepTables(prompts=steps, joint=nothing, decodes=steps[:5], kv_rate=0, pair_rate=0),
            kv_tokens=1024,
            costs=TokenCosts(prefill_s_per_token=1e-3, decode_s_per_token=1e-3),
            ready_at_s=ready_at_s,
        )

    async def round(self) -> None:
        await self.loop.step()
        no_device_serves_twice(await self.cluster.observe())

    async def until(self, moment_s: float) -> None:
        while self.clock.now() < moment_s:
            await self.round()
            await self.clock.advance(0.5)

    async def play(
        self, plans: list[DeploymentPlan], every_s: float
    ) -> tuple[list[SwitchReport], FleetResults]:
        """Wish for a plan now and then, under faults; then let all come to rest without any."""
        self.cluster.warm = True
        await self.round()
        self.cluster.warm = False
        self.cluster.faults = self.faults
        reports = []
        for number, plan in enumerate(plans):
            await self.until(every_s * number + 5.0)
            reports.append(self.switcher.want(plan, "test"))
        await self.until(every_s * len(plans) + 40.0)
        self.cluster.faults = Faults()
        while not await self.at_rest():
            assert self.clock.now() < _LIMIT_S, (self.loop.plan.id, reports)
            await self.until(self.clock.now() + 5.0)
        return reports, self.fleet.results()

    async def at_rest(self) -> bool:
        alive = {
            state.spec
            for state in (await self.cluster.observe()).replicas
            if state.phase is not ReplicaPhase.GONE
        }
        return (
            not self.switcher.active
            and self.cluster.settled
            and alive == set(self.loop.plan.replicas)
            and self.fleet.ended == COUNT
        )


def no_device_serves_twice(observation: Observation) -> None:
    serving = [
        device
        for state in observation.replicas
        if state.phase is ReplicaPhase.READY
        for device in state.spec.devices
    ]
    assert len(serving) == len(set(serving)), observation


def tells_how_it_ended(journal: ListJournal, report: SwitchReport) -> None:
    """Each wave's lines lead to the state that the report speaks of."""
    assert isinstance(journal.lines[-1], EndLine)
    assert journal.lines[-1].state == report.state.value
    waves: dict[int, list[TransactionLine]] = {}
    for line in journal.lines:
        if isinstance(line, TransactionLine):
            waves.setdefault(line.wave, []).append(line)
    assert all(isinstance(lines[0], BeginLine) for lines in waves.values())
    phases = [restored(lines).phase.value for lines in waves.values()]
    assert set(phases[:-1]) <= {"done"}
    if report.state is SwitchStatus.DONE:
        assert set(phases[-1:]) <= {"done"}
    else:
        # A switch that is cancelled between two waves ends with a wave that is done.
        assert report.reason
        assert set(phases[-1:]) <= {"done", "rolled_back"}


async def ends_whole(
    plans: list[DeploymentPlan], faults: Faults, *, releases: bool, every_s: float = 15.0
) -> World:
    first, *others = plans
    world = World(first, faults, releases=releases)
    reports, results = await world.play(others, every_s)
    # No request is lost, and each has all of its tokens, once.
    assert (results.status == Status.COMPLETED).all()
    assert (results.made_tokens == results.output_tokens).all()
    assert world.loop.held == frozenset()
    moved = [report for report in reports if report.method is SwitchMethod.TRANSFER]
    driven = [report for report in moved if report.state is not SwitchStatus.SUPERSEDED]
    for journal, report in zip(world.journals, driven, strict=True):
        assert report.state in {SwitchStatus.DONE, SwitchStatus.ROLLED_BACK}
        tells_how_it_ended(journal, report)
    return world


@settings(max_examples=12, deadline=None)
@given(
    plans=st.lists(st.sampled_from(PLANS), min_size=2, max_size=4),
    seed=st.integers(0, 2**16),
    lost=st.sampled_from([0.0, 0.3]),
    repeated=st.sampled_from([0.0, 0.3]),
    failed=st.sampled_from([0.0, 0.3]),
    slow=st.sampled_from([0.0, 0.3]),
    stale=st.sampled_from([0.0, 0.3]),
    transfer=st.sampled_from([0.0, 0.5]),
    crash=st.none() | st.tuples(st.floats(5.0, 60.0), st.sampled_from(["s0", "s2", "p0", "p1"])),
    hang=st.none() | st.tuples(st.floats(5.0, 60.0), st.sampled_from(["s1", "s3", "p0", "p1"])),
    releases=st.booleans(),
)
def test_a_switch_ends_whole_under_any_faults(
    plans: list[DeploymentPlan],
    seed: int,
    lost: float,
    repeated: float,
    failed: float,
    slow: float,
    stale: float,
    transfer: float,
    crash: tuple[float, str] | None,
    hang: tuple[float, str] | None,
    releases: bool,
) -> None:
    faults = Faults(
        lost_action=lost,
        repeated_action=repeated,
        failed_start=failed,
        slow_start=slow,
        stale_observation=stale,
        failed_transfer=transfer,
        crashes=() if crash is None else (crash,),
        hangs=() if hang is None else (hang,),
        hang_after_s=2.0,
        seed=seed,
    )
    asyncio.run(ends_whole(plans, faults, releases=releases))


async def test_without_faults_weights_move_in_waves() -> None:
    for releases in (False, True):
        world = await ends_whole(
            [SINGLES, PAIRS, SINGLES], Faults(), releases=releases, every_s=60.0
        )
        reports = world.switcher._reports
        assert [report.state for report in reports] == [SwitchStatus.DONE] * 2
        assert world.loop.plan.replicas == SINGLES.replicas
        # What a wave takes is what the programme foresaw, and looking at the cluster now and then.
        for report in reports:
            wave = report.programme["waves"][0]
            took_s = report.durations_s(0)["transfer"]
            foreseen_s = wave["phases_s"]["transfer"]
            assert foreseen_s - 0.01 <= took_s <= 2 * foreseen_s + 0.5


async def test_a_failed_transfer_rolls_back_and_requests_go_on() -> None:
    world = await ends_whole([SINGLES, PAIRS], Faults(failed_transfer=1.0), releases=True)
    (report,) = world.switcher._reports
    assert report.state is SwitchStatus.ROLLED_BACK
    assert "transfer failed" in report.reason
    assert world.loop.plan is SINGLES
