"""Deployments judged by simulation, as the live controller has it."""

from dataclasses import replace
from pathlib import Path

import pytest

from oserve.app.deployment import prepare
from oserve.config import load_settings
from oserve.control.evaluation import Question, Step, weigh
from oserve.control.planner import TablePlanner
from oserve.control.planning import planner_for
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan
from oserve.evaluate.switch_simulation import Opinion
from oserve.perf.capacity import Limits
from oserve.plan.planning import PlanRequest

RATES = (8.0, 0.2)


@pytest.fixture
def asked(model: str, tmp_path: Path) -> PlanRequest:
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
    assert given.question is not None
    return given.question


@pytest.mark.slow
def test_it_tells_what_deployments_carry_and_the_model_gives_way(asked: PlanRequest) -> None:
    linear = planner_for(asked, StartTimes(5.0))
    opinion = Opinion(asked)
    planner = TablePlanner(opinion.refined(linear.facts))
    assert {row.shape for row in planner.facts.table} <= {row.shape for row in linear.facts.table}
    first, *_ = planner.candidates(RATES, _empty(asked))
    half = replace(first, id="half", replicas=first.replicas[:1])
    many = tuple(20.0 * rate for rate in RATES)
    for rates in (RATES, many):
        ahead = opinion.prospect(_asked(half, rates), 120.0)
        whole, part = (opinion.good(plan, ahead.traffic).sum() for plan in (first, half))
        assert part <= whole * 1.02
    step = Step(seconds=60.0, chances={many: 1.0}, expected=many)
    question = Question(
        at_s=0.0, current=half, now_rps=many, steps=(step,), lasts_s=100.0, plan_for=(many,)
    )
    found = weigh(question, first, planner)
    judged = opinion.scorer(planner)(question, found)
    assert judged == opinion.scorer(planner)(question, found)
    assert judged.worth <= (judged.candidate_rps - judged.current_rps) * found.lasts_s
    # What came before is served first, and does not count.
    crowded = replace(_asked(half, RATES), past=((tuple(400.0 * rate for rate in RATES), 5.0),))
    assert _good_rps(opinion, first, crowded) < 0.5 * _good_rps(opinion, first, _asked(half, RATES))


def _asked(plan: DeploymentPlan, rates: tuple[float, ...]) -> Question:
    step = Step(seconds=60.0, chances={rates: 1.0}, expected=rates)
    return Question(
        at_s=0.0, current=plan, now_rps=rates, steps=(step,), lasts_s=60.0, plan_for=(rates,)
    )


def _good_rps(opinion: Opinion, plan: DeploymentPlan, question: Question) -> float:
    ahead = opinion.prospect(question, 60.0)
    return float((opinion.good(plan, ahead.traffic) & ahead.expected).sum()) / ahead.lasting_s


def test_without_limits_the_model_stands(asked: PlanRequest) -> None:
    free = replace(asked, limits={kind.name: Limits() for kind in asked.demand.types})
    linear = planner_for(free, StartTimes(5.0))
    opinion = Opinion(free)
    assert opinion.refined(linear.facts).table == linear.facts.table
    plan = linear.candidates(RATES, _empty(free))[0]
    assert 0 < _good_rps(opinion, plan, _asked(plan, RATES)) <= 1.3 * sum(RATES)


def _empty(asked: PlanRequest) -> DeploymentPlan:
    return DeploymentPlan(
        id="none", replicas=(), workload_types=asked.demand.classes, routing_shares={}
    )
