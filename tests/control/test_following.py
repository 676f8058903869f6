"""Following the load on a ladder, on a virtual clock."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.decision import Decision, DecisionVerdict, Mode, Reason, Trigger
from oserve.control.evaluation import Leg
from oserve.control.following import FollowPolicy, FollowScore, follow, loads_of
from oserve.control.ladder import Goal, Ladder, LadderDeployment, Shapes
from oserve.control.load_facts import LoadFacts
from oserve.control.memory import recall
from oserve.control.policy import HOUR_S
from oserve.core import DeploymentPlan, Objective, ReplicaSpec

from .ladders import (
    CAPACITY,
    ENERGY,
    LATENCY,
    PLANNERS,
    SWITCH_S,
    Follower,
    everywhere,
    facts,
    follower,
    ladder_of,
    plan_for,
    planner,
    rung,
    score,
    shape,
    three_rungs,
    waves,
)

# Two types vary independently, so that their quantiles do not simply add up.
TWO = Goal(objectives=(Objective.LATENCY,) * 2)
HELD = (0.4, 0.7, 1.0)


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
    assert found.required >= policy.headroom * coming / 10.0 - 1e-9
    assert found.fall_required >= max(found.required, policy.headroom * peak / 10.0) - 1e-9
    assert found.expected > 0
    assert all(math.isfinite(value) for value in (found.now, found.present, found.fall_required))


def test_types_vary_independently() -> None:
    ladder = three_rungs(kinds=2)
    seen = replace(facts(5.0, 5.0), upper=((8.0, 9.0),) * 5)
    found = loads_of(ladder, seen, FollowPolicy(goal=TWO, headroom=1.0), lead_s=0.0)
    assert found.required == pytest.approx(1.0 + 0.5, rel=0.02)


def test_few_requests_in_a_few_seconds_are_chance() -> None:
    policy = FollowPolicy(goal=LATENCY)
    for last, present in ((0.4, 0.1), (40.0, 0.9 * 4.0)):
        found = loads_of(three_rungs(), facts(1.0, last=last), policy, lead_s=0.0)
        assert found.present == pytest.approx(present, rel=0.01)


def scored(
    ladder: Ladder, seen: LoadFacts, current: int, goal: Goal = LATENCY
) -> FollowScore | None:
    plan = plan_for(everywhere(current))
    return follow(
        ladder,
        seen,
        FollowPolicy(goal=goal),
        current=plan,
        switch=lambda shapes: PLANNERS[0].switch(plan, shapes),
        lead_s=30.0,
    )


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
    plan = plan_for(everywhere(1))
    prices = []
    for count in (2, 4, 8):

        def away(shapes: Shapes, gone: int = count) -> tuple[DeploymentPlan, Sequence[Leg]]:
            new, legs = PLANNERS[0].switch(plan, shapes)
            return new, [replace(legs[0], leaving=plan.replicas[:gone], retired=())]

        found = follow(
            three_rungs(),
            facts(3.0),
            FollowPolicy(goal=LATENCY),
            current=plan,
            switch=away,
            lead_s=30.0,
        )
        assert found is not None
        prices.append(found.price)
    assert prices[0] < prices[1] < prices[2]


# -- over time ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def history() -> dict[str, Any]:
    """The memory of a controller that has seen a low load for a while."""
    made = follower(everywhere(4), three_rungs())
    made.run(lambda _second: 0.2, 320, seed=None)
    assert made.shapes == everywhere(4)
    assert not made.switches
    return json.loads(json.dumps(made.runtime.controller.state()))  # type: ignore[no-any-return]


def used_to_little(history: dict[str, Any], **options: Any) -> Follower:
    """A controller that continues from that memory."""
    made = follower(everywhere(4), three_rungs(), **options)
    made.runtime.controller.restore(history)
    made.second += 320
    return made


def test_it_climbs_at_once_and_comes_down_late(history: dict[str, Any]) -> None:
    made = used_to_little(history)
    began_s = made.second
    made.run(lambda _second: 0.6, 80, seed=None)
    first = made.switches[0]
    assert first.reason is Reason.LOAD_RISES
    assert first.at_s - began_s < 40
    assert made.shapes != everywhere(4)
    made.decisions.clear()
    began_s = made.second
    made.run(lambda _second: 0.2, 500, seed=None)
    assert made.shapes == everywhere(4)
    for item in made.switches:
        assert item.reason is Reason.OBJECTIVE_GAINS
        assert item.place is not None
        assert item.place.regret >= 1.5 * item.place.price
    # By then the highest load of the time before has passed.
    assert made.switches[-1].at_s - began_s >= 200


def test_it_climbs_ahead_of_a_foreseen_rise(history: dict[str, Any]) -> None:
    made = used_to_little(history)
    first_s = made.second - 1000
    # What the present deployment holds is reached after 200 s.
    made.run(lambda second: 0.2 + 0.2 * (second - first_s) / 200, 240, seed=None)
    rise = made.switches[0]
    assert rise.reason is Reason.LOAD_RISES
    assert first_s + 1000 + 200 - rise.at_s > SWITCH_S


def test_a_flash_crowd_goes_straight_to_the_capacity_plan(history: dict[str, Any]) -> None:
    made = used_to_little(history)
    began_s = made.second
    made.run(lambda _second: 0.85, 16, seed=None)
    assert len(made.switches) == 1
    first = made.switches[0]
    assert first.trigger is Trigger.LOAD
    assert first.at_s - began_s < 16
    assert made.shapes == everywhere(1)


def in_halves(old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> list[Leg]:
    """One node's replicas at a time leave before others start."""
    return [replace(leg, leaving=leg.retired, retired=()) for leg in waves(old, new)]


def needing_room(shapes: Shapes, ladder: Ladder) -> Follower:
    """A controller whose switches take a half of the devices away at a time."""
    made = follower(shapes, ladder)
    made.runtime.planner = planner()
    made.runtime.planner.learn(replace(made.runtime.planner.facts, legs=in_halves))
    return made


@pytest.mark.parametrize("wait_s", [0.2, 5.0, None])
def test_a_burst_that_engines_take_up_is_no_reason(wait_s: float | None) -> None:
    made = needing_room(everywhere(4), three_rungs())
    made.step(replace(facts(3.9), wait_s=0.0), 20.0)
    made.runtime.controller.overloaded_since_s = float(made.second)
    burst = replace(facts(6.5, coming=3.0), wait_s=wait_s)
    found = [made.step(burst, 5.0).reason for _ in range(20)]
    assert (Reason.LOAD_RISES in found) == (wait_s != 0.2)
    # Limits are missed without a wait, too: a load that lasts counts.
    found = [made.step(burst, 5.0).reason for _ in range(30)]
    assert made.switches


def test_a_little_more_capacity_is_not_worth_half_the_fleet() -> None:
    for holds, worth in ((0.75, False), (1.4, True)):
        ladder = ladder_of(rung(everywhere(2), 0.7, 1.0), rung(everywhere(1), holds, 1.0))
        made = needing_room(everywhere(2), ladder)
        for _ in range(12):
            made.step(replace(facts(9.0, coming=4.0), wait_s=9.0), 5.0)
        assert bool(made.switches) == worth


@given(load=st.floats(0.05, 0.95), more=st.floats(0.01, 1.0), most=st.floats(0.01, 1.0))
def test_the_more_a_deployment_carries_the_less_its_switch_costs(
    load: float, more: float, most: float
) -> None:
    plan = plan_for(everywhere(2))

    def halves(shapes: Shapes) -> tuple[DeploymentPlan, Sequence[Leg]]:
        new = plan_for(shapes)
        return new, in_halves(plan.replicas, new.replicas)

    prices = []
    for capacity in (more, more + most):
        ladder = ladder_of(rung(everywhere(2), 0.7, 1.6), rung(everywhere(1), 0.7 + capacity, 1.6))
        seen = facts(10 * load, upper=20.0)
        policy = FollowPolicy(goal=CAPACITY)
        found = follow(ladder, seen, policy, current=plan, switch=halves, lead_s=30.0)
        assert found is not None
        if found.seconds > 0:
            prices.append(found.price)
    assert prices == sorted(prices, reverse=True)


def test_a_guess_is_no_reason_to_climb() -> None:
    rising = facts(3.0, coming=3.0, upper=6.0)
    for seen, known in (
        (rising, True),
        (replace(rising, watched_s=60.0), False),
    ):
        found = scored(three_rungs(), seen, 4)
        assert found is not None
        assert found.rises
        assert found.known == known
        made = follower(everywhere(4), three_rungs())
        decision = made.step(seen, 20.0)
        assert (decision.reason is Reason.LOAD_RISES) == known
    # Nor is a ladder that was built for quite another mix.
    other = scored(three_rungs(kinds=2), facts(5.0, 0.5), 4, goal=TWO)
    same = scored(three_rungs(kinds=2), facts(3.0, 2.5), 4, goal=TWO)
    assert other is not None
    assert same is not None
    assert (other.known, same.known) == (False, True)


def test_vacant_devices_are_taken_at_once_though_it_is_late() -> None:
    half = ((shape(4), 1),)
    ladder = ladder_of(
        rung(half, 0.4, 1.0, joules=50.0),
        rung(((shape(2), 2),), 0.5, 1.6, joules=60.0),
        rung(everywhere(4), 0.8, 1.0, joules=100.0),
    )
    made = follower(half, ladder, goal=ENERGY)
    made.step(facts(3.0), 20)
    # A little more than it holds costs less than more devices, and yet it must not last.
    decision = made.step(facts(4.1), 20)
    assert decision.reason is Reason.LOAD_RISES
    assert decision.place is not None
    assert decision.place.gain_per_s < 0


def test_lasting_overload_is_said_ever_more_seldom(history: dict[str, Any]) -> None:
    made = used_to_little(history)
    made.run(lambda _second: 3.0, 240, seed=None)
    assert made.shapes == everywhere(1)
    said = [item for item in made.decisions if item.trigger is Trigger.LOAD]
    assert said
    assert len(said) < 30
    assert made.decisions[-1].reason is Reason.OVERLOADED


def test_a_gap_is_no_load_and_no_fault(history: dict[str, Any]) -> None:
    made = used_to_little(history)
    made.second += 5000
    made.run(lambda _second: 0.2, 60, seed=None)
    assert made.shapes == everywhere(4)
    nothing = follower(everywhere(4), three_rungs())
    nothing.run(lambda _second: 0.0, 60, seed=None)
    assert {item.reason for item in nothing.decisions} == {Reason.NO_DATA}


def test_a_restart_keeps_the_regret_and_the_limits(history: dict[str, Any]) -> None:
    options = {"max_switches_per_hour": 1, "margin": 25.0}
    made = used_to_little(history, **options)
    quiet = facts(2.0)
    # It waits for its price.
    made.runtime.controller.reached(made.runtime.typed(plan_for(everywhere(1))))
    first = made.step(quiet, 1.0)
    assert (first.reason, first.place is not None) == (Reason.NOT_LONG_ENOUGH, True)
    again = used_to_little(made.runtime.controller.state(), **options)
    again.second = made.second
    again.runtime.controller.reached(again.runtime.typed(plan_for(everywhere(1))))
    for _ in range(3):
        for item in (made, again):
            item.step(quiet, 20.0)
    assert again.decisions[-1].place == made.decisions[-1].place
    assert again.switches
    # What it switched to before counts for the limit.
    third = used_to_little(again.runtime.controller.state(), **options)
    third.second = again.second
    third.runtime.controller.reached(third.runtime.typed(plan_for(everywhere(1))))
    third.step(quiet, 300.0)
    assert third.step(quiet, 20.0).reason is Reason.SWITCH_LIMIT


def test_types_that_take_turns_do_not_make_it_flap() -> None:
    """No deployment holds the SLO of the first type; which attains most depends on the load."""

    def made_of(tensor: int, *attained: float) -> LadderDeployment:
        scores = (
            score(load, 0.97, kinds=2, by_type=(share, 0.99))
            for load, share in zip((0.1, 0.5, 0.6, 1.0), attained, strict=True)
        )
        return LadderDeployment(shapes=everywhere(tensor), scores=tuple(scores))

    ladder = ladder_of(made_of(4, 0.9, 0.8, 0.8, 0.8), made_of(2, 0.9, 0.86, 0.75, 0.75), kinds=2)
    made = follower(everywhere(4), ladder, goal=TWO, max_switches_per_hour=2)
    for index in range(40):
        load = 10 * (0.6, 0.5)[index // 2 % 2] / 1.1
        made.step(facts(load / 2, load / 2), 20.0)
    assert 0 < len(made.switches) <= 2


# -- whatever else may be -------------------------------------------------------------------------
def test_without_a_ladder_the_plan_stays() -> None:
    made = follower(everywhere(4))
    assert made.step(facts(20.0), 20.0).reason is Reason.NO_LADDER
    assert made.shapes == everywhere(4)
    unknown = follower(((shape(8), 1),), three_rungs())
    assert unknown.step(facts(20.0), 20.0).reason is Reason.NO_LADDER


def test_a_part_of_a_deployment_is_brought_back() -> None:
    floor = ((shape(2), 1),)
    made = follower(floor, three_rungs())
    # It carries a quarter of what all four carry.
    made.step(facts(0.5), 20.0)
    assert made.shapes == floor
    decision = made.step(facts(5.0), 20.0)
    assert (decision.reason, decision.verdict) == (Reason.LOAD_RISES, DecisionVerdict.SWITCH)
    assert made.shapes == everywhere(2)


def test_lost_replicas_are_planned_around() -> None:
    made = follower(everywhere(2), three_rungs())
    made.runtime.planner = planner()
    made.runtime.planner.barred = frozenset({shape(2)})
    controller = made.runtime.controller
    left = controller.plan.replicas[:2]
    inputs = controller.decision_input(float(made.second), present=left)
    found = made.runtime.evaluate(replace(inputs, load=facts(5.5)))
    assert isinstance(found, FollowScore)
    assert found.rises
    assert {spec.shape for spec in found.plan.replicas} == {shape(1)}


def test_an_operators_plan_is_held() -> None:
    made = follower(everywhere(1), three_rungs(), hold_s=600.0)
    controller = made.runtime.controller
    given = made.runtime.typed(plan_for(everywhere(2)))
    inputs = controller.decision_input(float(made.second), given=given)
    decision = controller.decide(
        inputs, made.runtime.evaluate(inputs), now_s=float(made.second), trigger=Trigger.MANUAL
    )
    assert decision.reason is Reason.MANUAL
    assert made.shapes == everywhere(2)
    # Neither a gain nor a rise is a reason to leave it.
    assert made.step(facts(2.0), 300.0).reason is Reason.HELD
    assert made.step(facts(9.0), 200.0).reason is Reason.HELD
    assert made.step(facts(9.0), 200.0).reason is Reason.LOAD_RISES


@pytest.mark.parametrize("mode", [Mode.ADVISE, Mode.OFF])
def test_only_auto_switches(mode: Mode) -> None:
    made = follower(everywhere(4), three_rungs(), mode=mode)
    made.step(facts(6.0), 20.0)
    decision = made.step(facts(6.0), 20.0)
    assert (decision.verdict, decision.reason) == (DecisionVerdict.ADVISE, Reason.LOAD_RISES)
    assert made.shapes == everywhere(4)


def test_a_barred_shape_is_not_chosen() -> None:
    made = follower(everywhere(4), three_rungs())
    made.runtime.planner = planner()
    made.runtime.planner.barred = frozenset({shape(2)})
    for _ in range(2):
        made.step(facts(5.5), 20.0)
    assert made.shapes == everywhere(1)


def test_a_switch_is_priced_anew_after_another() -> None:
    seconds = {"now": 10.0}

    def legs(old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> list[Leg]:
        return [replace(leg, seconds=seconds["now"]) for leg in waves(old, new)]

    made = planner()
    made.learn(replace(made.facts, legs=legs))
    one = plan_for(everywhere(4))
    other, first = made.switch(one, everywhere(2))
    seconds["now"] = 25.0
    # Nothing happened since.
    assert made.switch(one, everywhere(2)) == (other, first)
    back, _ = made.switch(other, everywhere(4))
    again, second = made.switch(back, everywhere(2))
    assert [leg.seconds for leg in first] == [10.0, 10.0]
    assert [leg.seconds for leg in second] == [25.0, 25.0]
    assert again.replicas == other.replicas


def test_a_type_that_vanishes_is_no_fault() -> None:
    made = follower(everywhere(2), three_rungs(kinds=2), goal=TWO)
    for rates in ((1.0, 1.0), (2.0, 0.0), (0.0, 2.0), (0.0, 0.0)):
        decision = made.step(facts(*rates), 300.0)
        assert decision.place is not None
        assert math.isfinite(decision.place.gain_per_s)
    assert made.shapes == everywhere(4)


def test_other_quantiles_may_be_asked_for(history: dict[str, Any]) -> None:
    for quantile in (0.5, 0.9, 0.99, 0.999):
        made = follower(
            everywhere(4), three_rungs(), follow=FollowPolicy(goal=LATENCY, quantile=quantile)
        )
        controller = made.runtime.controller
        memory = {
            "names": list(controller.names),
            "centres": [[100.0, 100.0]],
            "state": history,
        }
        # What was counted is not lost, whatever the forecast said then.
        assert recall(controller, memory, [(100.0, 100.0)])
        seen = controller.monitor.load_facts(quantile, 300.0)
        assert seen.expected[0][0] == pytest.approx(2.0, rel=0.1)
        assert seen.upper[0] >= seen.expected[0] or quantile == 0.5
        said = controller.monitor.forecast()[0]
        assert said.low_rps <= said.expected_rps <= said.high_rps


def test_decisions_of_older_servers_are_read() -> None:
    made = follower(everywhere(4), three_rungs())
    made.step(facts(6.0), 20.0)
    decision = made.step(facts(6.0), 20.0)
    data = msgspec.to_builtins(decision)
    assert msgspec.convert(data, Decision) == decision
    del data["place"]
    old = msgspec.convert(data, Decision)
    assert old.place is None
    assert old.line.startswith("decision 2 (interval): switch, load_rises")


@pytest.mark.parametrize("boundary", [0.4 / 1.1, 0.7 / 1.1])
@given(
    current=st.sampled_from((1, 2, 4)),
    wide=st.floats(0.0, 0.3),
    levels=st.lists(st.floats(-1.0, 1.0), min_size=24, max_size=24),
)
def test_noise_around_a_boundary_does_not_make_it_flap(
    boundary: float, current: int, wide: float, levels: list[float]
) -> None:
    made = follower(everywhere(current), three_rungs(), max_switches_per_hour=100)
    for index, level in enumerate(levels):
        peak = max(levels[max(0, index - 5) : index + 1])
        near, most = (10 * boundary * (1 + wide * each) for each in (level, peak))
        made.step(facts(near, peak=most), 60.0)
    ups = [item for item in made.switches if item.reason is Reason.LOAD_RISES]
    downs = [item for item in made.switches if item.reason is Reason.OBJECTIVE_GAINS]
    assert len(ups) + len(downs) == len(made.switches)
    # Down at most once in the time that counts for a fall.
    assert len(downs) <= 1 + 24 * 60 / 300
    assert len(ups) <= len(downs) + 2


@given(
    levels=st.lists(st.tuples(st.integers(1, 3), st.floats(0.0, 16.0)), min_size=1, max_size=5),
    most=st.integers(0, 5),
)
def test_only_a_rise_is_beyond_the_limit_of_switches(
    levels: list[tuple[int, float]], most: int
) -> None:
    made = follower(everywhere(2), three_rungs(), max_switches_per_hour=most)
    for decisions, rate in levels:
        for _ in range(decisions):
            made.step(facts(rate), 70.0)
    at_s = [item.at_s for item in made.switches]
    falls_s = [item.at_s for item in made.switches if item.reason is not Reason.LOAD_RISES]
    for item, before_s in zip(made.switches, [-math.inf, *at_s], strict=False):
        assert item.place is not None
        before = sum(1 for s in falls_s if item.at_s - HOUR_S < s < item.at_s)
        if item.reason is not Reason.LOAD_RISES:
            assert before < most
        assert item.at_s - before_s >= item.switch_s
    capacities = [HELD[(4, 2, 1).index(current)] for current in _sizes(made)]
    for item, (low, high) in zip(made.switches, pairwise(capacities), strict=True):
        # What rises carries more.
        assert (item.reason is Reason.LOAD_RISES) <= (high > low)


def _sizes(made: Follower) -> list[int]:
    """The tensor parallel sizes of all plans in force so far."""
    words = [item.place.rung for item in made.switches if item.place is not None]
    return [2, *(int(text.split("tp")[1][0]) for text in words)]
