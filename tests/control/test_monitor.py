"""How long the traffic has been as it is, and from when on it is simulated again."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.monitor import TrafficMonitor
from oserve.control.policy import ControlPolicy
from oserve.control.tally import Batch
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.experts import Combination
from oserve.forecast.forecaster import Forecaster

NAMES = ("chats", "documents")
CHATS, DOCUMENTS = (40.0, 2.0), (5.0, 20.0)
# The end of a warm-up of the detector.
SINCE_S = 200


def monitor() -> TrafficMonitor:
    policy = ControlPolicy()
    forecaster = Forecaster(Combination(len(NAMES), ()), NAMES, interval_s=float(policy.interval_s))
    return TrafficMonitor(policy, forecaster, ChangeDetector(NAMES))


def played(
    rates: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", seed: int, waiting: int = 0
) -> TrafficMonitor:
    """A monitor after seconds of these rates; requests wait from second ``waiting`` on."""
    made = monitor()
    draw = np.random.default_rng(seed)
    for second, row in enumerate(draw.poisson(rates).tolist()):
        held = float(0 < waiting <= second)
        batch = Batch(names=NAMES, arrivals={second: list(row)})
        made.observe(float(second), [batch], {"waiting": held, "queued": 0.0})
    made.observe(float(len(rates)), [], {"waiting": float(waiting > 0), "queued": 0.0})
    return made


def part(shares: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> TrafficMonitor:
    mixed = np.outer(1.0 - shares, CHATS) + np.outer(shares, DOCUMENTS)
    return played(mixed, seed=1)


@settings(max_examples=10)
@given(st.integers(60, 300), st.integers(0, 100))
def test_after_a_step_it_is_as_old_as_the_step(age_s: int, seed: int) -> None:
    rates = np.array([CHATS] * SINCE_S + [DOCUMENTS] * age_s)
    found_s = played(rates, seed).age_s()
    assert found_s <= age_s + 5
    # Rarely, chance looks like a change.
    assert found_s >= 20


def test_steady_traffic_ages() -> None:
    ages = [part(np.array([0.0] * SINCE_S + [1.0] * age_s)).age_s() for age_s in (60, 120, 240)]
    assert ages == sorted(ages)
    assert ages[-1] > 200


def test_on_a_ramp_and_on_a_wave_nothing_lasts() -> None:
    ramp = np.concatenate([np.zeros(SINCE_S), np.linspace(0.0, 1.0, 400)])
    assert 0 < part(ramp).age_s() <= 160
    wave = (1.0 - np.cos(np.arange(600) * 2 * np.pi / 400)) / 2.0
    assert part(wave).age_s() <= 160


def test_traffic_that_never_changed_has_no_age() -> None:
    assert part(np.zeros(400)).age_s() == 0.0


def test_the_past_begins_before_the_requests_that_wait() -> None:
    rates = np.array([CHATS] * 1000)
    for waiting, first_s in ((0, 600), (950, 600), (700, 600), (500, 300), (10, 0)):
        past = played(rates, 1, waiting).past()
        assert sum(seconds for _, seconds in past) == 1000 - first_s
