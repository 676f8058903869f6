"""A day: what is learned and reported, how large the load is, and figures by hour."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oserve.config import load_cluster
from oserve.core import DeploymentPlan, OServeError
from oserve.evaluate.attainment import attainment
from oserve.evaluate.simulator import (
    SimulatedServing,
)
from oserve.sim.phases import Phases
from oserve.study.day_plot import draw
from oserve.study.days import DrawnDay, TraceDay, day_scene, hour_in_s, sized_load
from oserve.study.hours import (
    best_by_hour,
    day_document,
    day_figures,
    hour_marks,
    latencies_between,
    ratios,
)
from oserve.study.ours import OServeTuner
from oserve.study.policy import Conduct, Fixed, PolicyView
from oserve.study.run import Run
from oserve.study.runner import run_policy
from oserve.study.scene import Scene, SceneChoice
from oserve.study.tune import JSQ
from oserve.traces import Slo, TraceRequest
from oserve.traces.days import DayPart
from study.scenes import small_scene

SCENE = replace(small_scene(rate_rps=6.0), phases=Phases(start_s=2.0))
TUNER = OServeTuner(SCENE)
# Two replicas of two devices.
SERVING = TUNER.homogeneous(TUNER.forms((512,))[-1], JSQ)
HOURS, HOUR_S = 4, 10
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
CHOICE = SceneChoice(
    model="qwen3-32b",
    devices=load_cluster("2xH100").devices,
    slo=SLO,
    chunks=(512,),
    seqs=(64,),
    tensor_parallel_sizes=(2,),
    pipeline_parallel_sizes=(1,),
)


def test_marks_change_no_request_and_periods_add_up() -> None:
    policy = Fixed(serving=SERVING)
    straight = run_policy(SCENE, policy, TUNER.simulator, 1.0)
    told: list[float] = []
    marked = run_policy(
        SCENE,
        policy,
        TUNER.simulator,
        1.0,
        marks_s=hour_marks(HOURS, HOUR_S),
        said=told.append,
    )
    assert told == [10, 20, 30]
    assert np.array_equal(straight.results.finish_s, marked.results.finish_s)
    assert marked.device_s == pytest.approx(straight.device_s)
    # The mean batch of the whole run overrates the power.
    assert 0.9 * straight.energy_j < marked.energy_j <= straight.energy_j
    assert marked.idle_j == straight.idle_j == 0.0


def test_hours_share_all_requests_and_the_whole_is_that_of_the_run() -> None:
    run = _marked(Fixed(serving=SERVING))
    day = day_figures("static-default", run, SLO, hours=HOURS, hour_s=HOUR_S)
    assert [row.hour for row in day.hours] == [0, 1, 2, 3]
    assert sum(row.latencies.requests for row in day.hours) == len(run.traffic)
    assert day.whole.latencies.slo_attainment == pytest.approx(attainment(run.results, SLO))
    summary = run.results.summary(SLO)
    assert day.whole.latencies.e2e.p99_s == pytest.approx(summary.e2e_s.p99)
    assert day.whole.latencies.ttft.p50_s == pytest.approx(summary.ttft_s.p50)
    assert day.whole.latencies.tpot.p50_s == pytest.approx(summary.tpot_s.p50)
    assert day.whole.total_j == pytest.approx(run.energy_j)
    for row in (*day.hours, day.whole):
        assert row.latencies.lost == 0
        assert 0 < row.kv_mean < row.kv_peak < 1
        assert 1.0 <= row.kv_imbalance < 2.0
        assert row.switches == 0
    assert day.missed == tuple(row.hour for row in day.hours if not row.holds)
    assert day_document(day)["hours"][0]["latencies"]["e2e"]["p99_s"] > 0


class Down:
    """Gives up a replica at the first decision."""

    conduct = Conduct(decides=True)

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        return SERVING

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        if len(seen.plan.replicas) < len(SERVING.plan.replicas):
            return None
        return replace(seen.plan, replicas=seen.plan.replicas[:1])


def test_a_retired_replica_leaves_idle_devices() -> None:
    run = _marked(Down())
    day = day_figures("down", run, SLO, hours=HOURS, hour_s=HOUR_S)
    assert [row.switches for row in day.hours] == [0, 1, 0, 0]
    assert day.whole.switches == run.switches == 1
    held = [row.device_s for row in day.hours]
    assert held[0] == pytest.approx(len(SCENE.devices) * HOUR_S)
    assert held[2] < held[0]
    assert day.hours[0].idle_j == 0.0 < day.hours[2].idle_j
    assert day.hours[2].deployment == "1 x " + SERVING.plan.replicas[0].shape.name
    assert len(day.hours[2].replicas) == 1 < len(day.whole.replicas)


def test_what_never_ends_counts_up_to_the_end() -> None:
    fleet = TUNER.simulator.started(SERVING, SCENE.traffic)
    fleet.advance(20.0)
    results = fleet.results()
    found, _, none = latencies_between(results, SLO, [20.0, 1e6])
    assert 0 < found.lost < found.requests == np.sum(results.arrival_s < 20.0)
    assert found.e2e.p99_s <= 20.0
    assert (none.requests, none.slo_attainment) == (0, 1.0)


def test_ratios_are_geometric_and_skip_hours_without_requests() -> None:
    found = ratios([2.0, 8.0, 0.0], [1.0, 1.0, 1.0])
    assert found.mean == pytest.approx(4.0)
    assert (found.largest, found.smallest) == (8.0, 2.0)
    assert ratios([], []).mean == 1.0


def test_the_best_of_each_hour_is_no_worse_than_any() -> None:
    servings = [TUNER.homogeneous(shape, SERVING.levers) for shape in TUNER.forms((512, 2048))]
    best = best_by_hour(TUNER.simulator, servings, SCENE.traffic, SLO, hours=HOURS, hour_s=HOUR_S)
    assert len(best) == HOURS
    run = _marked(Fixed(serving=servings[0]))
    own = day_figures("one", run, SLO, hours=HOURS, hour_s=HOUR_S)
    for row, (_, found) in zip(own.hours, best, strict=True):
        if row.holds:
            assert found.e2e.p99_s <= row.latencies.e2e.p99_s


def test_static_latency_holds_and_is_the_quickest_of_those() -> None:
    tuner = OServeTuner(small_scene(duration_s=15.0))
    chosen = tuner.latency
    assert tuner.holds(chosen, 1.0)
    quickest = tuner._p99_s(chosen)
    for shape in tuner.forms((512, 2048)):
        other = tuner.homogeneous(shape, chosen.levers)
        if tuner.holds(other, 1.0):
            assert quickest <= tuner._p99_s(other)


# -- days ---------------------------------------------------------------------------------------
def test_policies_learn_on_the_busiest_hour_of_the_learned_day() -> None:
    day = _drawn([1.0, 2.0, 6.0, 1.0])
    scene = _scene(day, 1.0)
    assert scene.peak is not None
    assert scene.learned is scene.peak
    assert scene.learned.duration_s <= day.hour_s
    assert scene.learned.rate_rps == pytest.approx(6.0, rel=0.2)
    assert len(scene.usual) == len(day.learned(1.0)) > len(scene.learned)
    assert not set(scene.usual.prompt_tokens) & set(scene.traffic.prompt_tokens)
    assert scene.demand.rate_rps == pytest.approx(6.0, rel=0.2)


@pytest.mark.slow
def test_the_busiest_hour_runs_at_its_share_of_the_capacity() -> None:
    # Enough requests that the capacities of two draws are close.
    day = _drawn([0.5, 1.0], compress=6)
    load = sized_load(CHOICE, day, peak_share=0.8)
    requests = day.reported(load)
    tuner = OServeTuner(_scene(day, load, learned=requests))
    assert tuner.best_tuned.scale == pytest.approx(1.25, rel=0.15)


def test_a_trace_is_learned_in_its_first_half() -> None:
    requests = [
        TraceRequest(arrival_s=at * 10.0, prompt_tokens=at + 1, output_tokens=5)
        for at in range(4 * 360)
    ]
    day = TraceDay(requests=requests, compress=6, seed=0, source="a trace")
    assert (day.hours, day.hour_s) == (2, 600)
    learned, reported = day.learned(1.0), day.reported(1.0)
    assert max(r.prompt_tokens for r in learned) <= 720 < min(r.prompt_tokens for r in reported)
    assert max(r.arrival_s for r in reported) < 2 * 600
    longer = TraceDay(requests=requests, compress=6, seed=0, source="a trace", learned_h=1)
    assert longer.hours == 3
    for part, learned_h in ((requests[:300], None), (requests, 4), (requests, 0)):
        with pytest.raises(OServeError, match="two hours"):
            TraceDay(requests=part, compress=6, seed=0, source="a trace", learned_h=learned_h)


@pytest.mark.parametrize("compress", [0.0, 0.5, 7.0, 120.0])
def test_an_hour_takes_whole_seconds(compress: float) -> None:
    with pytest.raises(OServeError, match="cannot be compressed"):
        hour_in_s(compress)


def _marked(policy: Fixed | Down) -> Run:
    return run_policy(SCENE, policy, TUNER.simulator, 1.0, marks_s=hour_marks(HOURS, HOUR_S))


def _drawn(rates: Sequence[float], *, compress: float = 60) -> DrawnDay:
    draw = np.random.default_rng(0)
    part = DayPart(
        name="conv",
        rates_rps=np.array(rates),
        # Even lengths are learned, odd ones reported.
        prompt_tokens=np.concatenate(
            [2 * draw.integers(1000, 3000, 200), 2 * draw.integers(1000, 3000, 200) + 1]
        ),
        output_tokens=draw.integers(100, 200, 400),
        window_s=3600.0,
    )
    return DrawnDay(parts=[part], learned_parts=[part], compress=compress, seed=0, source="drawn")


def _scene(day: DrawnDay, load: float, *, learned: Sequence[TraceRequest] | None = None) -> Scene:
    return day_scene(
        CHOICE,
        reported=day.reported(load),
        learned=day.learned(load) if learned is None else learned,
        hour_s=day.hour_s,
        name="drawn",
        source_name=day.words,
    )


def test_a_day_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = _marked(Fixed(serving=SERVING))
    # Every hour misses, and is marked.
    day = day_figures("static-default", run, Slo(ttft_s=1e-6), hours=HOURS, hour_s=HOUR_S)
    assert day.missed == (0, 1, 2, 3)
    draw([day], tmp_path / "day.svg", title="a day " * 50)
    assert "P99 E2E" in (tmp_path / "day.svg").read_text(encoding="utf-8")
    with pytest.raises(OServeError, match="cannot write"):
        draw([day], tmp_path / "day.xyz", title="a day")
