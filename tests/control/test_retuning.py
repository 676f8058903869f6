"""When a server tunes, and when it takes back what it changed."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.retuning import (
    Attainment,
    RetuningPolicy,
    RetuningState,
    changed,
    due,
    fell,
    is_barred,
    looked,
    resumed,
)

POLICY = RetuningPolicy()
GIVEN = DispatchConstants()
OTHER = DispatchConstants(overflow_s=8.0)
FRESH = RetuningState(given=GIVEN, present=GIVEN)


def attained(requests: int, share: float) -> Attainment:
    return Attainment(requests=requests, met=round(requests * share))


def on_trial(before: Attainment) -> RetuningState:
    return changed(FRESH, OTHER, before, now_s=0.0)


@given(before=st.floats(0.0, 1.0), after=st.floats(0.0, 1.0), more=st.floats(0.0, 0.2))
def test_only_a_fall_counts_and_a_deeper_one_as_well(
    before: float, after: float, more: float
) -> None:
    was, then = attained(1000, before), attained(1000, after)
    if after >= before:
        assert not fell(was, then)
    elif fell(was, then):
        assert fell(was, attained(1000, max(0.0, after - more)))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97, 1.0])
def test_noise_is_not_taken_for_a_fall(share: float) -> None:
    """In 200 trials of the same attainment at most one in fifty is taken back."""
    draw = random.Random(1)
    taken_back = 0
    for _ in range(200):
        before = Attainment(requests=2000, met=sum(draw.random() < share for _ in range(2000)))
        state, met = on_trial(before), 0
        for requests in range(1, POLICY.trial_requests + 1):
            met += draw.random() < share
            if requests % 200 == 0:
                after = Attainment(requests=requests, met=met)
                state = looked(state, after, POLICY, now_s=float(requests))
        assert state.trial is None
        taken_back += state.present == GIVEN
    assert taken_back <= 4


def test_a_deep_fall_is_taken_back_at_the_first_look_and_barred_for_a_day() -> None:
    state = on_trial(attained(2000, 0.97))
    assert looked(state, attained(199, 0.5), POLICY, now_s=10.0) == state
    back = looked(state, attained(200, 0.8), POLICY, now_s=20.0)
    assert back.present == GIVEN
    assert back.trial is None
    assert "97.0% to 80.0% over 200" in back.line
    assert is_barred(back, OTHER, now_s=21.0)
    assert not is_barred(back, GIVEN, now_s=21.0)
    assert not is_barred(back, OTHER, now_s=20.0 + POLICY.barred_s)


def test_a_small_fall_needs_more_requests() -> None:
    state = on_trial(attained(4000, 0.97))
    state = looked(state, attained(200, 0.94), POLICY, now_s=1.0)
    assert state.trial is not None
    # The next look is at twice as many.
    assert looked(state, attained(399, 0.94), POLICY, now_s=2.0) == state
    for requests in (400, 800, 1600):
        state = looked(state, attained(requests, 0.94), POLICY, now_s=3.0)
    assert state.present == GIVEN


def test_what_does_not_fall_is_kept_in_the_end() -> None:
    state = on_trial(attained(2000, 0.95))
    for requests in (200, 400, 800, 1600, 3200):
        assert state.trial is not None
        state = looked(state, attained(requests, 0.96), POLICY, now_s=float(requests))
    assert state.trial is None
    assert state.present == OTHER
    assert "kept" in state.line


@given(
    looks=st.lists(st.tuples(st.integers(0, 5000), st.floats(0.0, 1.0)), max_size=12),
    before=st.builds(attained, st.integers(0, 3000), st.floats(0.0, 1.0)),
)
def test_a_trial_ends_in_either_constants_and_at_most_once(
    looks: list[tuple[int, float]], before: Attainment
) -> None:
    state, ends = on_trial(before), 0
    for at, (requests, share) in enumerate(sorted(looks)):
        after = looked(state, attained(requests, share), POLICY, now_s=float(at))
        ends += (state.trial is None) != (after.trial is None)
        state = after
        assert state.present in (GIVEN, OTHER)
        assert (state.present == GIVEN) <= (state.trial is None)
    assert ends <= 1
    assert msgspec.json.decode(msgspec.json.encode(state), type=RetuningState) == state


def test_it_searches_after_time_and_requests_but_not_during_a_trial() -> None:
    searched = msgspec.structs.replace(FRESH, searched_s=1000.0)
    late_s = 1000.0 + POLICY.interval_s
    assert due(searched, POLICY, new_records=POLICY.new_records, now_s=late_s)
    assert not due(searched, POLICY, new_records=POLICY.new_records - 1, now_s=late_s)
    assert not due(searched, POLICY, new_records=10**6, now_s=late_s - 1.0)
    trial = changed(searched, OTHER, attained(100, 1.0), now_s=0.0)
    assert not due(trial, POLICY, new_records=10**6, now_s=10.0 * late_s)


def test_other_settings_begin_anew_and_the_same_go_on() -> None:
    state = on_trial(attained(100, 1.0))
    assert resumed(state, GIVEN) == state
    fresh = resumed(state, OTHER)
    assert (fresh.given, fresh.present, fresh.trial) == (OTHER, OTHER, None)
    assert resumed(None, GIVEN) == FRESH
