"""Plans scored by simulation: the scorer, the choice by it, and ``oserve plan --verify``."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oserve.cli import main
from oserve.config import load_cluster
from oserve.control.dispatch.order import OrderPolicy, rank_s
from oserve.core import WorkloadType
from oserve.evaluate.attainment import attainment, met, surely_failed
from oserve.evaluate.ranks import ranks_s
from oserve.evaluate.simulator import (
    SimulatedTraffic,
    Simulator,
    largest_scale,
    traffic_from,
)
from oserve.evaluate.verification import check_for, poisson_traffic, serving_of, simulate_serving
from oserve.perf.capacity import LatencyLimits
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.plan.demand import demand_from_rates
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan
from oserve.plan.search import DeploymentCandidate
from oserve.plan.verify import verify
from oserve.traces import Slo, TraceRequest

SLO = Slo(ttft_s=1.0, tpot_s=0.05)
TYPES = (
    WorkloadType(name="chat", prompt_tokens=200, output_tokens=100, arrival_rate_rps=3.0),
    WorkloadType(name="code", prompt_tokens=2000, output_tokens=20, arrival_rate_rps=2.0),
)


@pytest.fixture(scope="module")
def found() -> PlanResult:
    devices = load_cluster("4xH100").devices
    source, context = find_source(
        SourceChoice(model="qwen3-32b", devices=devices, network="infiniband-400")
    )
    demand = demand_from_rates(TYPES, source="test", max_model_len=context)
    choices = ShapeChoices(
        tensor_parallel_sizes=(1, 2, 4),
        pipeline_parallel_sizes=(1,),
        max_num_batched_tokens=(512, 2048),
        max_num_seqs=(64, 128),
    )
    limits = LatencyLimits(ttft_s=SLO.ttft_s, tpot_s=SLO.tpot_s)
    return compute_plan(
        PlanRequest(
            model="qwen3-32b",
            devices=devices,
            demand=demand,
            source=source,
            shapes=shapes_for(source, devices, choices),
            limits={kind.name: limits for kind in demand.types},
            candidates=3,
        )
    )


def test_the_score_is_the_rate_at_which_the_slo_just_holds(found: PlanResult) -> None:
    simulator = Simulator(found.request.source)
    serving = serving_of(found, found.planned.homogeneous[0])
    traffic = poisson_traffic(TYPES, seed=0).between(0.0, 20.0)
    check = replace(check_for(found.request.demand, SLO), traffics=(traffic,))
    got = simulate_serving(simulator, serving, check)
    assert simulator.holds(serving, traffic.faster(got.capacity_scale), SLO)
    assert not simulator.holds(serving, traffic.faster(got.capacity_scale * 1.1), SLO)
    results = simulator.run(serving, traffic)
    assert got.attainment == attainment(results, SLO)
    assert got.goodput_rps == pytest.approx(met(results, SLO).sum() / traffic.duration_s)
    assert simulate_serving(simulator, serving, check) == got


def test_meeting_an_slo_is_what_it_is_everywhere(found: PlanResult) -> None:
    simulator = Simulator(found.request.source)
    serving = serving_of(found, found.planned.homogeneous[0])
    traffic = poisson_traffic(TYPES, seed=1).between(0.0, 30.0).faster(8.0)
    results = simulator.run(serving, traffic)
    own = met(results, SLO)
    assert own.tolist() == [SLO.met_by(outcome) for outcome in results.outcomes()]
    assert 0 < own.mean() < 1
    assert surely_failed(results, SLO) == (own.mean() < 0.95)


def test_poisson_traces_have_the_rates_and_lengths_of_their_types() -> None:
    traffic = poisson_traffic(TYPES, seed=4)
    assert traffic.rate_rps == pytest.approx(5.0, rel=0.1)
    assert (traffic.prompt_tokens == 2000).mean() == pytest.approx(0.4, abs=0.05)
    assert set(zip(traffic.prompt_tokens, traffic.output_tokens, strict=True)) == {
        (200, 100),
        (2000, 20),
    }
    assert not np.array_equal(traffic.arrival_s, poisson_traffic(TYPES, seed=5).arrival_s)


def test_requests_are_cut_to_the_context_as_the_planner_counts_them() -> None:
    rows = [(5.0, 10, 10), (6.0, 4000, 200), (7.0, 50, 9000)]
    traffic = traffic_from(
        [TraceRequest(arrival_s=a, prompt_tokens=p, output_tokens=o) for a, p, o in rows],
        max_model_len=2048,
    )
    assert traffic.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert traffic.prompt_tokens.tolist() == [10, 1848, 1]
    assert traffic.output_tokens.tolist() == [10, 200, 2047]


def test_parts_of_traffic() -> None:
    traffic = SimulatedTraffic(
        arrival_s=np.array([0.0, 1.0, 2.0, 3.0]),
        prompt_tokens=np.arange(1, 5),
        output_tokens=np.arange(1, 5),
    )
    part = traffic.faster(2.0).between(0.5, 1.5)
    assert part.arrival_s.tolist() == [0.0, 0.5]
    assert part.prompt_tokens.tolist() == [2, 3]


@pytest.mark.parametrize("limit", [0.013, 0.9, 1.0, 37.0])
def test_the_largest_scale_is_found_within_bounds(limit: float) -> None:
    asked: list[float] = []

    def holds(scale: float) -> bool:
        asked.append(scale)
        return scale <= limit

    got = largest_scale(holds, start=1.0, tolerance=0.01)
    assert got <= limit <= got * 1.011
    assert len(asked) <= 20
    assert largest_scale(lambda _: False, start=1.0, evaluations=6) == 0.0


def test_different_replicas_are_taken_only_for_a_clear_gain(found: PlanResult) -> None:
    planned = found.planned
    homogeneous = {item.counts for item in planned.homogeneous}
    mixed = next(item for item in planned.candidates if item.counts not in homogeneous)

    def scored(gain: float) -> DeploymentCandidate:
        def score(item: DeploymentCandidate) -> float:
            return gain if item.counts == mixed.counts else 1.0 / (1 + len(item.counts))

        base = 1.0 / (1 + len(mixed.counts))
        chosen = verify(
            found.problem, planned, lambda item: score(item) / base, min_gain=0.03
        ).chosen
        return chosen.deployment

    base = 1.0 / (1 + len(mixed.counts))
    assert scored(base * 1.02).counts in homogeneous
    assert scored(base * 1.04).counts == mixed.counts


def test_plan_verify_tells_scores_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.csv"
    rows = [f"{0.2 * n:.1f},{2000 if n % 4 == 0 else 300},30" for n in range(80)]
    file.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]) + "\n")
    words = [
        *("oserve", "plan", "--model", "qwen3-8b", "--cluster", "2xL40S", "--trace", str(file)),
        *("--slo-ttft-ms", "1500", "--slo-tpot-ms", "80", "--verify", "--json"),
        *("--max-num-batched-tokens", "512,2048", "--max-num-seqs", "128"),
        "--no-ladder",
    ]
    document = run(words, capsys)
    verified = document["verified"]
    scales = [item["simulated_scale"] for item in verified["scored"]]
    assert scales == sorted(scales, reverse=True)
    assert scales[0] > 0
    assert sum(item["chosen"] for item in verified["scored"]) == 1
    assert verified["min_gain"] == 0.03
    assert any(item["homogeneous"] for item in verified["scored"])
    assert document["replicas"]


def test_verifying_needs_an_slo(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("oserve", "plan", "--model", "qwen3-8b", "--cluster", "2xL40S"),
        *("--rates", "300x50=2", "--verify"),
    ]
    with pytest.raises(SystemExit) as stopped:
        run(words, capsys)
    assert stopped.value.code == 2
    assert "nothing to verify" in capsys.readouterr().err


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    before = sys.argv
    sys.argv = words
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = before
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("window_s", [0.0, 7.0])
def test_ranks_of_all_are_the_rank_of_each(window_s: float) -> None:
    order = OrderPolicy(max_penalty_s=20.0, freshest_first_s=window_s)
    traffic = poisson_traffic(TYPES, seed=2)
    assert ranks_s(order, traffic.arrival_s, traffic.prompt_tokens).tolist() == [
        rank_s(order, arrival_s=at, prompt_tokens=tokens)
        for at, tokens in zip(
            traffic.arrival_s.tolist(), traffic.prompt_tokens.tolist(), strict=True
        )
    ]
