"""The controller: it switches where that pays, and never where a guard forbids it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.decision import Decision, DecisionVerdict, Mode, Reason, Trigger
from oserve.control.evaluation import (
    DecisionInput,
    ForecastStep,
    Leg,
    best_candidate,
    score_candidate,
    switch_price,
)
from oserve.control.lifetime import Lifetime
from oserve.control.memory import recall, remembered
from oserve.control.planner import TablePlanner
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan

from .toy import (
    NAMES,
    START_S,
    TABLE,
    TYPES,
    Traffic,
    make_controller,
    make_world,
    plan_of,
    planner,
    row,
    waits_its_price,
)

CHATS, DOCS = (16.0, 1.0), (2.0, 12.0)


def shapes(plan: DeploymentPlan) -> Counter[int]:
    return Counter(spec.shape.max_num_batched_tokens for spec in plan.replicas)


def turned(
    at_s: int, before: Sequence[float], after: Sequence[float], seed: int | None = None
) -> Traffic:
    """Requests of each second before and after a change; with a seed they come by chance."""
    draw = np.random.default_rng(seed)

    def counts(second: int) -> list[float]:
        rates = before if second < at_s else after
        return list(rates) if seed is None else draw.poisson(rates).astype(float).tolist()

    return counts


def waits_until_it_pays(decision: Decision, began_s: float, *, look_s: float) -> None:
    """It comes when as much was missed as it costs, at the first look after that.

    A change may be taken to have begun some seconds from where it did.
    """
    assert decision.pays_after_s is not None
    waited_s = decision.at_s - began_s
    assert decision.pays_after_s - 8 <= waited_s <= decision.pays_after_s + look_s + 8


# Evenly, and by chance.
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (None, 2, 3))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_lasting_flip_of_the_mix_is_followed_and_the_record_says_why(
    seed: int | None,
) -> None:
    world = make_world(0, 0, 0, 1)
    await world.run(turned(160, CHATS, DOCS, seed), 330)
    assert shapes(world.controller.plan)[4096] >= 3
    waits_its_price(world.decisions)
    first = world.switches[0]
    waits_until_it_pays(first, 160, look_s=20)
    assert first.at_s < 160 + 120
    assert first.reason is Reason.GAIN_EXCEEDS_COST
    assert first.gain_requests > first.cost_requests > 0
    assert first.candidate_rps > first.current_rps
    assert {item.name for item in first.forecast} == set(NAMES)
    assert all(f.low_rps <= f.expected_rps <= f.high_rps for f in first.forecast)
    assert "gain" in first.line
    assert world.seen is not None
    assert {s.spec for s in world.seen.replicas if s.phase == "ready"} == set(
        world.controller.plan.replicas
    )


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_sudden_change_is_decided_on_within_seconds(seed: int | None) -> None:
    world = make_world(0, 0, 0, 1, interval_s=300, max_switches_per_hour=9)
    await world.run(turned(650, CHATS, (2.0, 30.0), seed), 890)
    sudden = [item for item in world.decisions if item.at_s >= 650]
    assert {item.trigger for item in sudden} == {Trigger.CHANGE}
    assert sudden[0].at_s < 650 + 24
    waits_its_price(world.decisions)
    (switch,) = (item for item in sudden if item.verdict is DecisionVerdict.SWITCH)
    # It is looked at again when it has lasted half as long again, before the interval ends.
    assert switch.pays_after_s is not None
    waits_until_it_pays(switch, 650, look_s=switch.pays_after_s / 2)


@pytest.mark.slow
async def test_a_switch_that_costs_more_than_it_brings_is_left() -> None:
    world = make_world(0, 0, 0, 1, start_s=500.0, lasts_s=60.0, longest_s=120.0)
    await world.run(lambda _s: CHATS, 600)
    await world.run(lambda _s: DOCS, 200)
    assert not world.switches
    assert {item.reason for item in world.decisions[-3:]} <= {
        Reason.COST_EXCEEDS_GAIN,
        Reason.GAIN_TOO_SMALL,
    }


@pytest.mark.slow
async def test_a_square_wave_does_not_make_it_flap() -> None:
    world = make_world(0, 0, 0, 1, start_s=40.0, min_dwell_s=0.0, max_switches_per_hour=1000)
    period = 120
    await world.run(lambda s: CHATS if s // (period // 2) % 2 else DOCS, 2400)
    # The wave flips once a minute. Once it is known to, hardly any switch can pay.
    late = [item for item in world.switches if item.at_s > 1200]
    assert len(late) <= 3
    assert len(world.switches) <= 9


pieces = st.lists(
    st.tuples(st.integers(10, 120), st.integers(0, 40), st.integers(0, 25)), min_size=1, max_size=8
)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(pieces, st.integers(0, 3), st.sampled_from([30.0, 90.0]))
async def test_guards_hold_whatever_comes(
    given_pieces: list[tuple[int, int, int]], most: int, dwell_s: float
) -> None:
    world = make_world(
        0, 1, 0, 1, start_s=5.0, min_dwell_s=dwell_s, max_switches_per_hour=most, margin=0.1
    )
    for seconds, chats, docs in given_pieces:
        # The fake cluster raises if a device is ever given to two replicas.
        await world.run(lambda _s, c=chats, d=docs: (float(c), float(d)), seconds)  # type: ignore[misc]
    times = [item.at_s for item in world.switches]
    assert all(b - a >= dwell_s for a, b in pairwise(times))
    for at_s in times:
        assert sum(1 for other in times if at_s - 3600 < other <= at_s) <= most
    for decision in world.switches:
        assert decision.gain_requests > 0
        assert decision.lasts_s > 0


async def test_advice_changes_nothing_and_off_decides_nothing() -> None:
    world = make_world(0, 0, 0, 1, mode=Mode.ADVISE)
    await world.run(turned(100, CHATS, DOCS), 230)
    assert world.controller.plan.id == "first"
    advice = next(item for item in world.decisions if item.verdict is DecisionVerdict.ADVISE)
    waits_until_it_pays(advice, 100, look_s=20)
    assert not world.switches


async def test_a_person_decides_alone() -> None:
    world = make_world(0, 0, 0, 1, mode=Mode.ADVISE, max_switches_per_hour=0)
    await world.run(lambda _s: CHATS, 60)
    controller = world.controller
    wanted = plan_of(1, 1, 1, 1)
    question = controller.decision_input(61.0, given=wanted)
    weighed = best_candidate(question, world.planner)
    asked = controller.decide(question, weighed, now_s=61.0, trigger=Trigger.QUESTION)
    assert asked.verdict is not DecisionVerdict.SWITCH
    told = controller.decide(question, weighed, now_s=61.0, trigger=Trigger.MANUAL)
    assert (told.verdict, told.reason) == (DecisionVerdict.SWITCH, Reason.MANUAL)
    assert controller.plan is wanted
    late = controller.decide(question, weighed, now_s=62.0, trigger=Trigger.INTERVAL)
    assert late.verdict is DecisionVerdict.KEEP
    # What a person wanted is held for a while.
    await world.run(lambda _s: CHATS, 60)
    assert world.decisions[-1].reason in {Reason.HELD, Reason.SWITCH_UNDER_WAY}
    assert controller.plan is wanted


async def test_without_traffic_it_shrinks_to_the_floor_and_grows_when_requests_come() -> None:
    world = make_world(0, 0, 0, 1, shrink_after_s=100.0, min_dwell_s=500.0)
    await world.run(lambda _s: CHATS, 100)
    await world.run(lambda _s: (0.0, 0.0), 300)
    assert len(world.controller.plan.replicas) == 1
    assert world.switches[-1].reason is Reason.ZERO_TRAFFIC
    at_s = world.second
    await world.run(lambda _s: CHATS, 120)
    assert len(world.controller.plan.replicas) > 1
    assert world.switches[-1].at_s < at_s + 10


async def test_zero_traffic_and_no_data_keep_the_plan() -> None:
    world = make_world(0, 0, 0, 1)
    await world.run(lambda _s: (0.0, 0.0), 100)
    assert {item.reason for item in world.decisions} == {Reason.NO_DATA}
    assert not world.switches


async def test_a_restarted_controller_goes_on_where_it_was() -> None:
    world = make_world(0, 0, 0, 1)
    await world.run(lambda _s: CHATS, 130)
    controller = world.controller
    state = json.loads(json.dumps(controller.state()))
    again = make_controller(controller.plan, interval_s=20, min_dwell_s=60.0, lasts_s=600.0)
    again.restore(state)
    assert again.monitor.forecast() == controller.monitor.forecast()
    assert again.monitor.now_rps() == controller.monitor.now_rps()
    assert again.decision_input(131.0).steps == controller.decision_input(131.0).steps
    # Ten minutes nobody looked: gaps, which are no zeros.
    again.monitor.observe(730.0)
    assert again.monitor.forecast()[0].expected_rps == pytest.approx(16.0, rel=0.2)


def test_the_cost_of_a_switch_is_what_is_missing_meanwhile() -> None:
    made = planner(start_s=30.0)
    old, new = plan_of(0, 0, 0, 0), plan_of(0, 0, 0, 1)
    rates: dict[tuple[float, ...], float] = {(30.0, 0.0): 1.0}
    cost = switch_price(old.replicas, new.replicas, rates, made)
    # One of four leaves for 30 s and a mean latency of 1 s: 30 of 32 were served, 24 still are.
    assert cost.changed == 1
    assert cost.seconds == pytest.approx(31.0)
    assert cost.lost == pytest.approx(6.0 * 31.0)
    assert switch_price(old.replicas, old.replicas, rates, made).requests == 0.0


@given(st.floats(0, 100), st.floats(0, 100))
def test_the_value_of_replicas_is_within_demand_and_grows_with_them(a: float, b: float) -> None:
    made = planner()
    some = made.served_rps(plan_of(0, 1).replicas, (a, b))
    more = made.served_rps(plan_of(0, 1, 1).replicas, (a, b))
    assert -1e-6 <= some <= a + b + 1e-6
    assert more >= some - 1e-6


def test_shapes_that_failed_are_not_planned_again() -> None:
    made = planner()
    made.barred = frozenset({TABLE[1].shape})
    (plan,) = made.candidates((1.0, 10.0), plan_of(0))
    assert shapes(plan).keys() == {512}
    made.barred = frozenset(row.shape for row in TABLE)
    assert not made.candidates((1.0, 10.0), plan_of(0))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.floats(0, 50), st.floats(0, 50))
def test_shares_cover_every_type_and_sum_to_one(rows: list[int], a: float, b: float) -> None:
    plan = plan_of(*(row % 2 for row in rows))
    shares = planner().shares(plan.replicas, (a, b))
    assert set(shares) == {kind.name for kind in TYPES}
    for own in shares.values():
        assert sum(own.values()) == pytest.approx(1.0)
        assert own.keys() <= {spec.id for spec in plan.replicas}


def test_a_plan_lasts_as_long_as_plans_have_lasted() -> None:
    lifetime = Lifetime(prior_s=900.0, most_s=3600.0, lag_s=10.0)
    assert lifetime.expected_s("a", 0.0) == 900.0
    for flip in range(41):
        lifetime.prefers("ab"[flip % 2], flip * 60.0)
    at_s = 40 * 60.0
    assert lifetime.expected_s("a", at_s) == pytest.approx(50.0, abs=1.0)
    assert lifetime.expected_s("a", at_s + 40.0) == pytest.approx(10.0, abs=2.0)
    # What has outlived all others is expected to last as long again.
    assert lifetime.expected_s("a", at_s + 1000.0) == pytest.approx(990.0)
    assert lifetime.expected_s("a", 1e9) <= 3600.0
    again = Lifetime(prior_s=900.0, most_s=3600.0, lag_s=10.0)
    again.restore(json.loads(json.dumps(lifetime.state())))
    assert again.expected_s("b", at_s) == lifetime.expected_s("b", at_s)


def test_toy_rows_are_sound() -> None:
    assert row(512, 1.0, 2.0).capacity_rps == (1.0, 2.0)


async def test_other_types_inherit_the_history() -> None:
    world = make_world(0, 0, 0, 1)
    await world.run(lambda _s: CHATS, 130)
    old = ((100.0, 200.0), (4000.0, 100.0))
    memory = json.loads(json.dumps(remembered(world.controller, old)))
    # The types stand the other way round now, and a little elsewhere.
    again = make_controller(world.controller.plan, interval_s=20)
    assert recall(again, memory, ((3500.0, 90.0), (120.0, 210.0)))
    expected = [item.expected_rps for item in again.monitor.forecast()]
    assert expected[1] == pytest.approx(16.0, rel=0.2)
    assert expected[0] < 3.0
    assert again.monitor.now_rps() == tuple(reversed(world.controller.monitor.now_rps()))
    same = make_controller(world.controller.plan, interval_s=20)
    assert recall(same, memory, old)
    assert same.monitor.forecast() == world.controller.monitor.forecast()
    assert not recall(same, {"names": []}, old)


def question(current: DeploymentPlan, rates: tuple[float, float], **more: float) -> DecisionInput:
    asked = make_controller(current).decision_input(0.0)
    step = ForecastStep(seconds=60.0, probabilities={rates: 1.0}, expected=rates)
    return replace(asked, steps=(step,), now_rps=rates, **more)  # type: ignore[arg-type]


def test_long_drains_and_backlogs_count_as_costs() -> None:
    old, new = plan_of(0, 0, 0, 1), plan_of(1, 0, 0, 1)
    # Nearly all that the old plan can serve, which is more than is left while replicas change.
    rates = (14.0, 5.0)
    made = planner()
    plain = score_candidate(question(old, rates), new, made).cost
    drained = score_candidate(question(old, rates, drain_s=100.0), new, made).cost
    assert drained.seconds > plain.seconds
    assert drained.lost > plain.lost > 0
    # No longer than until those that still run go on elsewhere.
    bounded = score_candidate(
        question(old, rates, drain_s=100.0, drain_limit_s=30.0), new, made
    ).cost
    assert drained.seconds - bounded.seconds == pytest.approx(70.0)
    # In order of arrival all that comes until the backlog is gone is late as well.
    late = score_candidate(question(old, rates, in_order=True), new, made).cost
    assert late.lost > 2 * plain.lost
    # Past the capacity of the new plan all are late whatever is done.
    beyond = (60.0, 20.0)
    past = score_candidate(question(old, beyond, in_order=True), new, made)
    assert past.cost.lost >= sum(beyond) * past.lasts_s


def test_a_gain_at_rare_rates_alone_is_none() -> None:
    old, new = plan_of(0, 0, 0, 1), plan_of(1, 1, 0, 1)
    usual, rare = (4.0, 2.0), (4.0, 40.0)
    asked = question(old, usual)
    wide = ForecastStep(seconds=60.0, probabilities={usual: 0.8, rare: 0.2}, expected=usual)
    made = planner()
    found = score_candidate(replace(asked, steps=(wide,)), new, made)
    assert found.candidate_rps > found.current_rps
    assert found.gain == pytest.approx(0.0, abs=1e-6)
    certain = replace(wide, probabilities={rare: 1.0}, expected=rare)
    assert score_candidate(replace(asked, steps=(certain,)), new, made).gain > 0


async def test_a_drain_is_foreseen_by_what_replicas_hold() -> None:
    controller = make_controller(plan_of(0, 0, 0, 1))
    for second in range(60):
        batch = Batch(names=NAMES, arrivals={second: [2.0, 0.0]}, tokens={second: [2.0, 0.0, 0.0]})
        controller.monitor.observe(second + 0.999, [batch], {"running": 30.0, "waiting": 10.0})
    # 40 requests, 2 of which end a second, stay 20 s, the longest about twice that.
    assert controller.monitor.drain_s() == pytest.approx(40.0, rel=0.1)
    assert controller.decision_input(60.0).drain_s == controller.monitor.drain_s()


def test_a_way_without_restarts_costs_only_what_is_missing_on_it() -> None:
    """New replicas that come up beside the old ones lose nobody, and take their own time only."""
    made = planner()
    old, new = plan_of(0, 0, 0, 1).replicas, plan_of(0, 0, 1, 1).replicas
    gone = tuple(spec for spec in old if spec not in new)
    fresh = tuple(spec for spec in new if spec not in old)
    rates: dict[tuple[float, ...], float] = {(20.0, 4.0): 1.0}
    restarts = switch_price(old, new, rates, made)
    beside = TablePlanner(
        replace(made.facts, legs=lambda _a, _b: [Leg(started=fresh, retired=gone, seconds=7.0)])
    )
    found = switch_price(old, new, rates, beside)
    assert (found.lost, found.seconds, found.changed) == (0.0, 7.0, 1)
    assert found.touched > 0
    assert restarts.lost > 0
    assert restarts.seconds > START_S
    unknown = TablePlanner(replace(made.facts, legs=lambda _a, _b: None))
    assert switch_price(old, new, rates, unknown) == restarts


async def test_nothing_is_decided_while_it_is_watched_what_has_changed() -> None:
    world = make_world(0, 0, 0, 1, interval_s=20)
    await world.run(lambda _s: CHATS, 317)
    before = len(world.decisions)
    # The interval ends a few seconds after the flip, when the forecast is still of chats.
    await world.run(lambda _s: DOCS, 22)
    first, *_ = world.decisions[before:]
    assert first.trigger is Trigger.CHANGE
    assert 317 + 8 < first.at_s < 317 + 20
    assert first.forecast[1].expected_rps > 3 * first.forecast[0].expected_rps
