"""Changes are seen within seconds, false alarms are as rare as promised."""

import json
import math

import numpy as np
import pytest

from oserve.core import OServeError
from oserve.forecast.detect import TOTAL, ChangeDetector


@pytest.mark.parametrize(
    ("before", "after", "within"),
    [(2, 20, 3), (10, 50, 3), (10, 20, 12), (50, 75, 10), (2, 6, 25), (10, 2, 10), (0.5, 5, 25)],
)
def test_a_change_is_seen_within_seconds(before: float, after: float, within: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        detector = ChangeDetector(["a", "b"])
        for _ in range(400):
            assert detector.update(rng.poisson([before, 5])) == ()
        for _ in range(within):
            found = [c for c in detector.update(rng.poisson([after, 5])) if c.stream == "a"]
            if found:
                break
        assert found, (before, after, seed)
        assert found[0].before_rps == pytest.approx(before, rel=0.4)
        assert (found[0].after_rps > before) == (after > before)
        assert found[0].ticks <= within + 15


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "shape"), [(0.3, None), (5, None), (40, None), (5, 2), (40, 2)])
def test_false_alarms_are_as_rare_as_promised(rate: float, shape: float | None) -> None:
    rng = np.random.default_rng(5)
    streams, seconds, every = 60, 2000, 1000.0
    detector = ChangeDetector([str(item) for item in range(streams)], false_alarm_s=every)
    alarms = 0
    for _ in range(seconds):
        mean = rate if shape is None else rate * rng.gamma(shape, 1 / shape, streams)
        alarms += len(detector.update(rng.poisson(mean, streams)))
    # Two are promised at most; more than six of a Poisson count of 2 come in 1 of 200 runs.
    assert alarms <= 6


def test_the_total_sees_what_no_type_shows() -> None:
    rng = np.random.default_rng(1)
    names = [str(item) for item in range(30)]
    detector = ChangeDetector(names)
    for _ in range(400):
        detector.update(rng.poisson(0.5, 30))
    for _ in range(12):
        found = detector.update(rng.poisson(0.9, 30))
        if found:
            break
    assert [change.stream for change in found] == [TOTAL]


def test_a_change_is_told_once_and_becomes_the_rule() -> None:
    rng = np.random.default_rng(2)
    detector = ChangeDetector(["a"])
    for _ in range(300):
        detector.update(rng.poisson([4]))
    told = [change for _ in range(600) for change in detector.update(rng.poisson([16]))]
    assert {change.stream for change in told} == {"a", TOTAL}
    assert len(told) <= 4
    back = [change for _ in range(60) for change in detector.update(rng.poisson([4]))]
    assert {change.stream for change in back} == {"a", TOTAL}


def test_silence_ends() -> None:
    detector = ChangeDetector(["a"])
    for _ in range(300):
        assert detector.update([0]) == ()
    told = [change for _ in range(20) for change in detector.update([2])]
    assert told[0].before_rps == pytest.approx(0, abs=0.1)


def test_its_state_goes_on_and_gaps_change_nothing() -> None:
    rng = np.random.default_rng(3)
    rows = rng.poisson([3, 9], (200, 2))
    one = ChangeDetector(["a", "b"])
    for row in rows:
        one.update(row)
    other = ChangeDetector(["a", "b"])
    other.restore(json.loads(json.dumps(one.state())))
    assert one.update([math.nan, 1]) == ()
    for _ in range(30):
        row = rng.poisson([30, 9])
        assert one.update(row) == other.update(row)
    assert one.state() == other.state()


def test_what_makes_no_sense() -> None:
    for options in ({"tick_s": 0.0}, {"false_alarm_s": math.inf}):
        with pytest.raises(OServeError):
            ChangeDetector(["a"], **options)
    with pytest.raises(ValueError, match="types"):
        ChangeDetector(["a"]).update([1, 2])
