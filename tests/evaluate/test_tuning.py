"""The search for constants of dispatch: what it proposes, what the part held out refuses."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.constants import DispatchConstants, most_inflight
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.evaluate.part_score import (
    LEAST_WINDOW_S,
    PartScore,
    ServedWindow,
    WindowScore,
    gain_of,
    loads_around,
    windows_at,
)
from oserve.evaluate.tuning import (
    VALUES,
    CachedScore,
    Constant,
    SearchSpace,
    Verdict,
    changes,
    effective,
    search,
    tune,
    value_of,
    with_value,
)

PRESENT = DispatchConstants(overload=OverloadPolicy(ttft_s=2.0))
SPACE = SearchSpace(ttft_s=2.0, ordered=True, pooled=True)
SHARES = st.floats(0.0, 1.0)
SECONDS = st.floats(0.01, 100.0)
SERVED = st.builds(
    ServedWindow,
    requests=st.integers(1, 1000),
    attainment=SHARES,
    mean_e2e_s=SECONDS,
    p99_e2e_s=SECONDS,
)
WINDOW = st.builds(
    WindowScore,
    capacity=st.floats(0.0, 5.0),
    below=st.tuples(SERVED, SERVED),
    past=st.tuples(SERVED),
)
SCORES = st.tuples(WINDOW, WINDOW, WINDOW)


def carrying(*capacities: float) -> PartScore:
    """Windows that differ in capacity alone."""
    same = ServedWindow(requests=100, attainment=1.0, mean_e2e_s=1.0, p99_e2e_s=2.0)
    return tuple(WindowScore(capacity=c, below=(same,), past=(same,)) for c in capacities)


def valley(constants: DispatchConstants, wanted: dict[Constant, float]) -> float:
    """A capacity that falls with the distance from the wanted values."""
    far = sum(
        abs(VALUES[name].index(value_of(constants, name)) - VALUES[name].index(value))
        if value_of(constants, name) in VALUES[name]
        else 9
        for name, value in wanted.items()
    )
    return math.exp(-0.05 * far)


@given(one=SCORES, other=SCORES)
def test_a_gain_is_a_loss_the_other_way_round(one: PartScore, other: PartScore) -> None:
    there, back = gain_of(one, other), gain_of(other, one)
    assert there.mean == pytest.approx(-back.mean)
    assert there.error == pytest.approx(back.error)
    assert gain_of(one, one).mean == gain_of(one, one).error == 0.0


@given(score=SCORES, more=st.floats(1.01, 2.0))
def test_more_capacity_is_a_gain_and_more_latency_a_loss(score: PartScore, more: float) -> None:
    fuller = tuple(replace(w, capacity=max(w.capacity, 0.01) * more) for w in score)
    assert gain_of(score, fuller).mean > 0.0
    slower = tuple(
        replace(w, below=tuple(replace(r, mean_e2e_s=r.mean_e2e_s * more) for r in w.below))
        for w in score
    )
    assert gain_of(score, slower).mean <= 0.0


def test_gains_that_windows_do_not_share_are_not_sure() -> None:
    assert gain_of(carrying(1, 1, 1), carrying(1.1, 1.1, 1.1)).sure == pytest.approx(math.log(1.1))
    assert gain_of(carrying(1, 1, 1), carrying(1.5, 0.9, 0.9)).sure < 0.0


@given(
    wanted=st.fixed_dictionaries(
        {
            Constant.LATE: st.sampled_from(VALUES[Constant.LATE]),
            Constant.OWED: st.sampled_from(VALUES[Constant.OWED]),
            Constant.OVERFLOW: st.sampled_from(VALUES[Constant.OVERFLOW]),
        }
    )
)
def test_the_search_finds_the_best_values_with_bounded_effort(
    wanted: dict[Constant, float],
) -> None:
    score = CachedScore(lambda item: carrying(*[valley(item, wanted)] * 3))
    found = search(PRESENT, SPACE, score)
    assert {name: value_of(found, name) for name in wanted} == wanted
    assert set(changes(PRESENT, found)) <= set(wanted)
    assert score.candidates <= 80


@given(most=st.integers(1, 20))
def test_the_search_never_scores_more_candidates_than_it_may(most: int) -> None:
    wanted: dict[Constant, float] = {Constant.LATE: 0.5, Constant.OWED: 1.0}
    score = CachedScore(lambda item: carrying(*[valley(item, wanted)] * 3))
    search(PRESENT, SPACE, score, most_candidates=most)
    # The starting points, and to undo a change, come on top.
    assert score.candidates <= most + 6


def test_the_part_held_out_refuses_what_fits_the_first_part_alone() -> None:
    wanted: dict[Constant, float] = {Constant.LATE: 0.5, Constant.OVERFLOW: 8.0}
    found = tune(
        PRESENT,
        SPACE,
        lambda item: carrying(*[valley(item, wanted)] * 3),
        lambda item: carrying(*[valley(item, {Constant.LATE: 0.75, Constant.OVERFLOW: 8.0})] * 3),
        min_gain=0.02,
    )
    verdicts = {report.name: report.verdict for report in found.reports}
    assert verdicts[Constant.LATE] is Verdict.REJECTED
    assert verdicts[Constant.OVERFLOW] is Verdict.KEPT
    assert changes(PRESENT, found.constants) == (Constant.OVERFLOW,)


def test_a_gain_below_the_least_promotes_nothing() -> None:
    wanted: dict[Constant, float] = {Constant.OVERFLOW: 8.0}

    def score(item: DispatchConstants) -> PartScore:
        return carrying(*[valley(item, wanted)] * 3)

    assert tune(PRESENT, SPACE, score, score, min_gain=0.02).promoted
    refused = tune(PRESENT, SPACE, score, score, min_gain=0.2)
    assert not refused.promoted
    assert refused.constants == PRESENT
    assert refused.proposed != PRESENT


@given(name=st.sampled_from(list(Constant)), data=st.data())
def test_a_value_is_read_as_it_was_set(name: Constant, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(VALUES[name]))
    assert value_of(with_value(PRESENT, name, value, ttft_s=2.0), name) == value


def test_what_has_no_effect_is_scored_once() -> None:
    none = with_value(PRESENT, Constant.DEMOTE, False, ttft_s=2.0)
    other = with_value(none, Constant.OWED, 1.0, ttft_s=2.0)
    assert effective(none) == effective(other)
    assert effective(PRESENT) != effective(other)


def test_only_what_a_deployment_can_set_is_searched() -> None:
    plain = SearchSpace(ttft_s=None, ordered=False, pooled=False)
    assert plain.names() == (Constant.INFLIGHT,)


@given(knee=st.floats(0.01, 100.0))
def test_loads_lie_on_their_side_of_the_knee_with_the_own_rate_among_them(knee: float) -> None:
    loads = loads_around(knee)
    assert all(load <= knee for load in loads.below)
    assert all(load > knee for load in loads.past)
    assert any(abs(load - 1.0) <= 0.05 for load in (*loads.below, *loads.past))


@given(
    usual=st.integers(1, 1000),
    devices=st.integers(1, 16),
    per_device=st.none() | st.floats(0.01, 1000.0),
)
def test_the_bound_in_flight_is_at_least_one_and_never_raised(
    usual: int, devices: int, per_device: float | None
) -> None:
    assert 1 <= most_inflight(usual=usual, devices=devices, per_device=per_device) <= usual


@given(duration_s=st.floats(1.0, 1e5), knee=st.floats(0.01, 100.0))
def test_several_windows_are_long_enough_at_the_knee(duration_s: float, knee: float) -> None:
    windows = windows_at(duration_s, knee)
    assert 1 <= windows <= 3
    assert windows == 1 or duration_s / windows / max(knee, 1.0) >= LEAST_WINDOW_S
