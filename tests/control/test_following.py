"""Following the load on a ladder, on a virtual clock."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.decision import Reason, Trigger
from oserve.control.following import FollowPolicy, FollowScore, follow, loads_of
from oserve.control.ladder import Goal, Ladder
from oserve.control.load_facts import LoadFacts
from oserve.control.policy import HOUR_S
from oserve.core import Objective

from .ladders import (
    CAPACITY,
    ENERGY,
    LATENCY,
    SWITCH_S,
    Follower,
    everywhere,
    follower,
    ladder_of,
    plan_for,
    planner,
    rung,
    shape,
    three_rungs,
)

# Two types vary independently, so that their quantiles do not simply add up.
TWO = Goal(objectives=(Objective.LATENCY,) * 2)
HELD = (0.4, 0.7, 1.0)


def facts(
    *rates: float,
    coming: float | None = None,
    upper: float | None = None,
    peak: float | None = None,
    last: float | None = None,
) -> LoadFacts:
    """Rates by type now; forecast and peaks, if given, of the sum."""

    def spread(total: float | None) -> tuple[float, ...]:
        whole = sum(rates)
        if total is None or whole <= 0:
            return rates if total is None else (total / len(rates),) * len(rates)
        return tuple(total * rate / whole for rate in rates)

    steps = 5
    return LoadFacts(
        now=rates,
        last=spread(last),
        last_s=10.0,
        expected=(spread(coming),) * steps,
        upper=(spread(coming if upper is None else upper),) * steps,
        step_s=20.0,
        peaks=(spread(peak),),
        mix=rates,
        mix_s=600.0,
        burstiness=(0.0,) * len(rates),
        watched_s=600.0,
    )


def test_the_required_load_covers_the_forecast_until_a_switch_is_over() -> None:
    ladder, policy = three_rungs(), FollowPolicy(goal=LATENCY)
    steps = tuple((float(10 * n),) for n in range(1, 6))
    ahead = replace(facts(10.0), expected=steps, upper=steps)
    for lead_s, step in ((0.0, 1), (20.0, 2), (21.0, 3), (60.0, 4), (1e6, 5)):
        found = loads_of(ladder, ahead, policy, lead_s=lead_s)
        assert found.required == pytest.approx(1.1 * step)
        # A deployment for less load must hold all that is foreseen.
        assert found.fall_required == pytest.approx(1.1 * 5)
        assert found.expected == pytest.approx(3.0)


@given(
    now=st.floats(0.0, 30.0),
    last=st.floats(0.0, 30.0),
    coming=st.floats(0.0, 30.0),
    upper=st.floats(0.0, 60.0),
    peak=st.floats(0.0, 60.0),
    lead_s=st.floats(0.0, 1e4),
)
def test_loads_are_ordered(
    now: float, last: float, coming: float, upper: float, peak: float, lead_s: float
) -> None:
    policy = FollowPolicy(goal=LATENCY)
    seen = facts(now, coming=coming, upper=upper, peak=peak, last=last)
    found = loads_of(three_rungs(), seen, policy, lead_s=lead_s)
    assert found.present >= found.now - 1e-12
    assert found.required >= policy.headroom * found.present - 1e-9
    assert found.required >= policy.headroom * max(coming, upper) / 10.0 - 1e-9
    assert found.fall_required >= max(found.required, policy.headroom * peak / 10.0) - 1e-9
    assert found.expected > 0
    assert all(math.isfinite(value) for value in (found.now, found.present, found.fall_required))


def test_types_vary_independently() -> None:
    ladder = three_rungs(kinds=2)
    seen = replace(facts(5.0, 5.0), upper=((8.0, 9.0),) * 5)
    found = loads_of(ladder, seen, FollowPolicy(goal=TWO, headroom=1.0), lead_s=0.0)
    assert found.required == pytest.approx(1.0 + 0.5)


def test_few_requests_in_a_few_seconds_are_chance() -> None:
    policy = FollowPolicy(goal=LATENCY)
    for last, present in ((0.4, 0.1), (40.0, 0.9 * 4.0)):
        found = loads_of(three_rungs(), facts(1.0, last=last), policy, lead_s=0.0)
        assert found.present == pytest.approx(present, rel=0.01)


def scored(ladder: Ladder, seen: LoadFacts, current: int, goal: Goal = LATENCY) -> FollowScore:
    made = planner(len(goal.objectives))
    plan = plan_for(everywhere(current))
    found = follow(
        ladder,
        seen,
        FollowPolicy(goal=goal),
        current=plan,
        switch=lambda shapes: made.switch(plan, shapes),
        lead_s=30.0,
    )
    assert found is not None  # the ladder has the current deployment
    return found


@given(
    current=st.sampled_from((1, 2, 4)),
    goal=st.sampled_from((LATENCY, ENERGY, CAPACITY)),
    now=st.floats(0.0, 40.0),
    coming=st.floats(0.0, 40.0),
    peak=st.floats(0.0, 40.0),
)
def test_a_score_is_consistent(
    current: int, goal: Goal, now: float, coming: float, peak: float
) -> None:
    ladder = three_rungs()
    found = scored(ladder, facts(now, coming=coming, peak=peak), current, goal)
    assert found is not None
    held = HELD[(4, 2, 1).index(current)]
    near = min(abs(found.loads.required - held), abs(found.loads.present - held)) < 0.05
    if not near:
        assert found.rises == (found.loads.required > held)
        assert found.overloaded == (found.loads.present > held)
    assert (
        found.holds
        == (
            max(HELD) + 0.025
            >= (found.loads.required if found.rises else found.loads.fall_required)
        )
        or abs(found.loads.fall_required - 1.025) < 0.03
    )
    assert found.price >= 0
    same = {spec.shape for spec in found.plan.replicas} == {shape(current)}
    if same:
        assert (found.seconds, found.changed, found.touched, found.price) == (0.0, 0, 0.0, 0.0)
        assert found.gain_per_s == pytest.approx(0.0)
    else:
        assert found.seconds == pytest.approx(2 * SWITCH_S)
        assert found.changed == len(found.plan.replicas)
    for value in (found.current_cost, found.candidate_cost, found.gain_per_s, found.price):
        assert math.isfinite(value)


def test_a_deployment_that_is_not_on_the_ladder_has_no_score() -> None:
    assert scored(ladder_of(rung(everywhere(4), 0.4, 1.0)), facts(1.0), 2) is None


def test_roll_outs_cost_what_the_devices_left_cannot_carry() -> None:
    ladder = three_rungs()
    made = planner()
    plan = plan_for(everywhere(1))
    prices = []
    for share in (0.25, 0.5, 1.0):
        count = round(share * len(plan.replicas))

        def away(shapes: object, gone: int = count) -> object:
            new, legs = made.switch(plan, shapes)  # type: ignore[arg-type]
            return new, [replace(legs[0], leaving=plan.replicas[:gone], retired=())]

        found = follow(
            ladder,
            facts(2.0),
            FollowPolicy(goal=LATENCY),
            current=plan,
            switch=away,  # type: ignore[arg-type]
            lead_s=30.0,
        )
        assert found is not None
        prices.append(found.price)
    assert prices[0] < prices[1] < prices[2]


# -- over time ------------------------------------------------------------------------------------
def steady(load: float) -> Callable[[int], float]:
    return lambda _second: load


def step(at_s: int, before: float, after: float) -> Callable[[int], float]:
    return lambda second: before if second < at_s else after


def used_to(load: float, current: int = 4, **options: object) -> Follower:
    """A controller that has seen a steady load for a while."""
    made = follower(everywhere(current), three_rungs(), **options)  # type: ignore[arg-type]
    made.run(steady(load), 400, seed=None)
    assert made.shapes == everywhere(current)
    made.decisions.clear()
    return made


def test_it_climbs_at_once_and_comes_down_late() -> None:
    made = used_to(0.25)
    began_s = made.second
    made.run(steady(0.55), 120, seed=None)
    first = made.switches[0]
    assert first.reason is Reason.LOAD_RISES
    assert first.at_s - began_s < 12
    assert made.shapes in {everywhere(2), everywhere(1)}
    made.decisions.clear()
    began_s = made.second
    made.run(steady(0.25), 900, seed=None)
    assert made.shapes == everywhere(4)
    for item in made.switches:
        assert item.reason is Reason.OBJECTIVE_GAINS
        assert item.place is not None
        assert item.place.regret >= 1.5 * item.place.price
        # The highest load of the time before must have passed.
        assert item.at_s - began_s >= 270


def test_it_climbs_ahead_of_a_foreseen_rise() -> None:
    made = used_to(0.3, interval_s=20)
    ramp_s = made.second - 1000
    made.run(lambda second: 0.3 + 0.1 * (second - ramp_s) / 200, 400, seed=None)
    assert made.switches
    first = made.switches[0]
    assert first.reason is Reason.LOAD_RISES
    assert first.place is not None
    # Before the load reaches what the deployment holds, by at least the time of the switch.
    assert (0.4 - first.place.load) / 0.1 * 200 > 2 * SWITCH_S


def test_a_flash_crowd_goes_straight_to_the_capacity_plan() -> None:
    made = used_to(0.2)
    began_s = made.second
    made.run(steady(0.85), 15, seed=None)
    assert len(made.switches) == 1
    first = made.switches[0]
    assert first.trigger is Trigger.LOAD
    assert first.at_s - began_s < 8
    assert made.shapes == everywhere(1)


@pytest.mark.parametrize("boundary", [0.4 / 1.1, 0.7 / 1.1])
@given(st.data())
@settings(max_examples=8)
def test_noise_around_a_boundary_does_not_make_it_flap(
    boundary: float, data: st.DataObject
) -> None:
    wide = data.draw(st.floats(0.02, 0.2))
    period_s = data.draw(st.integers(5, 240))
    seed = data.draw(st.integers(0, 1000))
    draw = np.random.default_rng(seed)
    levels = boundary * (1 + wide * draw.uniform(-1, 1, 400))
    made = follower(everywhere(2), three_rungs())
    made.run(lambda second: float(levels[second // period_s % 400]), 1500, seed=seed)
    ups = [item for item in made.switches if item.reason is Reason.LOAD_RISES]
    downs = [item for item in made.switches if item.reason is Reason.OBJECTIVE_GAINS]
    assert len(ups) + len(downs) == len(made.switches)
    # Once it has climbed it stays for a while: at most once in each time that counts for a fall.
    assert len(downs) <= 1500 / 300
    assert len(ups) <= len(downs) + 2


@given(
    st.lists(st.tuples(st.integers(5, 200), st.floats(0.0, 1.6)), min_size=1, max_size=12),
    st.integers(0, 5),
)
@settings(max_examples=15)
def test_switches_have_a_limit(pieces: list[tuple[int, float]], most: int) -> None:
    made = follower(everywhere(2), three_rungs(), max_switches_per_hour=most)
    for seconds, load in pieces:
        made.run(steady(load), seconds, seed=seconds)
    at_s = [item.at_s for item in made.switches]
    for item in made.switches:
        assert item.place is not None
        before = sum(1 for s in at_s if item.at_s - HOUR_S < s < item.at_s)
        assert item.reason is Reason.LOAD_RISES or before < most
    for earlier, later in zip(made.switches, made.switches[1:], strict=False):
        assert later.at_s - earlier.at_s >= earlier.switch_s
    assert len(made.runtime.controller.decisions) <= made.runtime.controller.policy.decisions
