"""Switches scored by simulation, as the live controller scores them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oserve.config import load_settings
from oserve.control.evaluation import DecisionInput, ForecastStep, score_candidate
from oserve.control.planner import TablePlanner
from oserve.control.planning import planner_for
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan
from oserve.evaluate.switch_scorer import SwitchCase, SwitchScorer, model_of
from oserve.evaluate.switch_simulation import ScoringProcess, SwitchSimulation, simulated_facts
from oserve.perf.capacity import LatencyLimits
from oserve.plan.planning import PlanRequest
from oserve.startup.deployment import prepare

RATES = (8.0, 0.2)
MANY = tuple(20.0 * rate for rate in RATES)
MIN_GAIN = 0.05


@pytest.fixture
def request_(model: str, tmp_path: Path) -> PlanRequest:
    given = prepare(
        load_settings(
            None,
            {
                "model": model,
                "state_dir": str(tmp_path),
                "cluster.devices": "cpu",
                "cluster.cpu_slots": 4,
                "cluster.cpu_flags": "avx2",
                "planning.rates": "chats:60x120=6,documents:1500x20=0.2",
                "planning.slo_ttft_ms": 2000,
                "planning.slo_tpot_ms": 100,
            },
            {},
        )
    )
    assert given.plan_request is not None  # the settings name a model and rates
    return given.plan_request


def asked_of(plan: DeploymentPlan, rates: tuple[float, ...], **fields: object) -> DecisionInput:
    step = ForecastStep(seconds=60.0, probabilities={rates: 1.0}, expected=rates)
    asked = DecisionInput(
        at_s=0.0, current=plan, now_rps=rates, steps=(step,), lasts_s=60.0, plan_for=(rates,)
    )
    return replace(asked, **fields)  # type: ignore[arg-type]


def case_of(
    scorer: SwitchScorer, planner: TablePlanner, old: DeploymentPlan, new: DeploymentPlan
) -> SwitchCase:
    return SwitchSimulation(scorer, planner).case(asked_of(old, RATES), new, 60.0)


def good_rps(scorer: SwitchScorer, case: SwitchCase) -> float:
    ahead = scorer.workload(case)
    good = scorer.met(case.candidate, ahead.traffic)
    return float((good & ahead.expected).sum()) / ahead.lasting_s


def empty(request_: PlanRequest) -> DeploymentPlan:
    return DeploymentPlan(
        id="none", replicas=(), length_classes=request_.demand.classes, routing_shares={}
    )


@pytest.mark.slow
def test_it_scores_switches_with_simulated_capacities(request_: PlanRequest) -> None:
    linear = planner_for(request_, StartTimes(5.0))
    scorer = SwitchScorer(model_of(request_, min_gain=MIN_GAIN))
    planner = TablePlanner(simulated_facts(linear.facts, scorer))
    assert {row.shape for row in planner.facts.table} <= {row.shape for row in linear.facts.table}
    first, *_ = planner.candidates(RATES, empty(request_))
    half = replace(first, id="half", replicas=first.replicas[:1])
    case = case_of(scorer, planner, half, first)
    ahead = scorer.workload(case)
    part, whole = (scorer.met(plan, ahead.traffic).sum() for plan in (case.current, case.candidate))
    assert part <= whole * 1.02
    asked = asked_of(half, MANY, lasts_s=100.0)
    found = score_candidate(asked, first, planner)
    simulation = SwitchSimulation(scorer, planner)
    score = simulation(asked, found)
    assert score == simulation(asked, found)
    # A worker process scores the same.
    worker = ScoringProcess(model_of(request_, min_gain=MIN_GAIN))
    try:
        assert SwitchSimulation(worker, planner)(asked, found) == score
    finally:
        worker.close()
    # Earlier requests are served first, and do not count.
    crowd = tuple(400.0 * rate for rate in RATES)
    crowded = replace(case, inputs=replace(case.inputs, past=((crowd, 5.0),)))
    assert good_rps(scorer, crowded) < 0.5 * good_rps(scorer, case)


def test_without_limits_capacities_stay_those_of_the_model(request_: PlanRequest) -> None:
    free = replace(request_, limits={kind.name: LatencyLimits() for kind in request_.demand.types})
    linear = planner_for(free, StartTimes(5.0))
    scorer = SwitchScorer(model_of(free, min_gain=MIN_GAIN))
    assert simulated_facts(linear.facts, scorer).table == linear.facts.table
    plan = linear.candidates(RATES, empty(free))[0]
    assert 0 < good_rps(scorer, case_of(scorer, linear, plan, plan)) <= 1.3 * sum(RATES)


def test_a_switch_costs_what_is_late_because_of_it(request_: PlanRequest) -> None:
    """The slower its starts are, the less it gains; at no time is it better than no switch time."""
    quick, slow = (planner_for(request_, StartTimes(seconds)) for seconds in (0.0, 40.0))
    scorer = SwitchScorer(model_of(request_, min_gain=-1.0))
    best, *_ = quick.candidates(RATES, empty(request_))
    half = replace(best, id="half", replicas=best.replicas[:1])
    scores = [scorer.score(case_of(scorer, planner, half, best)) for planner in (quick, slow)]
    assert scores[0].current_rps == scores[1].current_rps
    assert scores[0].candidate_rps >= scores[1].candidate_rps
    none = scorer.score(case_of(scorer, quick, best, best))
    assert none.candidate_rps == none.current_rps
    assert none.net_gain == 0.0
    assert np.isinf(none.pays_after_s)


def test_a_switch_that_loses_if_earlier_traffic_returns_soon_gains_nothing(
    request_: PlanRequest,
) -> None:
    planner = planner_for(request_, StartTimes(5.0))
    scorer = SwitchScorer(model_of(request_, min_gain=-1.0))
    best, *_ = planner.candidates(RATES, empty(request_))
    half = replace(best, id="half", replicas=best.replicas[:1])
    simulation = SwitchSimulation(scorer, planner)
    # Half of the replicas are enough now, and too few for the traffic before.
    few = tuple(0.1 * rate for rate in RATES)
    soon, old = (
        simulation.case(
            asked_of(best, few, before=MANY, back_s=20.0, age_s=age_s), half, lasts_s=100.0
        )
        for age_s in (2.0, 200.0)
    )
    assert soon.back
    assert soon.returning == replace(soon, lasts_s=2.0)
    assert old.returning is None
    score = scorer.score(soon)
    assert score.net_gain < 0
    assert score.lasts_s == 2.0
    # Without earlier traffic to return there is nothing to lose, and no way back.
    alone = simulation.case(asked_of(best, few, age_s=2.0), half, lasts_s=100.0)
    assert not alone.back
    assert alone.returning is None
