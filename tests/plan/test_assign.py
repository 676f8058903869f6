"""The lower level: scores, duals, ties, shares."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from oserve.core import ReplicaShape
from oserve.plan.assign import Assigner
from oserve.plan.problem import PlanProblem, ReplicaCounts
from oserve.plan.score import EQUAL
from plan.instances import random_problem


def some_counts(problem: PlanProblem, rng: random.Random) -> ReplicaCounts:
    return tuple(rng.randint(0, 2) for _ in problem.options)


def reference(problem: PlanProblem, counts: ReplicaCounts, scale: float | None) -> float:
    """By scipy: the most served within the demand, or (scale None) the largest scale."""
    pairs = [(i, j) for i in range(len(counts)) for j in range(len(problem.types))]
    width = len(pairs) + 1
    rows: list[np.ndarray] = []
    limits: list[float] = []
    for i, count in enumerate(counts):
        row = np.zeros(width)
        for column, (k, j) in enumerate(pairs):
            capacity = problem.options[k].capacity_rps[j]
            row[column] = 1 / capacity if k == i and capacity else 0.0
        rows.append(row)
        limits.append(count)
    for j, kind in enumerate(problem.types):
        row = np.array([float(t == j) for _, t in pairs] + [0.0])
        if scale is None:
            row, limit = -row, 0.0
            row[-1] = kind.arrival_rate_rps
        else:
            limit = kind.arrival_rate_rps * scale
        rows.append(row)
        limits.append(limit)
    bounds = [(0.0, None if problem.options[k].capacity_rps[j] else 0.0) for k, j in pairs]
    costs = np.zeros(width)
    if scale is None:
        costs[-1] = -1.0
    else:
        costs[:-1] = -1.0
    found = linprog(costs, A_ub=np.array(rows), b_ub=limits, bounds=[*bounds, (0.0, None)])
    return float(-found.fun)


@pytest.mark.parametrize("seed", range(25))
def test_the_score_is_that_of_the_linear_programme(seed: int) -> None:
    problem = random_problem(seed)
    assigner = Assigner(problem)
    rng = random.Random(seed)
    for _ in range(4):
        counts = some_counts(problem, rng)
        score = assigner.score(counts)
        assert score.scale == pytest.approx(reference(problem, counts, None), rel=1e-6, abs=1e-9)
        assert score.served_rps == pytest.approx(
            reference(problem, counts, 1.0), rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("seed", range(25))
def test_an_assignment_keeps_within_capacity_and_demand(seed: int) -> None:
    problem = random_problem(seed)
    assigner = Assigner(problem)
    rng = random.Random(seed)
    for _ in range(3):
        counts = some_counts(problem, rng)
        score = assigner.score(counts)
        found = assigner.assign(counts)
        served = np.array(found.served_rps)
        assert served.sum() == pytest.approx(score.served_rps, rel=1e-5, abs=1e-9)
        for j, kind in enumerate(problem.types):
            assert served[:, j].sum() <= kind.arrival_rate_rps * (1 + 1e-6)
        assert (served[np.array(counts) == 0] == 0).all()
        peak = 1.0 if score.scale < 1 else 1 / score.scale
        assert max(found.utilisation) <= peak * (1 + 1e-5)
        if sum(counts):
            assert np.array(found.shares).sum(axis=0) == pytest.approx(1.0)
            placed = {i for i, count in enumerate(counts) if count}
            assert set(found.saturated) | set(found.slack) == placed


@pytest.mark.parametrize("seed", range(40))
def test_the_price_is_what_a_little_more_of_a_type_costs(seed: int) -> None:
    problem = random_problem(seed)
    rng = random.Random(seed)
    counts = tuple(rng.randint(1, 2) for _ in problem.options)
    score = Assigner(problem).score(counts)
    price = Assigner(problem).assign(counts).price
    for j, kind in enumerate(problem.types):
        extra = 1e-5 * problem.demand_rps
        more = replace(kind, arrival_rate_rps=kind.arrival_rate_rps + extra)
        types = (*problem.types[:j], more, *problem.types[j + 1 :])
        scale = Assigner(replace(problem, types=types)).score(counts).scale
        growth = 1 / scale - 1 / score.scale
        assert growth == pytest.approx(price[j] * extra, rel=0.02, abs=1e-8)


def test_a_type_nobody_can_serve_has_no_price_and_does_not_spoil_the_others() -> None:
    problem = random_problem(3, option_count=2)
    options = tuple(
        replace(option, capacity_rps=(0.0, *option.capacity_rps[1:])) for option in problem.options
    )
    counts = (1,) * len(options)
    assert len(problem.types) > 1
    assert problem.types[0].arrival_rate_rps > 0
    found = Assigner(replace(problem, options=options)).assign(counts)
    assert found.price[0] == math.inf
    assert all(math.isfinite(price) for price in found.price[1:])
    assert sum(row[0] for row in found.served_rps) == 0
    assert sum(row[0] for row in found.shares) == pytest.approx(1)


def test_ties_go_to_the_lower_latency() -> None:
    problem = random_problem(0)
    types = (replace(problem.types[0], arrival_rate_rps=1.0),)
    slow = replace(problem.options[0], capacity_rps=(2.0,), latency_s=(3.0,))
    fast = replace(slow, shape=ReplicaShape(max_num_batched_tokens=7), latency_s=(1.0,))
    # Twice the room: the peak is fixed at a quarter, and both must work to keep to it ...
    problem = replace(problem, types=types, options=(slow, fast))
    even = Assigner(problem).assign((1, 1))
    assert even.utilisation == pytest.approx((0.25, 0.25), rel=1e-5)
    # ... but where a second type sets the peak, the first goes where it is fastest.
    both = (*types, replace(types[0], name="heavy", arrival_rate_rps=1.0))
    heavy = replace(
        slow,
        shape=ReplicaShape(max_num_batched_tokens=9),
        capacity_rps=(0.0, 1.25),
        latency_s=(math.inf, 1.0),
    )
    options = tuple(
        replace(option, capacity_rps=(2.0, 0.0), latency_s=(*option.latency_s, math.inf))
        for option in (slow, fast)
    )
    found = Assigner(replace(problem, types=both, options=(*options, heavy))).assign((1, 1, 1))
    assert found.shares[1][0] == pytest.approx(1.0, abs=1e-5)
    assert found.saturated == (2,)
    assert found.slack == (0, 1)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_from_duals_hold_for_every_deployment(seed: int) -> None:
    problem = random_problem(seed)
    assigner = Assigner(problem)
    rng = random.Random(seed)
    score, bound, by_scale = assigner.score_and_bound(some_counts(problem, rng))
    here = bound.constant + bound.worth @ np.array(some_counts(problem, random.Random(seed)))
    value = score.scale if by_scale else score.served_rps
    assert here == pytest.approx(value, rel=1e-6, abs=1e-9)
    for _ in range(10):
        other = some_counts(problem, rng)
        found = assigner.score(other)
        value = found.scale if by_scale else found.served_rps
        assert value <= (bound.constant + bound.worth @ np.array(other)) * (1 + EQUAL) + 1e-9
