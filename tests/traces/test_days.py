"""Days: rates and bursts as given, lengths from the pool, compressed without other rates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import TraceRequest
from oserve.traces.days import (
    DayPart,
    compress_day,
    dispersion_of,
    synthesise_day,
    synthetic_parts,
    window_rates,
)


def part(rates: list[float], *, dispersion: float = 1.0, pool: int = 4) -> DayPart:
    return DayPart(
        name="conv",
        rates_rps=np.array(rates),
        prompt_tokens=np.arange(1, pool + 1) * 100,
        output_tokens=np.arange(1, pool + 1) * 10,
        dispersion=dispersion,
    )


@settings(max_examples=30, deadline=None)
@given(
    rates=st.lists(st.floats(0.5, 4.0), min_size=2, max_size=6),
    compress=st.sampled_from([1.0, 2.0, 6.0]),
    load=st.floats(0.5, 2.0),
    seed=st.integers(0, 100),
)
def test_a_day_has_the_rates_of_its_windows(
    rates: list[float], compress: float, load: float, seed: int
) -> None:
    made = synthesise_day([part(rates)], seed=seed, load=load, compress=compress)
    arrival = np.array([request.arrival_s for request in made])
    assert (np.diff(arrival) >= 0).all()
    window_s = 600.0 / compress
    counts, _ = np.histogram(arrival, bins=len(rates), range=(0.0, window_s * len(rates)))
    assert counts.sum() == len(made)
    wanted = np.array(rates) * load * window_s
    assert (np.abs(counts - wanted) < 6 * np.sqrt(wanted)).all()
    assert {(r.prompt_tokens, r.output_tokens) for r in made} <= {
        (100 * k, 10 * k) for k in range(1, 5)
    }
    assert made == synthesise_day([part(rates)], seed=seed, load=load, compress=compress)


@pytest.mark.parametrize("dispersion", [1.0, 2.0, 20.0])
def test_bursts_are_those_that_were_measured(dispersion: float) -> None:
    made = synthesise_day([part([3.0] * 60, dispersion=dispersion)], seed=1)
    found = dispersion_of(np.array([request.arrival_s for request in made]))
    assert found == pytest.approx(dispersion, rel=0.15)


def test_a_slow_change_of_the_rate_is_no_burst() -> None:
    rates = [float(rate) for rate in np.linspace(0.5, 5.0, 60)]
    made = synthesise_day([part(rates)], seed=1)
    assert dispersion_of(np.array([r.arrival_s for r in made])) == pytest.approx(1.0, rel=0.15)


def test_few_arrivals_count_as_poisson() -> None:
    assert dispersion_of(np.zeros(0)) == 1.0
    assert dispersion_of(np.array([1.0, 2.0, 3.0])) == 1.0


def test_halves_share_no_lengths() -> None:
    first, second = part([1.0]).halves()
    assert set(first.prompt_tokens) | set(second.prompt_tokens) == {100, 200, 300, 400}
    assert not set(first.prompt_tokens) & set(second.prompt_tokens)
    only, same = part([1.0], pool=1).halves()
    assert list(only.prompt_tokens) == list(same.prompt_tokens) == [100]


@settings(max_examples=30, deadline=None)
@given(
    compress=st.sampled_from([1.0, 3.0, 6.0]), share=st.floats(0.05, 1.0), seed=st.integers(0, 9)
)
def test_a_compressed_trace_keeps_its_rate_and_its_order(
    compress: float, share: float, seed: int
) -> None:
    requests = [
        TraceRequest(arrival_s=at * 0.5, prompt_tokens=at + 1, output_tokens=1)
        for at in range(7200)
    ]
    load = share * compress
    kept = compress_day(requests, compress=compress, load=load, seed=seed)
    arrival = np.array([request.arrival_s for request in kept])
    assert (np.diff(arrival) >= 0).all()
    assert arrival.max() < 3600.0 / compress
    assert len({request.prompt_tokens for request in kept}) == len(kept)
    wanted = 7200 * share
    assert abs(len(kept) - wanted) < 6 * np.sqrt(wanted)


def test_a_compressed_trace_keeps_the_first_part_of_each_window() -> None:
    requests = [
        TraceRequest(arrival_s=float(at), prompt_tokens=1, output_tokens=1) for at in range(1200)
    ]
    kept = compress_day(requests, compress=6)
    assert [request.arrival_s for request in kept] == [float(at) for at in range(200)]


def test_a_load_beyond_the_trace_is_refused() -> None:
    with pytest.raises(OServeError, match="compress"):
        compress_day([], compress=2, load=2.5)
    with pytest.raises(OServeError, match="number over 0"):
        synthesise_day([part([1.0])], seed=0, load=0.0)


def test_windows_of_a_curve() -> None:
    rates = np.arange(12).astype(np.float64)
    assert list(window_rates(rates, window_s=600.0, start_h=1.0, hours=0.5)) == [6.0, 7.0, 8.0]
    with pytest.raises(OServeError, match="end after 2 h"):
        window_rates(rates, window_s=600.0, start_h=1.5, hours=1.0)


def test_a_part_without_lengths_or_rates_is_refused() -> None:
    with pytest.raises(OServeError, match="no lengths"):
        part([1.0], pool=0)
    with pytest.raises(OServeError, match="rate is missing"):
        part([float("nan")])


def test_the_synthetic_day_swings_about_five_times_and_its_mix_drifts() -> None:
    parts = synthetic_parts(seed=0)
    total = np.sum([item.rates_rps for item in parts], axis=0)
    assert 4.0 < total.max() / total.min() < 7.0
    shares = [item.rates_rps / total for item in parts]
    assert all(share.max() / share.min() > 1.3 for share in shares)
