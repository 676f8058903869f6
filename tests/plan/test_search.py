"""Planning as callers use it."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from oserve.core import LengthClass, OServeError
from oserve.plan import check_plan
from oserve.plan.deploy import place_deployment
from oserve.plan.problem import Maximise, PlanProblem
from oserve.plan.score import compare
from oserve.plan.search import Search, plan_deployment
from plan.instances import plan_of, random_problem


@pytest.mark.parametrize("seed", range(8))
def test_the_three_searches_agree_on_what_can_be_reached(seed: int) -> None:
    problem = random_problem(seed)
    exact = plan_deployment(problem, Search.EXACT, candidates=5)
    brute = plan_deployment(problem, Search.BRUTE, candidates=0)
    flow = plan_deployment(problem, Search.FLOW, candidates=0)
    assert compare(problem, exact.best.score, brute.best.score) == 0
    assert compare(problem, flow.best.score, exact.best.score) <= 0
    assert exact.optimality_gap == brute.optimality_gap == 0
    assert flow.bounds_scale == exact.bounds_scale or flow.optimality_gap > 0
    seen = {exact.best.counts}
    last = exact.best.score
    for candidate in exact.candidates:
        assert candidate.counts not in seen
        assert problem.packing.fits(candidate.counts)
        assert compare(problem, candidate.score, last) <= 0
        seen.add(candidate.counts)
        last = candidate.score
    assert len(exact.candidates) <= 5
    assert brute.candidates == ()


@pytest.mark.parametrize("seed", range(8))
def test_every_homogeneous_deployment_is_there_and_none_is_better(seed: int) -> None:
    problem = random_problem(seed)
    planned = plan_deployment(problem, candidates=0)
    kinds = {device.kind for device in problem.devices}
    for deployment in planned.homogeneous:
        used = [option for option, n in zip(problem.options, deployment.counts, strict=True) if n]
        assert len({option.shape.device_kind for option in used}) == len(used)
        assert compare(problem, planned.best.score, deployment.score) >= 0
    if len(kinds) == 1:
        fitting = sum(problem.packing.largest(i) > 0 for i in range(len(problem.options)))
        assert len(planned.homogeneous) == fitting
    scores = [deployment.score for deployment in planned.homogeneous]
    assert all(compare(problem, a, b) >= 0 for a, b in pairwise(scores))


@pytest.mark.parametrize("least", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_several_shapes(seed: int, least: int) -> None:
    free = random_problem(seed)
    problem = replace(free, min_shapes=least)
    exact = plan_deployment(problem, Search.EXACT, candidates=5).best
    brute = plan_deployment(problem, Search.BRUTE, candidates=0).best
    assert compare(problem, exact.score, brute.score) == 0
    assert problem.is_varied(exact.counts) == problem.is_varied(brute.counts)
    best = plan_deployment(free, candidates=0).best
    assert compare(problem, exact.score, best.score) <= 0
    # Where the best has them anyhow, it is the same.
    if problem.is_varied(best.counts):
        assert compare(problem, exact.score, best.score) == 0
    elif not problem.is_varied(exact.counts):
        assert sum(exact.counts) == 0


def test_several_shapes_are_not_for_the_flow_guided_search() -> None:
    problem = replace(random_problem(0), min_shapes=2)
    with pytest.raises(OServeError, match="several shapes"):
        plan_deployment(problem, Search.FLOW, candidates=0)


@pytest.mark.parametrize("seed", range(10))
def test_a_placed_deployment_is_a_valid_plan(seed: int) -> None:
    problem = random_problem(seed)
    best = plan_deployment(problem, candidates=0).best
    placed = place_deployment(problem, best)
    bounds = [*range(100, 100 * len(problem.types), 100), None]
    plan = replace(
        plan_of(*placed.replicas),
        length_classes=tuple(
            LengthClass(name=kind.name, max_prompt_tokens=bound)
            for kind, bound in zip(problem.types, bounds, strict=True)
        ),
        routing_shares=placed.routing_shares,
    )
    check_plan(plan, problem.devices)
    assert set(placed.utilisation) == {spec.id for spec in placed.replicas}
    # In force, it is its own best successor, and nothing moves.
    again = replace(problem, current=plan)
    planned = plan_deployment(again, candidates=0)
    assert planned.best.score.kept == len(plan.replicas)
    repeated = place_deployment(again, planned.best)
    assert repeated.moved_fraction == 0.0
    assert set(repeated.replicas) == set(placed.replicas)


def test_throughput_ignores_headroom() -> None:
    problem = replace(
        random_problem(3, load=(0.1, 0.2)), maximise=Maximise.THROUGHPUT, enough_scale=None
    )
    small = plan_deployment(problem, candidates=0)
    large = plan_deployment(replace(problem, maximise=Maximise.CAPACITY), candidates=0)
    assert small.best.score.served_rps == pytest.approx(problem.demand_rps)
    assert not small.bounds_scale
    assert large.bounds_scale
    assert small.best.score.scale <= large.best.score.scale


def test_enough_headroom_leaves_devices_unused() -> None:
    problem = replace(
        random_problem(3, load=(0.1, 0.2)), maximise=Maximise.CAPACITY, enough_scale=None
    )
    every = plan_deployment(problem, candidates=0).best.score
    enough = plan_deployment(replace(problem, enough_scale=1.1), candidates=0)
    assert enough.best.score.scale >= 1.1 * (1 - 1e-6)
    assert enough.best.score.device_count < every.device_count
    assert enough.bound == pytest.approx(1.1)


def with_rate(problem: PlanProblem, rate: float) -> PlanProblem:
    first = replace(problem.types[0], arrival_rate_rps=rate)
    return replace(problem, types=(first, *problem.types[1:]))


def with_capacity(problem: PlanProblem, value: float) -> PlanProblem:
    options = tuple(
        replace(option, capacity_rps=(value, *option.capacity_rps[1:]))
        for option in problem.options
    )
    return replace(problem, options=options)


def too_wide(problem: PlanProblem) -> PlanProblem:
    wide = replace(problem.options[0].shape, tensor_parallel_size=64)
    return replace(problem, options=(replace(problem.options[0], shape=wide),))


BAD: dict[str, Callable[[PlanProblem], PlanProblem]] = {
    "empty cluster": lambda p: replace(p, devices=()),
    "no workload types": lambda p: replace(p, types=()),
    "zero traffic": lambda p: replace(
        p, types=tuple(replace(kind, arrival_rate_rps=0.0) for kind in p.types)
    ),
    "arrives at nan": lambda p: with_rate(p, math.nan),
    "arrives at inf": lambda p: with_rate(p, math.inf),
    "arrives at -1": lambda p: with_rate(p, -1.0),
    "capacity of nan": lambda p: with_capacity(p, math.nan),
    "capacity of -1": lambda p: with_capacity(p, -1.0),
    "capacity of inf": lambda p: with_capacity(p, math.inf),
    "values for": lambda p: replace(
        p, options=(replace(p.options[0], capacity_rps=(1.0,) * 9), *p.options[1:])
    ),
    "latency of inf": lambda p: replace(
        p,
        options=(replace(p.options[-1], latency_s=(math.inf,) * len(p.types)),),
    ),
    "draws nan W": lambda p: replace(p, options=(replace(p.options[0], power_w=math.nan),)),
    "can serve workload type 'type0'": lambda p: with_capacity(p, 0.0),
    "fits on": too_wide,
    "no replica shapes": lambda p: replace(p, options=()),
    "stands 2 times": lambda p: replace(p, options=(p.options[0], *p.options)),
    "enough_scale": lambda p: replace(p, enough_scale=0.5),
}


@pytest.mark.parametrize("message", BAD)
def test_a_senseless_problem_is_refused_with_a_place_and_a_remedy(message: str) -> None:
    problem = random_problem(8)
    assert problem.types[0].arrival_rate_rps > 0
    with pytest.raises(OServeError, match=message) as refused:
        plan_deployment(BAD[message](problem))
    assert refused.value.place.startswith("plan.")
    assert refused.value.remedy


def test_brute_force_refuses_what_it_cannot_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oserve.plan.brute.MOST_DEPLOYMENTS", 10)
    with pytest.raises(OServeError, match="more than 10 deployments"):
        plan_deployment(random_problem(1, device_count=8), Search.BRUTE, candidates=0)
