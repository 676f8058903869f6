"""Skill on seeded series: the default beside the simple models, the bands beside what came."""

import numpy as np
import pytest

from oserve.forecast.backtest import Series, backtest, coverage, floor, pinball, rrmse
from oserve.forecast.bands import Bands
from oserve.forecast.combine import Weights
from oserve.forecast.forecaster import Forecaster
from oserve.forecast.models import ModelSettings, make_model
from oserve.workload.columns import Floats

from . import series

SIMPLE = ("last-value", "smoothing", "holt")


def zero() -> float:
    return 0.0


def made(parts: Floats, interval_s: float = 60.0) -> Series:
    return Series(names=("a", "b", "c", "d"), interval_s=interval_s, start_s=0.0, parts=parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "most"),
    [
        (series.flat(21, 120), 1.02),
        (series.flat(22, 120, 0.05), 1.02),
        (series.mix(23, 120, 3600), 1.03),
        (series.mix(24, 120, 600), 1.03),
        (series.mix(25, 120, 300), 0.85),
        (series.walk(26, 120), 1.03),
        (series.walk(27, 120, 0.3), 1.03),
        (series.steps(28, 120), 1.03),
        (series.bursts(29, 120), 0.75),
    ],
    ids=["flat", "noisy", "slow", "medium", "fast", "walk", "wild walk", "steps", "bursts"],
)
def test_the_default_is_never_much_worse_than_the_best_simple_model(
    parts: Floats, most: float
) -> None:
    report = backtest(made(parts), SIMPLE, timer=zero)
    assert report.regret.of_models is not None
    assert report.regret.of_models <= most - 1
    assert report.regret.of_experts < 0.1
    default = report.walks[0].score
    assert default.model == "default"
    assert 0.85 <= default.coverage <= 0.95
    assert default.rrmse > 0.9 * report.floor


@pytest.mark.slow
def test_a_daily_season_is_found_after_two_days() -> None:
    rng = np.random.default_rng(31)
    hours = np.arange(24 * 8)
    day = 1 + 0.8 * np.sign(np.sin(2 * np.pi * hours / 24))[:, None]
    report = backtest(
        made(series.drawn(rng, series.BASE * day, parts=1), 3600.0),
        ("last-value", "smoothing", "seasonal-naive"),
        timer=zero,
    )
    scores = {walk.score.model: walk.score.rrmse for walk in report.walks}
    simple = min(scores[name] for name in ("last-value", "smoothing"))
    assert scores["seasonal-naive"] < 0.85 * simple
    assert scores["default"] < 0.8 * simple


def test_further_ahead_the_band_holds_too() -> None:
    parts = series.walk(32, 250)
    model = make_model("default", ModelSettings(k=4, interval_s=60.0))
    forecaster = Forecaster(model, "abcd", interval_s=60.0)
    said = []
    for window in parts:
        said.append(forecaster.forecast().quantile_counts)
        forecaster.update(window.sum(axis=0), window)
    counts = parts.sum(axis=1)
    for step in (0, 2, 4):
        bands = np.stack([item[:, step] for item in said])[50 : 250 - step]
        assert 0.84 <= coverage(bands, counts[50 + step :]) <= 0.96


def test_small_counts_have_whole_quantiles() -> None:
    rng = np.random.default_rng(33)
    bands = Bands(1, (0.05, 0.5, 0.95), 1)
    mean = np.full((1, 1), 2.0)
    inside = []
    for _ in range(400):
        quantiles = bands.quantiles(mean)[:, 0]
        assert (quantiles == np.rint(quantiles)).all()
        count = rng.poisson(2.0, 1).astype(float)
        inside.append(quantiles[0, 0] <= count[0] <= quantiles[2, 0])
        bands.learn(mean, quantiles, count)
    # Whole numbers cover more than was asked for: 0 to 4 or 5 of a mean of 2.
    assert 0.9 <= np.mean(inside) <= 0.995


def test_scores_by_hand() -> None:
    counts = np.array([[10.0, 0.0], [30.0, 0.0]])
    assert rrmse(np.array([[20.0, 5.0], [20.0, 5.0]]), counts) == pytest.approx(50.0)
    assert floor(counts) == pytest.approx(100 / np.sqrt(20))
    quantiles = np.array([[[5.0, 0.0], [12.0, 0.0]], [[5.0, 0.0], [12.0, 0.0]]])
    assert coverage(quantiles, counts) == 0.5
    # (0.1 * 5 + 0.1 * 2 + 0.1 * 25 + 0.9 * 18) / 4 over the mean of 20
    assert pinball(quantiles, counts, (0.1, 0.9)) == pytest.approx(100 * 4.85 / 20)


def test_the_future_changes_no_forecast() -> None:
    parts = series.walk(34, 60)
    changed = parts.copy()
    changed[45:] *= 7
    models = ("last-value", "smoothing", "seasonal", "holt", "moving-average")
    one, other = (backtest(made(item), models, timer=zero) for item in (parts, changed))
    for mine, theirs in zip(one.walks, other.walks, strict=True):
        assert np.array_equal(mine.mean[:16], theirs.mean[:16])
        assert np.array_equal(mine.quantiles[:16], theirs.quantiles[:16])
        assert not np.array_equal(mine.mean[16:], theirs.mean[16:])


def test_weights_find_the_best_expert_and_its_successor() -> None:
    weights = Weights(1, np.ones(3))
    said = np.array([[100.0], [150.0], [np.nan]])
    for truth, best in ((100.0, 0), (150.0, 1)):
        for _ in range(40):
            weights.learn(said, weights.combine(said[:, None])[0], np.array([truth]))
            assert weights.weight.sum() == pytest.approx(1)
        assert weights.combine(said[:, None])[0, 0] == pytest.approx(truth, rel=0.03)
        assert int(np.argmax(weights.weight[:2, 0])) == best
    # Nothing seen, nothing learned.
    before = weights.weight.copy()
    weights.learn(said, np.array([100.0]), np.array([np.nan]))
    assert np.array_equal(weights.weight, before)
