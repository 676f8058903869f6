"""Arrival rates: every arrival is counted once, in its window and type."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.workload.rates import arrival_rates, mean_rates, workload_types
from oserve.workload.types import fit_types

K = 3
arrivals = st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, K - 1)), min_size=1, max_size=60)
windows = st.floats(0.5, 1e4)
quick = settings(derandomize=True, deadline=None)


@given(arrivals, windows)
@quick
def test_every_arrival_is_counted_once(rows: list[tuple[float, int]], window_s: float) -> None:
    times, kinds = [time for time, _ in rows], [kind for _, kind in rows]
    rates = arrival_rates(times, kinds, K, window_s=window_s)
    assert rates.rate_rps.shape == (len(rates.window_start_s), K)
    assert rates.window_start_s[0] == min(times)
    assert np.all(rates.window_s == window_s)
    assert rates.counts.sum(axis=0).tolist() == np.bincount(kinds, minlength=K).tolist()
    assert np.allclose(rates.rate_rps * window_s, rates.counts)


@given(arrivals, st.floats(1e3, 1e4), st.floats(0, 5e3), st.floats(1, 1e4))
@quick
def test_windows_are_half_open_and_cut_at_the_end(
    rows: list[tuple[float, int]], window_s: float, start_s: float, span_s: float
) -> None:
    times, kinds = [time for time, _ in rows], [kind for _, kind in rows]
    end_s = start_s + span_s
    rates = arrival_rates(times, kinds, K, window_s=window_s, start_s=start_s, end_s=end_s)
    ends = rates.window_start_s + rates.window_s
    assert ends[-1] == pytest.approx(end_s)
    assert math.isclose(rates.window_s.sum(), span_s, rel_tol=1e-9)
    for at, begin in enumerate(rates.window_start_s):
        end = rates.window_start_s[at + 1] if at + 1 < len(ends) else end_s
        for kind in range(K):
            inside = sum(begin <= time < end for time, item in rows if item == kind)
            assert rates.counts[at, kind] == inside
            assert rates.rate_rps[at, kind] == pytest.approx(inside / rates.window_s[at])


@given(arrivals, st.none() | st.floats(1, 1e5))
@quick
def test_mean_rates_add_up(rows: list[tuple[float, int]], duration_s: float | None) -> None:
    times, kinds = [time for time, _ in rows], [kind for _, kind in rows]
    rates = mean_rates(times, kinds, K, duration_s=duration_s)
    if duration_s is None:
        gaps = max(1, len(times) - 1)
        duration_s = max(1.0, (max(times) - min(times)) * len(times) / gaps)
    assert rates.sum() == pytest.approx(len(rows) / duration_s)
    assert (rates * duration_s).tolist() == pytest.approx(np.bincount(kinds, minlength=K).tolist())


def test_the_span_of_few_requests() -> None:
    assert mean_rates([7.0], [0], 1).tolist() == [1.0]
    assert mean_rates([7.0, 7.0, 7.0], [0, 0, 1], 2).tolist() == [2.0, 1.0]
    # A request every second is one a second, however many there are.
    for count in (2, 3, 100):
        assert mean_rates(np.arange(count), [0] * count, 1).tolist() == pytest.approx([1.0])


def test_a_quiet_time_has_no_rate() -> None:
    rates = arrival_rates([5.0], [0], 1, window_s=10, start_s=100, end_s=125)
    assert rates.rate_rps.tolist() == [[0.0], [0.0], [0.0]]
    assert rates.window_s.tolist() == [10, 10, 5]


def test_rounding_leaves_no_sliver() -> None:
    rates = arrival_rates([0.0], [0], 1, window_s=0.1, start_s=0.0, end_s=0.1 * 3)
    assert len(rates.window_s) == 3


def test_types_with_their_rates() -> None:
    model = fit_types([10, 10, 5000], [5, 5, 500], k=2)
    rates = mean_rates([0.0, 1.0, 2.0], model.assign([10, 10, 5000], [5, 5, 500]), 2)
    short, long = workload_types(model, rates)
    assert (short.name, short.prompt_tokens, short.output_tokens) == (model.names[0], 10.0, 5.0)
    assert short.arrival_rate_rps == pytest.approx(2 / 3)
    assert long.arrival_rate_rps == pytest.approx(1 / 3)
    for bad in (math.nan, -1.0, math.inf):
        with pytest.raises(OServeError) as caught:
            workload_types(model, [1.0, bad])
        assert caught.value.place == model.names[1]
    with pytest.raises(ValueError, match="argument"):
        workload_types(model, [1.0])


def test_input_that_makes_no_sense() -> None:
    for made in (
        lambda: arrival_rates([], [], 1, window_s=60),
        lambda: mean_rates([], [], 1),
    ):
        with pytest.raises(OServeError, match="zero traffic"):
            made()
    with pytest.raises(OServeError, match="request 2"):
        mean_rates([0.0, math.nan], [0, 0], 1)
    for window_s in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OServeError, match="window_s"):
            arrival_rates([0.0], [0], 1, window_s=window_s)
    with pytest.raises(OServeError, match="too many"):
        arrival_rates([0.0, 1e9], [0, 0], 1, window_s=0.1)
    with pytest.raises(OServeError, match="end_s"):
        arrival_rates([0.0], [0], 1, window_s=1, start_s=5, end_s=5)
    with pytest.raises(OServeError, match="duration_s"):
        mean_rates([0.0], [0], 1, duration_s=0.0)
    with pytest.raises(ValueError, match="types"):
        mean_rates([0.0], [1], 1)
    with pytest.raises(ValueError, match="twice"):
        mean_rates([0.0, 1.0], [0], 1)
