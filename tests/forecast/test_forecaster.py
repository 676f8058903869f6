"""The rules of the forecaster, for every model that needs nothing installed."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.forecast.forecaster import HISTORY, Forecaster
from oserve.forecast.models import DEFAULT, SIMPLE, ModelSettings, make_model
from oserve.forecast.retype import mapped, nearest_types, replayed
from oserve.workload.columns import Floats

from . import series

NAMES = ("a", "b", "c", "d")
models = pytest.mark.parametrize("model", [DEFAULT, *SIMPLE])


def made(
    model: str = DEFAULT, k: int = 4, interval_s: float = 600.0, **options: object
) -> Forecaster:
    settings_ = ModelSettings(k=k, interval_s=interval_s)
    return Forecaster(
        make_model(model, settings_),
        NAMES[:k],
        interval_s=interval_s,
        **options,  # type: ignore[arg-type]
    )


def fed(forecaster: Forecaster, parts: Floats) -> Forecaster:
    for window in parts:
        forecaster.update(window.sum(axis=0), window)
    return forecaster


def numbers(forecaster: Forecaster) -> Floats:
    said = forecaster.forecast()
    return np.concatenate([said.mean_counts.ravel(), said.quantile_counts.ravel()])


@models
def test_forecasts_are_sound(model: str) -> None:
    forecaster = made(model)
    for window in series.bursts(1, 40):
        said = forecaster.forecast()
        assert said.mean_counts.shape == (5, 4)
        assert said.quantile_counts.shape == (4, 5, 4)
        assert np.isfinite(numbers(forecaster)).all()
        assert (said.mean_counts >= 0).all()
        assert (said.quantile_counts[0] >= 0).all()
        assert (np.diff(said.quantile_counts, axis=0) >= 0).all()
        forecaster.update(window.sum(axis=0), window)
    said = forecaster.forecast()
    assert np.allclose(said.rates_rps * 600, said.mean_counts)
    assert np.allclose(said.quantile_rps(0.95) * 600, said.quantile_counts[3])
    with pytest.raises(KeyError):
        said.quantile_rps(0.42)


@models
def test_what_is_said_does_not_hang_on_what_comes_later(model: str) -> None:
    one, other = series.walk(3, 30), series.walk(3, 30)
    other[20:] = 1000.0
    first, second = made(model), made(model)
    for place in range(20):
        first.update(one[place].sum(axis=0), one[place])
        second.update(other[place].sum(axis=0), other[place])
        assert np.array_equal(numbers(first), numbers(second))


def test_before_the_first_window_the_prior_is_expected() -> None:
    nothing = made().forecast()
    assert not nothing.mean_counts.any()
    told = made(prior_counts=[5, 50, 500, 0]).forecast()
    assert told.mean_counts[0].tolist() == [5, 50, 500, 0]
    assert told.quantile_counts[0, 0, 2] < 500 < told.quantile_counts[3, 0, 2]
    # One window outweighs any prior.
    forecaster = made(prior_counts=[5, 50, 500, 0])
    forecaster.update([20, 20, 20, 20])
    assert np.allclose(forecaster.forecast().mean_counts, 20, rtol=0.05)


@models
def test_a_gap_teaches_nothing_and_widens_the_band(model: str) -> None:
    forecaster = fed(made(model), series.flat(2, 40))
    before = forecaster.forecast()
    forecaster.update([math.nan] * 4)
    forecaster.skip(3)
    after = forecaster.forecast()
    assert np.allclose(after.mean_counts[0, 1:], before.mean_counts[0, 1:], rtol=0.35)
    width = [said.quantile_counts[3, 0] - said.quantile_counts[0, 0] for said in (before, after)]
    # Where forecasts far ahead have proved no worse than near ones there is little to widen.
    assert width[1].sum() > 0.97 * width[0].sum()
    forecaster.skip(20)
    last = forecaster.forecast()
    wide = last.quantile_counts[3, 0] - last.quantile_counts[0, 0]
    assert (wide[1:] > 1.2 * width[0][1:]).all()
    # One type unseen, the others go on.
    forecaster.update([math.nan, 70, 140, 310])
    assert np.isfinite(numbers(forecaster)).all()


def test_a_series_that_begins_with_a_gap() -> None:
    forecaster = made()
    forecaster.skip(5)
    for window in series.flat(4, 20):
        row = window.sum(axis=0)
        row[0] = math.nan
        forecaster.update(row)
    said = forecaster.forecast()
    assert not said.mean_counts[:, 0].any()
    assert np.allclose(said.mean_counts[0, 1:], series.BASE[1:], rtol=0.2)


@models
def test_zero_traffic_is_expected_to_stay(model: str) -> None:
    forecaster = made(model)
    for _ in range(20):
        forecaster.update([0, 0, 0, 0])
    said = forecaster.forecast()
    assert not said.mean_counts.any()
    assert (said.quantile_counts[3, 0] <= 1).all()


def test_a_type_appears_and_vanishes() -> None:
    parts = series.flat(5, 60)
    parts[:30, :, 3] = 0
    forecaster = fed(made(), parts[:33])
    assert forecaster.forecast().mean_counts[0, 3] > 150
    fed(forecaster, parts[33:])
    assert forecaster.forecast().mean_counts[0, 3] == pytest.approx(300, rel=0.15)
    for _ in range(6):
        forecaster.update([10, 60, 150, 0])
    assert forecaster.forecast().mean_counts[0, 3] < 30
    assert forecaster.forecast().mean_counts[0, 2] == pytest.approx(150, rel=0.15)


@pytest.mark.parametrize("model", [name for name in (DEFAULT, *SIMPLE) if name[:3] != "sea"])
def test_a_shift_is_believed_at_once(model: str) -> None:
    forecaster = fed(made(model), series.flat(6, 60))
    before = forecaster.forecast().mean_counts[0]
    forecaster.shift([math.nan, 600, math.nan, math.nan])
    after = forecaster.forecast().mean_counts[0]
    assert after[1] > 400
    assert np.allclose(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0.2)


@models
def test_it_goes_on_from_a_saved_state(model: str) -> None:
    parts = series.walk(7, 60)
    forecaster = fed(made(model), parts[:40])
    text = json.dumps(forecaster.state(), allow_nan=False)
    again = made(model)
    again.restore(json.loads(text))
    assert np.array_equal(numbers(again), numbers(forecaster))
    fed(forecaster, parts[40:])
    fed(again, parts[40:])
    assert np.allclose(numbers(again), numbers(forecaster), rtol=1e-12)


def test_a_state_of_something_else_is_refused() -> None:
    state = fed(made(), series.flat(8, 10)).state()
    broken = json.loads(json.dumps(state))
    broken["_model"]["_weights"]["_loss"] = {"shape": [1], "values": [0]}
    bad: list[object] = [{}, 7, {**state, "names": ["x"]}, {**state, "_bands": {}}, broken]
    for item in bad:
        with pytest.raises(OServeError):
            made().restore(item)  # type: ignore[arg-type]
    with pytest.raises(OServeError):
        made(k=3).restore(state)


def test_memory_does_not_grow() -> None:
    def size(state: object) -> int:
        if isinstance(state, dict):
            return sum(size(item) for item in state.values())
        return sum(size(item) for item in state) if isinstance(state, list) else 1

    forecaster = made(interval_s=3600.0)
    before = size(forecaster.state())
    fed(forecaster, series.flat(9, 60))
    assert size(forecaster.state()) == before
    assert len(forecaster.history) == 60
    assert made().history.shape == (0, 4)
    assert HISTORY == 1024


def test_new_types_keep_the_past() -> None:
    parts = series.flat(10, 50)
    old = fed(made(), parts)
    centres = np.array([[5, 3], [5.2, 3], [8, 3], [8, 6]])
    goes_to = nearest_types(centres, np.array([[5.1, 3.1], [8, 4], [1, 1]]))
    assert goes_to.tolist() == [0, 0, 1, 1]
    history = mapped(old.history, goes_to, 3)
    assert np.allclose(history.sum(axis=1), old.history.sum(axis=1))
    new = replayed(made(k=3), history)
    mean = new.forecast().mean_counts[0]
    assert np.allclose(mean[:2], [70, 450], rtol=0.15)
    assert mean[2] == 0
    with pytest.raises(ValueError, match="types"):
        mapped(old.history, [0, 1, 2, 3], 3)


def test_numbers_that_make_none_are_refused() -> None:
    wrong: list[Callable[[], object]] = [
        lambda: made(interval_s=0.0),
        lambda: made(steps=0),
        lambda: made(quantiles=(0.5, 0.1)),
        lambda: made(quantiles=(0.0, 0.5)),
        lambda: made(prior_counts=[1, 2]),
        lambda: made(prior_counts=[1, 2, 3, -1]),
        lambda: made().update([1, 2, 3, -1]),
        lambda: made().update([1, 2, 3, math.inf]),
        lambda: make_model("oracle", ModelSettings(k=1, interval_s=1.0)),
    ]
    for call in wrong:
        with pytest.raises(OServeError):
            call()
    with pytest.raises(ValueError, match="types"):
        made().update([1, 2, 3])


counts = st.lists(
    st.lists(st.one_of(st.just(math.nan), st.integers(0, 5000)), min_size=2, max_size=2),
    min_size=1,
    max_size=25,
)


@given(counts)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_any_counts_give_a_sound_forecast(rows: list[list[float]]) -> None:
    forecaster = made(k=2)
    for row in rows:
        forecaster.update(row)
    said = forecaster.forecast()
    assert np.isfinite(numbers(forecaster)).all()
    assert (said.quantile_counts >= 0).all()
    assert (np.diff(said.quantile_counts, axis=0) >= 0).all()
