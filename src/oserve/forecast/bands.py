"""Quantiles of a forecast: count noise with learned dispersion, calibrated by observations.

Counts of mean m are modelled as negative binomial with variance ``m + rho m^2`` (Poisson at ``rho``
0); ``rho`` is estimated by moments from the last residuals. On the scale ``g(y) = 2 / sqrt(rho) *
asinh(sqrt(rho (y + 3/8)))`` (Anscombe 1948) counts have variance 1 at any mean, so residuals of
busy and quiet hours are comparable. The quantiles are those of the residuals on that scale: the
type's own, then the other types', and some of a normal distribution as the prior. Their levels are
then adapted to the observed coverage (adaptive conformal inference, Gibbs and Candes 2021). Further
ahead the residuals are scaled by their observed growth with the horizon. Below a mean of 20 the
quantile is the negative binomial's own, a whole number.
"""

import math

import numpy as np

from oserve.forecast.state import PlainState, Stateful
from oserve.workload.columns import Floats

_MEMORY = 0.985
_OTHERS = 0.25
_PRIOR_ROWS = 9
_PRIOR_RHO, _PRIOR_RHO_WEIGHT = 0.05, 3.0
_MAX_RHO = 0.5
_STEP = 0.015
_EXACT_BELOW = 20.0
_GRID = 256
_MOST_SIGMAS, _MOST_RECORD = 2.5, 1.25
_PRIOR_GROWTH, _PRIOR_GROWTH_WEIGHT = 0.3, 5.0


class Bands(Stateful):
    """Quantiles of k types at ascending ``levels`` (q), up to ``steps`` windows ahead."""

    _saved = ("_mean", "_count", "_rows", "_levels", "_spread", "_weight", "_gap")

    def __init__(self, k: int, levels: tuple[float, ...], steps: int) -> None:
        size = max(40, 480 // k)
        self._asked = np.array(levels)[:, None]
        self._mean = np.full((size, k), np.nan)
        self._count = np.full((size, k), np.nan)
        self._rows = 0
        self._levels: Floats = np.tile(self._asked, (1, k))
        self._spread = np.zeros((steps, k))
        self._weight = np.zeros((steps, k))
        self._gap = np.zeros(k)
        # Derived from the last observation; not part of the state.
        self._rho: Floats | None = None

    def learn(self, ahead: Floats, quantiles: Floats, counts: Floats) -> None:
        """Learn from a completed window: its forecasts and its counts.

        ``ahead`` (steps, k) are the means forecast 1, 2, ... windows before, ``quantiles`` (q, k)
        those forecast one window before, ``counts`` (k,); NaN where there is no forecast or count.
        """
        seen = ~np.isnan(counts)
        self._gap = np.where(seen, 0.0, self._gap + 1)
        place = self._rows % len(self._mean)
        self._mean[place] = ahead[0]
        self._count[place] = counts
        self._rows += 1
        rho = self._rho = self._dispersion()
        size = (_scale(counts, rho) - _scale(ahead, rho)) ** 2
        known = ~np.isnan(size)
        gain = np.maximum(1 / (self._weight + 1), 0.03)
        moved = self._spread + gain * (np.minimum(np.nan_to_num(size), 25.0) - self._spread)
        self._spread = np.where(known, moved, self._spread)
        self._weight = np.where(known, self._weight + 1, self._weight)
        said = seen & ~np.isnan(quantiles)
        if said.any():
            below = np.where(counts < quantiles, 1.0, np.where(counts == quantiles, 0.5, 0.0))
            miss = np.where(said, self._asked - below, 0.0)
            shared = miss.sum(axis=1, keepdims=True) / np.maximum(said.sum(axis=1), 1)[:, None]
            tail = np.minimum(self._asked, 1 - self._asked)
            self._levels = np.clip(
                self._levels + _STEP * (miss + shared),
                self._asked - 0.8 * tail,
                self._asked + 0.8 * tail,
            )

    def quantiles(self, mean: Floats) -> Floats:
        """For expected counts (steps, k) of the next windows: shape (q, steps, k), ascending."""
        rho = self._dispersion() if self._rho is None else self._rho
        growth = self._growth(len(mean))
        reach = self._residuals(rho)[:, None, :] * growth
        scaled = _scale(mean, rho) + reach
        found = np.maximum(0.0, _counted(scaled, rho))
        small = mean < _EXACT_BELOW
        if small.any():
            exact = _exact(mean, rho, reach)
            found = np.where(small, exact, found)
        # A residual from an idle hour, applied to a busy one, must not give an extreme quantile.
        largest = np.nanmax(self._count, axis=0, initial=0.0)
        usual = mean + _MOST_SIGMAS * np.sqrt(mean + rho * mean**2) * growth + 3.0
        found = np.minimum(found, np.maximum(usual, _MOST_RECORD * largest))
        ordered: Floats = np.maximum.accumulate(found, axis=0)
        return ordered

    def restore(self, state: PlainState) -> None:
        super().restore(state)
        self._rho = None

    def _ages(self) -> Floats:
        size = len(self._mean)
        age = (self._rows - 1 - np.arange(size)) % size
        weight: Floats = np.where(np.arange(size) < self._rows, _MEMORY**age, 0.0)[:, None]
        return weight

    def _dispersion(self) -> Floats:
        """Rho of each type, shape (k,)."""
        known = ~np.isnan(self._mean + self._count)
        weight = np.where(known, self._ages(), 0.0)
        mean = np.where(known, np.maximum(self._mean, 0.5), 1.0)
        count = np.where(known, self._count, 1.0)
        # One burst must not dominate the dispersion.
        each = np.clip(((count - mean) ** 2 - mean) / mean**2, -1.0, _MAX_RHO)
        # Ratios of small counts are noisy and weigh less.
        weight *= mean / (mean + 10.0)
        total = (weight * each).sum(axis=0) + _PRIOR_RHO_WEIGHT * _PRIOR_RHO
        rho: Floats = np.clip(total / (weight.sum(axis=0) + _PRIOR_RHO_WEIGHT), 1e-3, _MAX_RHO)
        return rho

    def _residuals(self, rho: Floats) -> Floats:
        """Quantiles of the residuals one window ahead on the scale g, shape (q, k)."""
        k = len(rho)
        z = _scale(self._count, rho) - _scale(self._mean, rho)
        known = ~np.isnan(z)
        age = np.broadcast_to(self._ages(), z.shape)
        # At least as wide as the normal distribution on this scale.
        weight = np.where(known, self._ages(), 0.0)
        size = ((weight * np.where(known, z, 0.0) ** 2).sum() + 5.0) / (weight.sum() + 5.0)
        normal = _NORMAL_ROWS * math.sqrt(size)
        values = np.concatenate([z[known], normal])
        order = np.argsort(values)
        kinds = np.concatenate([np.nonzero(known)[1], np.full(len(normal), -1)])[order]
        base = np.concatenate([age[known], np.ones(len(normal))])[order]
        values = values[order]
        found = np.empty((len(self._asked), k))
        for kind in range(k):
            weight = base * np.where((kinds == kind) | (kinds < 0), 1.0, _OTHERS)
            place = np.cumsum(weight) - 0.5 * weight
            found[:, kind] = np.interp(self._levels[:, kind], place / weight.sum(), values)
        return found

    def _growth(self, steps: int) -> Floats:
        """The growth of the residuals with the horizon over that of one window, (steps, k)."""
        reach = np.arange(len(self._spread))[:, None]
        first = np.maximum(self._spread[0], 0.25)
        seen = np.where(self._weight > 0, self._spread / first, 1.0)
        prior = 1 + _PRIOR_GROWTH * reach
        weight = np.minimum(self._weight, 50.0)
        mixed = weight * seen + _PRIOR_GROWTH_WEIGHT * prior
        growth = np.maximum.accumulate(mixed / (weight + _PRIOR_GROWTH_WEIGHT), axis=0)
        growth = growth / growth[0]
        # Missing windows extend the horizon; beyond the known horizon the variance grows as for a
        # random walk.
        ahead = np.arange(steps)[:, None] + self._gap
        last = len(growth) - 1
        inside = np.minimum(ahead, last).astype(np.intp)
        taken = np.take_along_axis(growth, inside, axis=0)
        grown: Floats = np.sqrt(taken * (ahead + 1) / (inside + 1))
        return grown


def _scale(count: Floats, rho: Floats) -> Floats:
    scaled: Floats = 2 / np.sqrt(rho) * np.arcsinh(np.sqrt(rho * (count + 0.375)))
    return scaled


def _counted(scaled: Floats, rho: Floats) -> Floats:
    """The inverse of ``_scale``."""
    root = np.sinh(np.clip(scaled, 0.0, None) * np.sqrt(rho) / 2)
    count: Floats = root**2 / rho - 0.375
    return count


def _exact(mean: Floats, rho: Floats, z: Floats) -> Floats:
    """The negative binomial quantile at the probability of the normal quantile ``z``."""
    steps, k = mean.shape
    small = np.minimum(mean, _EXACT_BELOW)[..., None]
    spread = rho[None, :, None]
    n = np.arange(_GRID - 1)
    ratio = small * (1 + spread * n) / ((n + 1) * (1 + spread * small))
    first = np.exp(-np.log1p(spread * small) / spread)
    chances = np.concatenate([first, first * np.cumprod(ratio, axis=-1)], axis=-1)
    below = np.cumsum(chances, axis=-1)
    share = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z.ravel()])
    share = share.reshape(z.shape)
    found: Floats = (below[None] < share[..., None] - 1e-12).sum(axis=-1).astype(np.float64)
    return found.reshape(len(z), steps, k)


def _normal_rows(count: int) -> Floats:
    """``count`` quantiles of the normal distribution at even probabilities."""
    # Bisection suffices: it runs once.
    found = []
    for place in range(count):
        wanted = (place + 0.5) / count
        low, high = -6.0, 6.0
        for _ in range(50):
            middle = (low + high) / 2
            if 0.5 * math.erfc(-middle / math.sqrt(2)) < wanted:
                low = middle
            else:
                high = middle
        found.append(low)
    return np.array(found)


_NORMAL_ROWS = _normal_rows(_PRIOR_ROWS + 1)
