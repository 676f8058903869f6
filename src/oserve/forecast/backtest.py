"""Backtest without look-ahead: every model steps through a series, scored on its second half.

Before each window a model has seen only the earlier ones; it forecasts, then observes the window.
The first half is the warm-up, and the only training data of an LSTM. Scores:

- RRMSE: root mean squared error over the mean count, per type, averaged over the types;
- pinball: the mean pinball loss of the quantiles over the mean count, averaged over the types;
- coverage: the share of counts from the lowest quantile to the highest, both included;
- the floor: the RRMSE on Poisson counts of a forecaster that knows every rate, the square root of
  the mean over the mean, averaged over the types.

All in percent except coverage. A type without arrivals in the second half has no score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.core import OServeError
from oserve.forecast.forecaster import QUANTILES, Forecast, Forecaster
from oserve.forecast.lstm_train import train_lstm
from oserve.forecast.models import DEFAULT, ModelSettings, known, make_default, make_model
from oserve.workload.columns import Floats

MIN_WINDOWS = 8
"""The fewest windows that can be split into two halves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """Counts of k types in n windows of s parts each: ``parts`` (n, s, k), NaN where missing."""

    names: tuple[str, ...]
    interval_s: float
    start_s: float
    parts: Floats

    @property
    def counts(self) -> Floats:
        """Shape (n, k)."""
        total: Floats = self.parts.sum(axis=1)
        return total

    @property
    def half(self) -> int:
        """The index at which the second half begins."""
        return len(self.parts) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestScore:
    """The scores of one model, as defined by the module.

    ``ms`` is the mean time to observe a window and forecast.
    """

    model: str
    rrmse: float
    pinball: float
    coverage: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRegret:
    """The relative excess of the default's RRMSE over the best one's (0.02: 2 % more).

    ``of_models``: over the best other model that ran (None if there is none); ``of_experts``: over
    its own best expert in hindsight.
    """

    best_model: str | None
    of_models: float | None
    best_expert: str
    of_experts: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Walk:
    """A model's one-step forecasts of the second half, with the observed counts.

    ``mean`` and ``counts`` (n, k), ``quantiles`` (n, q, k).
    """

    score: BacktestScore
    mean: Floats
    quantiles: Floats
    counts: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BacktestReport:
    """All models on one series. ``next`` is the default's forecast after the last window."""

    floor: float
    walks: tuple[Walk, ...]
    regret: ForecastRegret
    next: Forecast


def backtest(
    series: Series,
    models: Sequence[str],
    *,
    steps: int = 5,
    timer: Callable[[], float],
    settings: ModelSettings | None = None,
) -> BacktestReport:
    """Score ``models``, and always the default, on the second half of the series.

    ``timer`` returns seconds. ``settings`` may hold a trained LSTM; otherwise "lstm" is trained on
    the first half. Raises OServeError for fewer than 8 windows or a second half without arrivals,
    and propagates errors of the models.
    """
    names = known(models)
    counts = series.counts[series.half :]
    if len(series.parts) < MIN_WINDOWS or not np.nansum(counts):
        raise OServeError(
            f"{len(series.parts)} windows of {series.interval_s:g} s, {np.nansum(counts):g} "
            "arrivals in their second half, cannot be scored",
            place="--interval-s",
            remedy=f"give at least {MIN_WINDOWS} windows: a longer trace or a shorter interval",
        )
    settings = settings or ModelSettings(k=len(series.names), interval_s=series.interval_s)
    if "lstm" in names and settings.lstm is None:
        settings = replace(
            settings,
            lstm=train_lstm(
                filled(series.counts[: series.half]), series.names, interval_s=series.interval_s
            ),
        )
    walks = []
    for name in names:
        if name == DEFAULT:
            walk, experts, labels, following = _walk_default(series, settings, steps, timer)
        else:
            model = make_model(name, settings)
            forecaster = _forecaster(model, series, steps)
            walk = _walk(name, forecaster, series, timer, lambda: None)
        walks.append(walk)
    return BacktestReport(
        floor=floor(counts),
        walks=tuple(walks),
        regret=_regret(walks, experts, labels),
        next=following,
    )


def rrmse(mean: Floats, counts: Floats) -> float:
    """RRMSE in percent, averaged over types with arrivals; both (n, k), NaN where missing."""
    level = np.nanmean(counts, axis=0)
    scored = level > 0
    error = np.sqrt(np.nanmean((mean - counts) ** 2, axis=0))
    return float(100 * np.mean(error[scored] / level[scored]))


def pinball(quantiles: Floats, counts: Floats, levels: Sequence[float]) -> float:
    """Pinball loss in percent of (n, q, k) quantiles at ``levels`` (q) on (n, k) counts."""
    level = np.nanmean(counts, axis=0)
    scored = level > 0
    tau = np.array(levels)[None, :, None]
    short = counts[:, None] - quantiles
    loss = np.nanmean(np.maximum(tau * short, (tau - 1) * short), axis=(0, 1))
    return float(100 * np.mean(loss[scored] / level[scored]))


def coverage(quantiles: Floats, counts: Floats) -> float:
    """The share of counts (n, k) within the outer quantiles (n, q, k), for types with arrivals."""
    inside = (counts >= quantiles[:, 0]) & (counts <= quantiles[:, -1])
    scored = ~np.isnan(counts) & (np.nansum(counts, axis=0) > 0)
    return float(inside[scored].mean())


def floor(counts: Floats) -> float:
    """The least possible RRMSE in percent on Poisson counts with these means (n, k)."""
    level = np.nanmean(counts, axis=0)
    return float(100 * np.mean(1 / np.sqrt(level[level > 0])))


def filled(counts: Floats) -> Floats:
    """Counts (n, k) with missing ones replaced by the previous count, or 0."""
    found = counts.copy()
    last = np.zeros(counts.shape[1])
    for row in found:
        missing = np.isnan(row)
        row[missing] = last[missing]
        last = row
    return found


def _forecaster(model: object, series: Series, steps: int) -> Forecaster:
    return Forecaster(
        model,  # type: ignore[arg-type]
        series.names,
        interval_s=series.interval_s,
        steps=steps,
    )


def _walk(
    name: str,
    forecaster: Forecaster,
    series: Series,
    timer: Callable[[], float],
    before: Callable[[], None],
) -> Walk:
    """Step a model through the series; ``before`` runs before each window of the second half."""
    counts = series.counts
    means, quantiles, spent_s = [], [], 0.0
    for place, row in enumerate(counts):
        if place >= series.half:
            said = forecaster.forecast()
            means.append(said.mean_counts[0])
            quantiles.append(said.quantile_counts[:, 0])
            before()
        begin_s = timer()
        forecaster.update(row, series.parts[place])
        forecaster.forecast()
        spent_s += timer() - begin_s
    mean, bands = np.stack(means), np.stack(quantiles)
    score = BacktestScore(
        model=name,
        rrmse=rrmse(mean, counts[series.half :]),
        pinball=pinball(bands, counts[series.half :], QUANTILES),
        coverage=coverage(bands, counts[series.half :]),
        ms=1e3 * spent_s / len(counts),
    )
    return Walk(score=score, mean=mean, quantiles=bands, counts=counts[series.half :])


def _walk_default(
    series: Series, settings: ModelSettings, steps: int, timer: Callable[[], float]
) -> tuple[Walk, Floats, tuple[str, ...], Forecast]:
    """The walk, each expert's forecasts (n, m, k), their names, and the forecast after the end."""
    model = make_default(settings)
    forecaster = _forecaster(model, series, steps)
    said: list[Floats] = []
    walk = _walk(DEFAULT, forecaster, series, timer, lambda: said.append(model.experts(1)[:, 0]))
    return walk, np.stack(said), model.names, forecaster.forecast()


def _regret(walks: Sequence[Walk], experts: Floats, labels: tuple[str, ...]) -> ForecastRegret:
    own = walks[0]
    others = {walk.score.model: walk.score.rrmse for walk in walks[1:]}
    best = min(others, key=others.__getitem__) if others else None
    scores = {
        label: rrmse(experts[:, place], own.counts)
        for place, label in enumerate(labels)
        if not np.isnan(experts[:, place]).any()
    }
    best_expert = min(scores, key=scores.__getitem__)
    return ForecastRegret(
        best_model=best,
        of_models=None if best is None else _excess(own.score.rrmse, others[best]),
        best_expert=best_expert,
        of_experts=_excess(own.score.rrmse, scores[best_expert]),
    )


def _excess(mine: float, best: float) -> float:
    return mine / best - 1 if best > 0 else 0.0
