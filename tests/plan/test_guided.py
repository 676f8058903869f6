"""The flow-guided search against the exact one."""

import pytest

from oserve.plan.assign import Assigner
from oserve.plan.bounds import ScoredCounts
from oserve.plan.exact import ExactSearch
from oserve.plan.guided import guided_search
from oserve.plan.homogeneous import homogeneous_deployments
from oserve.plan.problem import Maximise, PlanProblem
from oserve.plan.score import compare
from plan.instances import random_problem


def value(problem: PlanProblem, scored: ScoredCounts) -> float:
    """The rate served of a demand scaled as far as it counts."""
    score = scored.score
    if problem.maximise is Maximise.THROUGHPUT or score.scale < 1:
        return score.served_rps
    return problem.demand_rps * min(score.scale, problem.enough_scale or score.scale)


@pytest.mark.slow
def test_guided_is_within_two_percent_of_exact_on_average_at_sixteen_devices() -> None:
    losses = []
    for seed in range(30):
        problem = random_problem(seed, device_count=16, option_count=8)
        assigner = Assigner(problem)
        first = homogeneous_deployments(problem, assigner)[0]
        exact = ExactSearch(problem, assigner).solve(first=first).best
        guided = guided_search(problem, assigner)
        assert problem.packing.fits(guided.counts)
        assert compare(problem, guided.score, exact.score) <= 0
        assert compare(problem, guided.score, first.score) >= 0
        losses.append(1 - value(problem, guided) / value(problem, exact))
    assert sum(losses) / len(losses) < 0.02
    assert max(losses) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_finds_the_same_deployment(seed: int) -> None:
    problem = random_problem(seed, device_count=12)
    once = guided_search(problem, Assigner(problem), seed=7)
    assert guided_search(problem, Assigner(problem), seed=7) == once


def test_the_search_improves_on_where_it_starts() -> None:
    problem = random_problem(4, device_count=16, option_count=8)
    assigner = Assigner(problem)
    worst = homogeneous_deployments(problem, assigner)[-1]
    found = guided_search(problem, assigner, start=worst)
    assert compare(problem, found.score, worst.score) > 0
    assert guided_search(problem, assigner, start=worst, idle_rounds=1).counts
