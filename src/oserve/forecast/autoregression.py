"""Autoregression by recursive least squares, on counts relative to their slow level.

``z = count / level - 1`` normalises busy and quiet types, so one pooled set of coefficients can
learn from all of them, which suits a short history; a set per type learns more slowly. Observations
are weighted by their noise: the Poisson noise of ``z`` has variance 1/level. Recursive least
squares with forgetting: Haykin, "Adaptive Filter Theory", chapter on RLS.
"""

import numpy as np

from oserve.forecast.model import Ring
from oserve.forecast.simple import Levels
from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

AUTOREGRESSIONS = ("lags, pooled", "scales, pooled", "lags", "scales")
"""On the last five counts, or on levels at three speeds; pooled coefficients, or one set a type."""

_LAGS = 5
_FAST = (0.3, 1.0, 4.0)
_SLOW = 30.0
_FORGET = 0.995
_DOUBT = 0.3
_SPREAD = 0.05
_LIMIT = 4.0
_MOST_TRACE = 10.0

_START = np.array([[0.5, 0.2, 0.1, 0.05, 0.0], [0.3, 0.3, 0.2, 0.0, 0.0]])


class Autoregressions(Stateful):
    """``z(t+1) = sum of a_i x_i(t)`` in the four variants of ``AUTOREGRESSIONS``."""

    _saved = ("_ring", "_levels", "_pooled", "_pooled_cov", "_own", "_own_cov")

    def __init__(self, k: int) -> None:
        self._ring = Ring(_LAGS, k)
        self._levels = Levels(k, (*_FAST, _SLOW))
        # The last axis of a set of coefficients always has length 5; unused ones stay 0.
        three = np.diag([1.0, 1.0, 1.0, 0.0, 0.0]) * _DOUBT
        self._pooled = _START.copy()
        self._pooled_cov = np.stack([np.eye(_LAGS) * _DOUBT, three])
        # A single type supports fewer coefficients.
        self._own = np.repeat(_START[:, None] * (np.arange(_LAGS) < 3), k, axis=1)
        self._own_cov = np.tile(three, (2, k, 1, 1))
        # The update of the features after an observed or predicted z.
        decay = np.exp(-1 / np.array(_FAST))
        self._carry = np.zeros((2, _LAGS, _LAGS))
        self._carry[0] = np.eye(_LAGS, k=-1)
        self._carry[1, :3, :3] = np.diag(decay)
        self._enter = np.zeros((2, 1, _LAGS))
        self._enter[0, 0, 0] = 1.0
        self._enter[1, 0, :3] = 1 - decay

    def update(self, counts: Floats, parts: Floats) -> None:
        base = self._levels.level[3]
        ready = ~np.isnan(counts) & (base > 0)
        if ready.any():
            x = self._features(base)
            safe = np.where(ready, base, 1.0)
            target = np.where(ready, np.clip(counts / safe - 1, -1.0, _LIMIT), 0.0)
            noise = 1 + 1 / (safe * _SPREAD)
            for kind in np.flatnonzero(ready):
                _learn(self._pooled, self._pooled_cov, x[:, kind], target[kind], noise[kind])
            theta, cov = self._own[:, ready], self._own_cov[:, ready]
            _learn(theta, cov, x[:, ready], target[ready], noise[ready])
            self._own[:, ready], self._own_cov[:, ready] = theta, cov
        self._levels.update(counts, parts)
        self._ring.push(np.where(np.isnan(counts), self._levels.level[3], counts))

    def _features(self, base: Floats) -> Floats:
        """The lags and the levels, shape (2, k, 5)."""
        safe = np.where(base > 0, base, 1.0)
        x = np.zeros((2, _LAGS, len(base)))
        rows = self._ring.last(_LAGS)[::-1]
        x[0, : len(rows)] = rows / safe - 1
        x[1, :3] = self._levels.level[:3] / safe - 1
        # A type without observations has no features.
        return np.nan_to_num(np.clip(x, -1.0, _LIMIT)).transpose(0, 2, 1)

    def predict_all(self, steps: int) -> Floats:
        """Shape (4, steps, k)."""
        base = self._levels.level[3]
        theta = np.concatenate([np.repeat(self._pooled[:, None], len(base), axis=1), self._own])
        x = np.tile(self._features(base), (2, 1, 1))
        carry, enter = np.tile(self._carry, (2, 1, 1)), np.tile(self._enter, (2, 1, 1))
        path = np.empty((4, steps, len(base)))
        for step in range(steps):
            z = np.clip((x * theta).sum(axis=2), -1.0, _LIMIT)
            path[:, step] = z
            x = x @ carry.transpose(0, 2, 1) + z[:, :, None] * enter
        return np.where(base > 0, base * (1 + path), base)

    def shift(self, counts: Floats) -> None:
        self._levels.shift(counts)
        # The slow level stays; the values relative to it move.
        self._ring.set_last(counts)


def _learn(
    theta: Floats, cov: Floats, x: Floats, target: Floats | float, noise: Floats | float
) -> None:
    """Update each set in place by one observation: (..., 5), (..., 5, 5), (..., 5), (...)."""
    spread = (cov @ x[..., None])[..., 0]
    gain = spread / (_FORGET * noise + (x * spread).sum(axis=-1))[..., None]
    error = target - (x * theta).sum(axis=-1)
    theta += gain * error[..., None]
    cov -= gain[..., None] * spread[..., None, :]
    cov /= _FORGET
    # The covariance of features without excitation must stay bounded.
    trace = np.trace(cov, axis1=-2, axis2=-1)
    cov *= np.minimum(1.0, _MOST_TRACE / np.maximum(trace, 1e-12))[..., None, None]
