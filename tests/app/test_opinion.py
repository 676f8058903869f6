"""Deployments judged by simulation, as the live controller has it."""

from dataclasses import replace
from pathlib import Path

import pytest

from oserve.app.deployment import prepare
from oserve.app.opinion import Opinion
from oserve.app.planning import Question as PlanningQuestion
from oserve.app.steering import planner_for
from oserve.config import load_settings
from oserve.control.appraisal import Question, Step, weigh
from oserve.control.planner import TablePlanner
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan
from oserve.perf.capacity import Limits

RATES = (8.0, 0.2)


@pytest.fixture
def asked(model: str, tmp_path: Path) -> PlanningQuestion:
    given = prepare(
        load_settings(
            None,
            {
                "model": model,
                "state_dir": str(tmp_path),
                "cluster.devices": "cpu",
                "cluster.cpu_slots": 4,
                "planning.rates": "chats:60x120=6,documents:1500x20=0.2",
                "planning.slo_ttft_ms": 2000,
                "planning.slo_tpot_ms": 100,
            },
            {},
        )
    )
    assert given.question is not None
    return given.question


def test_it_tells_what_deployments_carry_and_the_model_gives_way(asked: PlanningQuestion) -> None:
    linear = planner_for(asked, StartTimes(5.0))
    opinion = Opinion(asked)
    planner = TablePlanner(opinion.refined(linear.facts))
    assert {row.shape for row in planner.facts.table} <= {row.shape for row in linear.facts.table}
    first, *_ = planner.candidates(RATES, _empty(asked))
    half = replace(first, id="half", replicas=first.replicas[:1])
    many = tuple(20.0 * rate for rate in RATES)
    for rates in (RATES, many):
        whole_rps, half_rps = (opinion.good_rps(plan, rates, 120.0) for plan in (first, half))
        assert half_rps <= whole_rps * 1.02
        assert whole_rps <= sum(rates) * 1.2
    step = Step(seconds=60.0, chances={many: 1.0}, expected=many)
    question = Question(
        at_s=0.0, current=half, now_rps=many, steps=(step,), lasts_s=100.0, plan_for=(many,)
    )
    found = weigh(question, first, planner)
    judged = opinion.scorer(planner)(question, found)
    assert judged == opinion.scorer(planner)(question, found)
    assert judged.worth <= (judged.candidate_rps - judged.current_rps) * found.lasts_s
    assert opinion.good_rps(first, (0.0, 0.0), 60.0) == 0.0
    # Who waits already is served first and does not count.
    late_rps = opinion.good_rps(first, RATES, 60.0, waiting=2000)
    assert late_rps < 0.5 * opinion.good_rps(first, RATES, 60.0)


def test_without_limits_the_model_stands(asked: PlanningQuestion) -> None:
    free = replace(asked, limits={kind.name: Limits() for kind in asked.demand.types})
    linear = planner_for(free, StartTimes(5.0))
    opinion = Opinion(free)
    assert opinion.refined(linear.facts).table == linear.facts.table
    plan = linear.candidates(RATES, _empty(free))[0]
    assert 0 < opinion.good_rps(plan, RATES, 60.0) <= 1.2 * sum(RATES)


def _empty(asked: PlanningQuestion) -> DeploymentPlan:
    return DeploymentPlan(
        id="none", replicas=(), workload_types=asked.demand.classes, routing_shares={}
    )
