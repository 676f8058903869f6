"""Simple models: last value, moving average, exponential smoothing, damped trend, seasons.

They are baselines of the backtest and experts of the default model, vectorised over ``k`` types.
They learn nothing about a type from a missing count; its forecast stands.
"""

import math

import numpy as np

from oserve.core import OServeError
from oserve.forecast.model import Ring
from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

MAX_PERIOD = 2016
"""The longest season in windows: a week of five-minute windows."""

_PERIODS_S = (3600.0, 86400.0, 604800.0)


class Average(Stateful):
    """The mean of the last ``size`` observed windows; with ``size`` 1, the last value."""

    _saved = ("_ring",)

    def __init__(self, k: int, size: int) -> None:
        self._ring = Ring(size, k)

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        if len(self._ring) and np.isnan(counts).any():
            # A missing count takes the forecast value, so that it changes nothing.
            counts = np.where(np.isnan(counts), self.predict(1)[0], counts)
        self._ring.push(counts)

    def predict(self, steps: int) -> Floats:
        rows = self._ring.last(len(self._ring))
        known = ~np.isnan(rows)
        seen = known.sum(axis=0)
        mean = np.where(known, rows, 0.0).sum(axis=0) / np.maximum(seen, 1)
        return np.tile(np.where(seen > 0, mean, np.nan), (steps, 1))

    def shift(self, counts: Floats) -> None:
        for _ in range(len(self._ring)):
            self._ring.push(np.where(np.isnan(counts), self._ring.back(len(self._ring)), counts))


class Levels(Stateful):
    """Exponential smoothing of parts of windows, at several time constants at once.

    ``level = sum of count * exp(-age / tau)`` over the sum of the weights, so that it starts as the
    mean of the data. ``taus`` (m) are in windows. Smoothing parts rather than windows halves the
    delay: for a random walk, whole windows double the variance of the error.
    """

    _saved = ("_sum", "_weight")

    def __init__(self, k: int, taus: tuple[float, ...]) -> None:
        self._taus = np.array(taus)
        self._sum = np.zeros((len(taus), k))
        self._weight = np.zeros((len(taus), k))
        self._keep = np.exp(-1 / self._taus)[:, None]
        self._kernel = self._kernel_of(1)

    def _kernel_of(self, size: int) -> Floats:
        """The weights of the ``size`` parts of a window, shape (m, size)."""
        age = np.arange(size - 1, -1, -1) / size
        taus = self._taus[:, None]
        kernel: Floats = (1 - np.exp(-1 / (taus * size))) * np.exp(-age / taus)
        return kernel

    def update(self, counts: Floats, parts: Floats) -> None:
        size = len(parts)
        if size != self._kernel.shape[1]:
            self._kernel = self._kernel_of(size)
        kernel, keep = self._kernel, self._keep
        seen = ~np.isnan(counts)
        # Parts are missing only in a missing window; otherwise the count is spread evenly.
        share = np.where(np.isnan(parts), counts / size, parts)
        self._sum = np.where(seen, keep * self._sum + kernel @ share * size, self._sum)
        weight = keep * self._weight + kernel.sum(axis=1)[:, None]
        self._weight = np.where(seen, weight, self._weight)

    @property
    def level(self) -> Floats:
        """Expected counts per window, shape (m, k); NaN without data."""
        started = self._weight > 0
        level: Floats = np.where(started, self._sum / np.where(started, self._weight, 1.0), np.nan)
        return level

    def predict_all(self, steps: int) -> Floats:
        """Shape (m, steps, k)."""
        return np.repeat(self.level[:, None, :], steps, axis=1)

    def shift(self, counts: Floats) -> None:
        weight = np.where(self._weight > 0, self._weight, 1.0)
        changed = ~np.isnan(counts)
        self._sum = np.where(changed, np.nan_to_num(counts) * weight, self._sum)
        self._weight = np.where(changed, weight, self._weight)


class Smoothing(Levels):
    """Textbook exponential smoothing of whole windows with one ``alpha`` (0 to 1)."""

    def __init__(self, k: int, alpha: float) -> None:
        super().__init__(k, (-1.0 / math.log(1.0 - alpha),))

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        super().update(counts, counts[None])

    def predict(self, steps: int) -> Floats:
        return np.tile(self.level[0], (steps, 1))


class FittedSmoothing(Stateful):
    """Exponential smoothing with the ``alpha`` (0.1 to 0.9, or 1) of least squared error so far.

    Chosen per type, by errors one window ahead, on whole windows.
    """

    _saved = ("_levels", "_loss")

    def __init__(self, k: int) -> None:
        alphas = [*(step / 10 for step in range(1, 10)), 0.999]
        self._levels = Levels(k, tuple(-1.0 / math.log(1.0 - alpha) for alpha in alphas))
        self._loss = np.zeros((len(alphas), k))

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        error = (counts - self._levels.level) ** 2
        self._loss = self._loss + np.nan_to_num(error)
        self._levels.update(counts, counts[None])

    def predict(self, steps: int) -> Floats:
        best = np.argmin(self._loss, axis=0)[None]
        return np.tile(np.take_along_axis(self._levels.level, best, axis=0), (steps, 1))

    def shift(self, counts: Floats) -> None:
        self._levels.shift(counts)


class Holt(Stateful):
    """Smoothed level and damped trend (Gardner 1985); ``damping`` is per window.

    Forecasts stay within 0 and twice the level, since no rise lasts.
    """

    _saved = ("_level", "_trend", "_seen")

    def __init__(self, k: int, alpha: float = 0.6, beta: float = 0.2, damping: float = 0.9) -> None:
        self._alpha, self._beta, self._damping = alpha, beta, damping
        self._level = np.full(k, np.nan)
        self._trend = np.zeros(k)
        self._seen = np.zeros(k)

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        seen = ~np.isnan(counts)
        first = seen & np.isnan(self._level)
        before = np.where(first, counts, self._level)
        expected = before + self._damping * self._trend
        gain = np.maximum(self._alpha, 1 / (self._seen + 1))
        level = expected + gain * (counts - expected)
        trend = (1 - self._beta) * self._damping * self._trend + self._beta * (level - before)
        self._level = np.where(seen, level, self._level)
        self._trend = np.where(seen & ~first, trend, self._trend)
        self._seen = self._seen + seen

    def predict(self, steps: int) -> Floats:
        reach = np.cumsum(self._damping ** np.arange(1, steps + 1))
        path = self._level + reach[:, None] * self._trend
        return np.clip(path, 0.0, 2 * np.maximum(self._level, 0.0))

    def shift(self, counts: Floats) -> None:
        changed = ~np.isnan(counts)
        self._level = np.where(changed, counts, self._level)
        self._trend = np.where(changed, 0.0, self._trend)


class Season(Stateful):
    """Two seasonal forecasts: the count one period ago, and the level scaled by the profile.

    NaN until it has observed two whole periods. The profile is the weighted mean of each phase over
    past periods, recent ones more, relative to the level at the time, smoothed over its neighbours.
    """

    _saved = ("_ring", "_profile", "_now")

    def __init__(self, k: int, period: int) -> None:
        self._period = period
        self._ring = Ring(period, k)
        self._profile = np.full((period, k), np.nan)
        self._now = Levels(k, (1.0, float(period)))

    def update(self, counts: Floats, parts: Floats) -> None:
        phase = self._ring.seen % self._period
        if len(self._ring):
            one_ago = self._ring.back(self._period)
            counts = np.where(np.isnan(counts), one_ago, counts)
        self._now.update(counts, parts)
        base = self._now.level[1]
        ratio = counts / np.where(base > 0, base, 1.0)
        old = self._profile[phase]
        ratio = np.where(np.isnan(ratio), old, ratio)
        self._profile[phase] = np.where(np.isnan(old), ratio, 0.5 * old + 0.5 * ratio)
        self._ring.push(counts)

    def predict_all(self, steps: int) -> Floats:
        """The naive and the smoothed forecast, shape (2, steps, k)."""
        k = self._profile.shape[1]
        if self._ring.seen < 2 * self._period:
            return np.full((2, steps, k), np.nan)
        ahead = np.arange(steps) % self._period
        rows = self._ring.last(self._period)
        here = self._ring.seen - 1
        near = self._smooth(np.arange(here, here + steps + 1))
        ratio = (near[1:] + 0.02) / (near[0] + 0.02)
        return np.stack([rows[ahead], self._now.level[0] * np.clip(ratio, 0.2, 5.0)])

    def _smooth(self, places: np.ndarray) -> Floats:
        phases = (places[:, None] + np.array([-1, 0, 1])) % self._period
        weights = np.array([0.25, 0.5, 0.25])[None, :, None]
        smooth: Floats = (self._profile[phases] * weights).sum(axis=1)
        return smooth

    def shift(self, counts: Floats) -> None:
        self._now.shift(counts)


class Seasonal(Stateful):
    """A forecast of ``Season`` for the longest observed period; without one, the level."""

    _saved = ("_seasons", "_last")

    def __init__(self, k: int, periods: tuple[int, ...], *, smoothed: bool) -> None:
        self._seasons = [Season(k, period) for period in sorted(periods)]
        self._which = int(smoothed)
        self._last = Smoothing(k, 0.6)

    def update(self, counts: Floats, parts: Floats) -> None:
        self._last.update(counts, parts)
        for season in self._seasons:
            season.update(counts, parts)

    def predict(self, steps: int) -> Floats:
        found = self._last.predict(steps)
        for season in self._seasons:
            mine = season.predict_all(steps)[self._which]
            found = np.where(np.isnan(mine), found, mine)
        return found

    def shift(self, counts: Floats) -> None:
        self._last.shift(counts)
        for season in self._seasons:
            season.shift(counts)


def periods_of(interval_s: float) -> tuple[int, ...]:
    """Hour, day and week in windows, if these are a whole number from 6 to 2,016.

    Raises OServeError for an invalid interval.
    """
    if not interval_s > 0:
        raise OServeError(f"it is {interval_s}", place="interval_s", remedy="give seconds over 0")
    found = []
    for period_s in _PERIODS_S:
        windows = round(period_s / interval_s)
        if 6 <= windows <= MAX_PERIOD and math.isclose(windows * interval_s, period_s):
            found.append(windows)
    return tuple(found)
