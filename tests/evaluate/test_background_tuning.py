"""A server that tunes its constants on its own records, on a virtual clock."""

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from oserve.config import load_cluster
from oserve.control.decision import Mode
from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.retuning import Attainment, RetuningPolicy, RetuningState
from oserve.core import (
    DeploymentPlan,
    FinishStatus,
    LengthClass,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
    RequestRecord,
    VirtualClock,
)
from oserve.evaluate.background_tuning import (
    BackgroundTuning,
    StoredRecords,
    TuningFacts,
    recent_traffic,
    tuned_on_records,
)
from oserve.evaluate.part_score import Gain, RateScales
from oserve.evaluate.tuning import Tuned
from oserve.evaluate.tuning_run import PartSummary, TuningRun
from oserve.gateway.records import RecordStore
from oserve.perf.corrected import Speeds
from oserve.perf.selection import SourceChoice, find_source
from oserve.traces import Slo, synthesise

START_S = 1_700_000_000.0
GIVEN = DispatchConstants(overload=OverloadPolicy(ttft_s=1.5))
BETTER = replace(GIVEN, overflow_s=8.0)
DEVICES = load_cluster("2xL40S").devices
PLAN = DeploymentPlan(
    id="p",
    replicas=tuple(
        ReplicaSpec(id=device.id, shape=ReplicaShape(max_num_batched_tokens=512), devices=(name,))
        for device in DEVICES
        for name in (device.id,)
    ),
    length_classes=(LengthClass(name="all"),),
    routing_shares={"all": {device.id: 0.5 for device in DEVICES}},
)


def facts(mode: Mode, records: Path = Path("none")) -> TuningFacts:
    source, context = find_source(
        SourceChoice(model="qwen3-8b", devices=DEVICES, network="infiniband-400")
    )
    return TuningFacts(
        mode=mode,
        records=records,
        source=source,
        context=context,
        devices=DEVICES,
        slo=Slo(ttft_s=1.5, tpot_s=0.08),
        demotes_by_s=1.5,
        ordered=True,
        policy=RetuningPolicy(interval_s=100.0, new_records=100),
        min_gain=0.02,
    )


def run_of(present: DispatchConstants, constants: DispatchConstants) -> TuningRun:
    """A search that proposes these."""
    summary = PartSummary(capacity=1.0, mean_e2e_s=1.0, p99_e2e_s=2.0, attainment_past=0.9)
    tuned = Tuned(
        present=present,
        proposed=constants,
        constants=constants,
        gain=Gain(mean=0.05, error=0.0),
        held_out_gain=Gain(mean=0.05, error=0.0),
        reports=(),
        candidates=1,
    )
    return TuningRun(
        tuned=tuned,
        knee=1.0,
        loads=RateScales(below=(1.0,), past=()),
        requests=(500, 500),
        windows=3,
        shortest_s=100.0,
        runs=1,
        before=summary,
        after=summary,
    )


@dataclass
class FakeSearch:
    """Proposes the same each time."""

    found: DispatchConstants
    asked: list[DispatchConstants] = field(default_factory=list)
    error: Exception | None = None
    closed: bool = False

    def __call__(
        self, present: DispatchConstants, plan: DeploymentPlan, speeds: Speeds
    ) -> TuningRun:
        self.asked.append(present)
        if self.error is not None:
            raise self.error
        return run_of(present, self.found)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeRecords:
    """Ten requests a second; the share in time depends on the constants in force."""

    clock: VirtualClock
    share: float = 0.97

    def newest(self) -> int:
        return int(10.0 * self.clock.now())

    def attained(self, start_s: float, end_s: float) -> Attainment:
        requests = max(0, int(10.0 * (end_s - start_s)))
        return Attainment(requests=requests, met=round(requests * self.share))


@dataclass
class Bench:
    """A tuning with its fakes."""

    mode: Mode = Mode.AUTO
    clock: VirtualClock = field(default_factory=VirtualClock)
    saved: list[RetuningState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.search = FakeSearch(BETTER)
        self.records = FakeRecords(self.clock)
        self.tuning = BackgroundTuning(
            facts(self.mode),
            RetuningState(given=GIVEN, present=GIVEN),
            search=self.search,
            records=self.records,
            clock=self.clock,
            unix_s=lambda: START_S + self.clock.now(),
            save=self.saved.append,
        )

    async def go(self, seconds: float) -> None:
        """Time passes, and it steps as it would by itself."""
        for _ in range(int(seconds / 10.0)):
            await self.clock.advance(10.0)
            await self.tuning.attempt(PLAN, Speeds())


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(mode=getattr(request, "param", Mode.AUTO))


async def test_it_steps_by_itself_until_it_is_cancelled(bench: Bench) -> None:
    bench.search.error = RuntimeError("unforeseen")
    running = asyncio.ensure_future(bench.tuning.run(lambda: PLAN))
    for _ in range(30):
        await bench.clock.advance(10.0)
    assert not running.done()
    running.cancel()
    assert isinstance((await asyncio.gather(running, return_exceptions=True))[0], BaseException)


async def test_a_change_is_on_trial_and_kept_if_attainment_does_not_fall(bench: Bench) -> None:
    await bench.go(120)
    assert bench.tuning.constants == BETTER
    assert bench.tuning.document()["on_trial"]
    assert bench.tuning.document()["changed"] == ["gateway.overflow_s"]
    await bench.go(500)
    assert bench.tuning.constants == BETTER
    assert not bench.tuning.document()["on_trial"]
    assert bench.saved[-1] == bench.tuning.state


async def test_a_change_that_harms_is_taken_back_and_not_tried_again(bench: Bench) -> None:
    await bench.go(110)
    assert bench.tuning.constants == BETTER
    bench.records.share = 0.8
    await bench.go(120)
    assert bench.tuning.constants == GIVEN
    assert "taken back" in bench.tuning.document()["line"]
    await bench.go(400)
    assert len(bench.search.asked) > 1
    assert bench.tuning.constants == GIVEN
    assert "not again" in bench.tuning.document()["line"]


@pytest.mark.parametrize("bench", [Mode.ADVISE], indirect=True)
async def test_advice_changes_nothing(bench: Bench) -> None:
    await bench.go(150)
    assert bench.tuning.constants == GIVEN
    assert bench.tuning.document()["line"].startswith("would change gateway.overflow_s 2 to 8")


async def test_a_search_that_fails_ends_nothing(bench: Bench) -> None:
    bench.search.error = OServeError("its first part has 3 requests", place="x", remedy="y")
    await bench.go(120)
    assert "no search: its first part has 3 requests" in bench.tuning.document()["line"]
    bench.search.error = RuntimeError("unforeseen")
    await bench.go(110)
    bench.search.error = None
    await bench.go(110)
    assert bench.tuning.constants == BETTER
    bench.tuning.close()
    assert bench.search.closed


def record(arrival_s: float, *, ttft_s: float | None = 0.1, **fields: object) -> RequestRecord:
    given = {
        "arrival_s": arrival_s,
        "prompt_tokens": 100,
        "output_tokens": 10,
        "workload_type": "all",
        "replica": "r",
        "ttft_s": ttft_s,
        "tpot_s": 0.01,
        "e2e_s": 1.0,
        "status": FinishStatus.COMPLETED,
    }
    return RequestRecord(**(given | fields))  # type: ignore[arg-type]


def test_only_completed_requests_since_the_last_long_pause_are_simulated() -> None:
    rows = [
        *(record(float(second)) for second in range(10)),
        record(5000.0, status=FinishStatus.FAILED),
        *(record(5000.0 + second) for second in (3, 1, 2)),
        record(5004.0, output_tokens=0),
    ]
    assert recent_traffic(rows, 4096).arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert len(recent_traffic([], 4096)) == 0


def test_attainment_of_records_leaves_out_what_clients_gave_up(tmp_path: Path) -> None:
    file = tmp_path / "records.sqlite"
    stored = StoredRecords(file, Slo(ttft_s=1.5, tpot_s=0.08))
    assert stored.newest() == 0
    store = RecordStore(file, max_records=100)
    store.put(record(1.0))
    store.put(record(2.0, ttft_s=9.0))
    store.put(record(3.0, tpot_s=None, ttft_s=None))
    store.put(record(4.0, status=FinishStatus.DISCONNECTED))
    store.put(record(5.0, status=FinishStatus.REJECTED))
    store.put(record(99.0))
    store.close()
    assert stored.newest() == 6
    assert stored.attained(0.0, 50.0) == Attainment(requests=4, met=2)


def test_the_search_runs_on_records(tmp_path: Path) -> None:
    file = tmp_path / "records.sqlite"
    store = RecordStore(file, max_records=10_000)
    for item in synthesise(rate_rps=8.0, duration_s=60.0, seed=3):
        store.put(
            record(
                START_S + item.arrival_s,
                prompt_tokens=item.prompt_tokens,
                output_tokens=min(20, item.output_tokens),
            )
        )
    store.close()
    found = tuned_on_records(facts(Mode.AUTO, file), GIVEN, PLAN, Speeds())
    assert sum(found.requests) > 400
    assert found.runs > 0
    assert found.tuned.present == GIVEN
