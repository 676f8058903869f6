"""The ladder: scores between levels, and the deployment that an objective chooses."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.ladder import (
    P99_GUARD,
    Goal,
    Ladder,
    LadderDeployment,
    LoadScore,
    in_words,
)
from oserve.control.ladder_table import ladder_document, ladder_rows
from oserve.core import Objective

from .ladders import (
    CAPACITY,
    ENERGY,
    LATENCY,
    everywhere,
    ladder_of,
    rung,
    score,
    shape,
    three_rungs,
)

shares = st.floats(0.0, 1.0)
seconds = st.floats(0.05, 60.0)
loads = st.floats(0.01, 5.0)


@st.composite
def deployments(draw: st.DrawFn, name: int, kinds: int) -> LadderDeployment:
    levels = sorted(draw(st.sets(st.sampled_from((0.05, 0.2, 0.5, 0.8, 1.0, 1.3)), min_size=1)))
    scores = [
        LoadScore(
            load=load,
            attainment=draw(shares),
            type_attainment=tuple(draw(shares) for _ in range(kinds)),
            type_e2e_s=tuple(draw(seconds) for _ in range(kinds)),
            p50_e2e_s=draw(seconds),
            p99_e2e_s=draw(seconds),
            p50_ttft_s=draw(seconds),
            p99_ttft_s=draw(seconds),
            joules=draw(st.floats(1.0, 1e5)),
        )
        for load in levels
    ]
    return LadderDeployment(shapes=((shape(1), name + 1),), scores=tuple(scores))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Ladder, Goal]:
    kinds = draw(st.integers(1, 3))
    items = [draw(deployments(name, kinds)) for name in range(draw(st.integers(1, 5)))]
    objectives = tuple(draw(st.sampled_from(list(Objective))) for _ in range(kinds))
    goal = Goal(objectives=objectives, attainment=draw(st.sampled_from((0.5, 0.9, 0.95))))
    return ladder_of(*items, kinds=kinds), goal


def values(item: LoadScore) -> list[float]:
    return [
        item.attainment,
        item.p50_e2e_s,
        item.p99_e2e_s,
        item.p50_ttft_s,
        item.p99_ttft_s,
        item.joules,
        *item.type_attainment,
        *item.type_e2e_s,
    ]


@given(deployments(0, 2), loads)
def test_scores_lie_between_those_of_the_levels(item: LadderDeployment, load: float) -> None:
    at = item.at(load)
    assert at.load == load
    for level in item.scores:
        assert values(item.at(level.load)) == pytest.approx(values(level))
    if load <= item.scores[0].load:
        assert values(at) == values(item.scores[0])
    elif load < item.scores[-1].load:
        low = max((s for s in item.scores if s.load <= load), key=lambda s: s.load)
        high = min((s for s in item.scores if s.load >= load), key=lambda s: s.load)
        for least, found, most in zip(values(low), values(at), values(high), strict=True):
            assert min(least, most) - 1e-9 <= found <= max(least, most) + 1e-9


@given(deployments(0, 2), st.floats(1.0, 50.0))
def test_overload_keeps_what_is_served_in_time(item: LadderDeployment, beyond: float) -> None:
    last = item.scores[-1]
    at = item.at(last.load * beyond)
    assert at.load * at.attainment == pytest.approx(last.load * last.attainment)
    for found, whole in zip(at.type_attainment, last.type_attainment, strict=True):
        assert at.load * found == pytest.approx(last.load * whole)
    assert at.type_e2e_s == last.type_e2e_s


@given(cases(), loads, loads, st.integers(0, 5))
def test_a_deployment_that_holds_is_chosen_wherever_there_is_one(
    case: tuple[Ladder, Goal], required: float, expected: float, near: int
) -> None:
    ladder, goal = case
    found = ladder.choose(goal, required=required, expected=expected, near=((shape(1), near),))
    at = [item.at(required) for item in ladder.deployments]
    mine = at[found.index]
    able = [item for item in at if item.attainment >= goal.attainment]
    assert found.holds == bool(able)
    assert math.isfinite(found.cost)
    if not able:
        assert mine.attainment >= max(item.attainment for item in at) - 0.01 - 1e-12
        return
    assert mine.attainment >= goal.attainment
    holding = ladder.scores(required).holding(goal)
    assert found.index in holding
    least = [
        min(goal.attainment, max(item.type_attainment[kind] for item in able)) - 0.0101
        for kind in range(len(goal.objectives))
    ]
    if any(
        all(own >= need for own, need in zip(item.type_attainment, least, strict=True))
        for item in able
    ):
        assert all(own >= need for own, need in zip(mine.type_attainment, least, strict=True))
    if Objective.LATENCY in goal.objectives:
        tails = [ladder.deployments[index].at(expected).p99_e2e_s for index in holding]
        own = ladder.deployments[found.index].at(expected).p99_e2e_s
        assert own <= P99_GUARD * min(tails) + 1e-9


@given(cases(), loads, loads)
def test_the_choice_costs_at_most_a_hundredth_more_than_the_best(
    case: tuple[Ladder, Goal], required: float, expected: float
) -> None:
    ladder, goal = case
    found = ladder.choose(goal, required=required, expected=expected)
    if not found.holds:
        return
    at = ladder.scores(expected)
    allowed = at.guarded(ladder.scores(required).holding(goal), goal)
    if set(goal.objectives) == {Objective.CAPACITY}:
        most = max(ladder.capacity(index, goal) for index in allowed)
        assert 1.01 * ladder.capacity(found.index, goal) >= most - 1e-6
    else:
        least = min(at.objective(index, goal) for index in allowed)
        assert at.objective(found.index, goal) <= 1.01 * least + 1e-9
        assert found.cost >= 1.0 - 1e-9


@given(cases())
def test_a_deployment_holds_up_to_its_capacity(case: tuple[Ladder, Goal]) -> None:
    ladder, goal = case
    for index, item in enumerate(ladder.deployments):
        held = ladder.capacity(index, goal)
        if held == 0.0:
            assert item.scores[0].attainment < goal.attainment
            continue
        assert item.scores[0].load <= held <= item.scores[-1].load
        for load in np.linspace(item.scores[0].load, held, 7):
            assert item.at(float(load)).attainment >= goal.attainment - 1e-9
        if held < item.scores[-1].load:
            assert item.at(held + 1e-6).attainment <= goal.attainment + 1e-5


@given(st.lists(st.floats(0.0, 100.0), min_size=3, max_size=3), st.floats(0.1, 10.0))
def test_load_counts_work(rates: list[float], factor: float) -> None:
    ladder = replace(
        ladder_of(rung(everywhere(1), 1.0, 1.0, kinds=3), kinds=3),
        rates=(1.0, 2.0, 3.0),
        work=(3.0, 2.0, 1.0),
    )
    given_rates = tuple(rates)
    assert ladder.load(ladder.rates) == pytest.approx(1.0)
    assert sum(ladder.loads_by_type(given_rates)) == pytest.approx(ladder.load(given_rates))
    scaled = tuple(factor * rate for rate in rates)
    assert ladder.load(scaled) == pytest.approx(factor * ladder.load(given_rates))
    # The mix does not depend on how much comes.
    assert 0.0 <= ladder.distance(given_rates) <= 1.0
    assert ladder.distance(scaled) == pytest.approx(ladder.distance(given_rates))
    assert ladder.distance(tuple(factor * rate for rate in ladder.rates)) == pytest.approx(0.0)


def test_the_mix_differs_by_the_work_of_other_types() -> None:
    ladder = replace(ladder_of(rung(everywhere(1), 1.0, 1.0, kinds=2), kinds=2), work=(1.0, 3.0))
    assert ladder.distance((5.0, 0.0)) == pytest.approx(0.75)
    assert ladder.distance((0.0, 5.0)) == pytest.approx(0.25)
    assert ladder.distance((0.0, 0.0)) == 0.0


def test_each_objective_has_its_own_rung() -> None:
    ladder = three_rungs()
    chosen = {
        (goal, load): ladder.deployments[
            ladder.choose(goal, required=1.1 * load, expected=load).index
        ].shapes
        for goal in (LATENCY, ENERGY, CAPACITY)
        for load in (0.2, 0.5, 0.9)
    }
    assert [chosen[LATENCY, load] for load in (0.2, 0.5, 0.9)] == [
        everywhere(4),
        everywhere(2),
        everywhere(1),
    ]
    assert {chosen[goal, load] for goal in (ENERGY, CAPACITY) for load in (0.2, 0.5, 0.9)} == {
        everywhere(1)
    }


def test_the_largest_capacity_costs_one() -> None:
    ladder = three_rungs()
    only = replace(ladder, deployments=ladder.deployments[:2])
    assert ladder.choose(CAPACITY, required=0.1, expected=0.1).cost == pytest.approx(1.0)
    assert only.choose(CAPACITY, required=0.1, expected=0.1).cost == pytest.approx(1.0)


def test_types_may_have_other_objectives() -> None:
    two = (Objective.LATENCY, Objective.ENERGY)
    fast = LadderDeployment(
        shapes=everywhere(4),
        scores=(replace(score(0.1, 1.0, kinds=2, joules=300.0), type_e2e_s=(1.0, 1.0)),),
    )
    frugal = LadderDeployment(
        shapes=everywhere(1),
        scores=(replace(score(0.1, 1.0, kinds=2, joules=100.0), type_e2e_s=(1.05, 9.0)),),
    )
    ladder = ladder_of(fast, frugal, kinds=2)
    # The second type's latency does not count, its energy does.
    assert ladder.choose(Goal(objectives=two), required=0.1, expected=0.1).index == 1
    latency = Goal(objectives=(Objective.LATENCY,) * 2)
    assert ladder.choose(latency, required=0.1, expected=0.1).index == 0


def test_of_equals_the_nearest_wins() -> None:
    one, other = rung(everywhere(4), 0.8, 1.0), rung(everywhere(2), 0.8, 1.005)
    ladder = ladder_of(one, other)
    for item in (one, other):
        found = ladder.choose(LATENCY, required=0.3, expected=0.3, near=item.shapes)
        assert ladder.deployments[found.index] == item
    clearly = ladder_of(one, rung(everywhere(2), 0.8, 1.05))
    found = clearly.choose(LATENCY, required=0.3, expected=0.3, near=everywhere(2))
    assert found.index == 0


def test_of_equals_as_near_the_one_that_carries_most_wins() -> None:
    small, large = rung(everywhere(4), 0.4, 1.0), rung(everywhere(2), 0.6, 1.005)
    ladder = ladder_of(small, large)
    for near, chosen in (((), 1), (everywhere(1), 1), (everywhere(4), 0)):
        found = ladder.choose(LATENCY, required=0.2, expected=0.2, near=near)
        assert found.index == chosen


def test_what_nobody_holds_goes_to_the_largest_attainment() -> None:
    ladder = three_rungs()
    found = ladder.choose(LATENCY, required=3.0, expected=3.0, near=everywhere(4))
    assert (found.index, found.holds) == (2, False)
    assert found.cost > 5.0


def test_a_part_of_a_deployment_carries_its_part() -> None:
    ladder = three_rungs()
    part = ((shape(2), 1),)
    found = ladder.including(part)
    index = found.find(part)
    assert index is not None
    whole = ladder.find(everywhere(2))
    assert whole is not None
    assert found.capacity(index, LATENCY) == pytest.approx(ladder.capacity(whole, LATENCY) / 4)
    assert found.deployments[:-1] == ladder.deployments
    for other in (everywhere(4), (), ((shape(8), 1),), ((shape(2), 5),)):
        assert ladder.including(other) is ladder


def test_barred_shapes_are_on_no_rung() -> None:
    ladder = three_rungs()
    left = ladder.without(frozenset({shape(4), shape(2)}), kept=everywhere(2))
    assert [item.shapes for item in left.deployments] == [everywhere(2), everywhere(1)]
    assert ladder.without(frozenset(), kept=()) is ladder


def test_a_rung_keeps_the_deployment_below_among_equals() -> None:
    rows = ladder_rows(three_rungs(), LATENCY, (0.1, 0.3, 0.5, 0.9, 2.0), headroom=1.1)
    assert [row.shapes for row in rows] == [
        everywhere(4),
        everywhere(4),
        everywhere(2),
        everywhere(1),
        everywhere(1),
    ]
    assert [row.holds for row in rows] == [True, True, True, True, False]
    assert [row.devices for row in rows] == [8] * 5
    assert rows[1].rate_rps == pytest.approx(3.0)
    assert rows[0].score == three_rungs().deployments[0].at(0.1)


def test_a_ladder_is_a_document() -> None:
    found = ladder_document(three_rungs(), LATENCY, headroom=1.1)
    assert found["objectives"] == {"type0": "latency"}
    assert [item["deployment"] for item in found["rungs"]] == [
        in_words(everywhere(4)),
        in_words(everywhere(2)),
        in_words(everywhere(1)),
    ]
    assert found["capacity_rps"] == pytest.approx(10.25)
    assert in_words(()) == "no replica"
