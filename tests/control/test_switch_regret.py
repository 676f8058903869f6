"""The rent that was paid so far: it adds up while another plan is better, and noise does not."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.switch_regret import SwitchRegret

NONE_S = -1.0


def test_it_adds_up_from_the_change_on() -> None:
    regret = SwitchRegret()
    regret.update(100.0, 0.0, slack_rps=0.5, began_s=NONE_S)
    # The traffic changed at 105; since then 2 requests/s more would have been served.
    regret.update(110.0, 2.0, slack_rps=0.5, began_s=105.0)
    assert regret.requests == pytest.approx(10.0)
    # Judgements differ; each counts for its own time.
    regret.update(120.0, 9.0, slack_rps=0.5, began_s=105.0)
    assert regret.requests == pytest.approx(100.0)
    regret.update(130.0, 0.1, slack_rps=0.5, began_s=105.0)
    assert regret.requests == pytest.approx(96.0)


def test_a_change_that_ends_it_ends_it_at_once_and_one_that_does_not_changes_nothing() -> None:
    regret = SwitchRegret()
    regret.update(0.0, 0.0, slack_rps=0.1, began_s=NONE_S)
    regret.update(10.0, 3.0, slack_rps=0.1, began_s=NONE_S)
    regret.update(20.0, 3.0, slack_rps=0.1, began_s=15.0)
    assert regret.requests == pytest.approx(60.0)
    regret.update(30.0, -1.0, slack_rps=0.1, began_s=25.0)
    assert regret.requests == 0.0


def test_a_switch_begins_anew_and_what_is_judged_meanwhile_does_not_count() -> None:
    regret = SwitchRegret()
    regret.update(0.0, 5.0, slack_rps=0.1, began_s=NONE_S)
    regret.update(10.0, 5.0, slack_rps=0.1, began_s=NONE_S)
    regret.reset(10.0)
    regret.skip(40.0)
    regret.update(50.0, 5.0, slack_rps=0.1, began_s=NONE_S)
    assert regret.requests == pytest.approx(50.0)
    again = SwitchRegret()
    again.restore(json.loads(json.dumps(regret.state())))
    for item in (regret, again):
        item.update(60.0, 1.0, slack_rps=0.1, began_s=NONE_S)
    assert again.requests == regret.requests
    fresh = SwitchRegret()
    fresh.restore(json.loads(json.dumps(SwitchRegret().state())))
    fresh.update(60.0, 1.0, slack_rps=0.1, began_s=NONE_S)
    assert fresh.requests == 0.0


@given(st.lists(st.tuples(st.floats(0.1, 60.0), st.floats(-20.0, 20.0), st.booleans()), min_size=1))
def test_it_is_never_negative_nor_more_than_all_that_was_missed(
    course: list[tuple[float, float, bool]],
) -> None:
    regret = SwitchRegret()
    now_s = began_s = 0.0
    missed = 0.0
    for step_s, more_rps, changed in course:
        began_s = now_s + step_s / 2 if changed else began_s
        now_s += step_s
        regret.update(now_s, more_rps, slack_rps=0.2, began_s=began_s)
        missed += max(0.0, more_rps) * step_s
        assert 0.0 <= regret.requests <= missed + 1e-6


def test_noise_about_nothing_does_not_add_up() -> None:
    draw = random.Random(0)
    regret = SwitchRegret()
    most = 0.0
    for minute in range(24 * 60):
        regret.update(60.0 * minute, draw.gauss(0.0, 0.4), slack_rps=0.5, began_s=NONE_S)
        most = max(most, regret.requests)
    # Of a plan that serves 10 requests/s, within an hour of which 36,000 come.
    assert most < 200.0
