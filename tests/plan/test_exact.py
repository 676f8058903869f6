"""The exact search against enumeration."""

import random
from dataclasses import replace

import numpy as np
import pytest

from oserve.core import ReplicaSpec
from oserve.plan.assign import Assigner
from oserve.plan.bounds import Bounds, ScoredCounts
from oserve.plan.brute import brute_force
from oserve.plan.dominance import undominated
from oserve.plan.exact import ExactSearch
from oserve.plan.homogeneous import homogeneous_deployments
from oserve.plan.place import place_replicas
from oserve.plan.problem import PlanProblem, ReplicaCounts, check_problem
from oserve.plan.proof import Proved
from oserve.plan.score import best_first, compare, criteria
from plan.instances import plan_of, random_problem


def solved(problem: PlanProblem, assigner: Assigner) -> Proved:
    first = homogeneous_deployments(problem, assigner)[0]
    return ExactSearch(problem, assigner).solve(first=first)


def with_current(problem: PlanProblem, seed: int) -> PlanProblem:
    """The same problem with some deployment in force."""
    rng = random.Random(seed)
    counts = [0] * len(problem.options)
    for i in rng.sample(range(len(counts)), len(counts)):
        counts[i] += 1
        if not problem.packing.fits(counts):
            counts[i] -= 1
    wanted = [(option.shape, n) for option, n in zip(problem.options, counts, strict=True)]
    replicas: tuple[ReplicaSpec, ...] = place_replicas(wanted, problem.devices).replicas
    return replace(problem, current=plan_of(*replicas))


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 8))]
)
def test_exact_equals_brute_force(block: int) -> None:
    """Served rate, scale, devices or power, and replicas kept: 200 problems up to 8 devices."""
    for seed in range(block * 25, block * 25 + 25):
        problem = random_problem(seed)
        if seed % 3 == 0:
            problem = with_current(problem, seed)
        check_problem(problem)
        assigner = Assigner(problem)
        oracle = brute_force(problem, assigner)
        found = solved(problem, assigner)
        assert compare(problem, oracle.score, found.best.score) == 0, (
            seed,
            criteria(problem, oracle.score),
            criteria(problem, found.best.score),
        )
        assert found.optimality_gap == 0
        assert problem.packing.fits(found.best.counts)


@pytest.mark.parametrize("seed", range(8))
def test_group_sizes_that_are_no_chain(seed: int) -> None:
    problem = random_problem(seed, widths=(1, 2, 3), option_count=4)
    assigner = Assigner(problem)
    oracle = brute_force(problem, assigner)
    assert compare(problem, oracle.score, solved(problem, assigner).best.score) == 0


@pytest.mark.parametrize("seed", range(8))
def test_brute_force_is_the_best_of_all_solved_one_by_one(seed: int) -> None:
    """The enumeration skips what its bounds rule out; here nothing is skipped."""
    problem = random_problem(seed, device_count=4, option_count=3)
    assigner = Assigner(problem)
    every = [
        ScoredCounts(counts=counts, score=assigner.score(counts))
        for counts in problem.packing.all_counts()
    ]
    best = best_first(problem, every, lambda scored: scored.score)[0]
    assert compare(problem, best.score, brute_force(problem, assigner).score) == 0


@pytest.mark.parametrize("seed", range(10))
def test_leaving_out_dominated_options_costs_nothing(seed: int) -> None:
    problem = random_problem(seed, device_count=6, option_count=8)
    kept = undominated(problem)
    fewer = replace(problem, options=tuple(problem.options[i] for i in kept))
    whole = brute_force(problem, Assigner(problem)).score
    assert compare(problem, whole, brute_force(fewer, Assigner(fewer)).score) == 0


@pytest.mark.parametrize("seed", range(10))
def test_limits_on_single_counts_hold(seed: int) -> None:
    problem = random_problem(seed)
    assigner = Assigner(problem)
    best = brute_force(problem, assigner)
    option = next(i for i, count in enumerate(best.counts) if count)
    empty = (0,) * len(best.counts)
    nothing = ScoredCounts(counts=empty, score=assigner.score(empty))
    limit = best.counts[option] - 1
    found = ExactSearch(problem, assigner, at_most={option: limit}).solve(first=nothing)
    left = np.array([c for c in problem.packing.all_counts() if c[option] <= limit])
    oracle = Bounds(problem, assigner).best_of(left)
    assert oracle is not None
    assert found.best.counts[option] <= limit
    assert compare(problem, oracle.score, found.best.score) == 0


@pytest.mark.parametrize("seed", range(6))
def test_an_optimum_that_is_none_does_not_pass(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's first answer replaced by a poor deployment, said to be the best there is."""

    def wrong(model: object, left_s: float) -> tuple[ReplicaCounts, float]:
        del model, left_s
        return poor.counts, poor.score.scale if by_scale else poor.score.served_rps

    problem = random_problem(seed, device_count=8)
    assigner = Assigner(problem)
    oracle = brute_force(problem, assigner)
    _, by_scale = ExactSearch(problem, assigner).relaxed()
    poor = homogeneous_deployments(problem, assigner)[-1]
    monkeypatch.setattr("oserve.plan.exact._CountModel.best", wrong)
    found = ExactSearch(problem, assigner).solve()
    assert compare(problem, oracle.score, found.best.score) == 0
    assert found.optimality_gap == 0


def test_without_time_the_first_deployment_stands_with_its_gap() -> None:
    problem = random_problem(1, device_count=16, option_count=8)
    assigner = Assigner(problem)
    first = homogeneous_deployments(problem, assigner)[-1]
    found = ExactSearch(problem, assigner, time_limit_s=0.0).solve(first=first)
    assert compare(problem, found.best.score, first.score) >= 0
    assert 0 <= found.optimality_gap <= 1


def test_a_thousand_devices_are_proved() -> None:
    problem = random_problem(5, device_count=1024, option_count=12)
    assigner = Assigner(problem)
    found = solved(problem, assigner)
    assert found.optimality_gap <= 1e-4
    assert problem.packing.fits(found.best.counts)


def test_the_best_of_a_set_may_be_the_incumbent_itself() -> None:
    problem = random_problem(2)
    assigner = Assigner(problem)
    best = brute_force(problem, assigner)
    bounds = Bounds(problem, assigner)
    others = np.array(list(problem.packing.all_counts()))[:50]
    assert bounds.best_of(others, best) is best
    assert bounds.best_of(others[:0]) is None
