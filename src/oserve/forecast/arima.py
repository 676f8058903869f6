"""ARIMA as a baseline: statsforecast's AutoARIMA per type, refitted as the history grows.

Optional (``pip install 'oserve[forecast]'``) and loaded on first use. Between fits the orders and
coefficients are fixed and only the data advance. It uses the last 500 windows.
"""

from typing import Any

import numpy as np

from oserve.core import OServeError
from oserve.forecast.model import Ring
from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

_LAST = 500
_FEWEST = 8
_GROWTH = 1.15


class Arima(Stateful):
    """One AutoARIMA per type, refitted when the history has grown by 15 %; at first a mean.

    Raises OServeError if statsforecast is not installed. The state excludes the fits: after a
    restore it fits again.
    """

    _saved = ("_ring",)

    def __init__(self, k: int) -> None:
        try:
            from statsforecast.models import AutoARIMA  # noqa: PLC0415 - an extra
        except ImportError:
            raise OServeError(
                "ARIMA needs statsforecast",
                place="--models",
                remedy="pip install 'oserve[forecast]', or leave arima out",
            ) from None
        self._make: Any = AutoARIMA
        self._ring = Ring(_LAST, k)
        self._fits: list[Any] = [None] * k
        self._fitted_at = 0

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        if np.isnan(counts).any() and self._ring.seen:
            counts = np.where(np.isnan(counts), self._ring.back(1), counts)
        self._ring.push(counts)

    def predict(self, steps: int) -> Floats:
        rows = np.nan_to_num(self._ring.last(_LAST))
        k = rows.shape[1]
        if not len(rows):
            return np.full((steps, k), np.nan)
        if len(rows) < _FEWEST:
            return np.tile(rows.mean(axis=0), (steps, 1))
        if self._fits[0] is None or self._ring.seen > _GROWTH * self._fitted_at:
            self._fits = [self._make(season_length=1).fit(rows[:, kind]) for kind in range(k)]
            self._fitted_at = self._ring.seen
        found = np.empty((steps, k))
        for kind, fit in enumerate(self._fits):
            found[:, kind] = fit.forward(rows[:, kind], h=steps)["mean"]
        mean: Floats = np.maximum(np.where(np.isfinite(found), found, rows[-1]), 0.0)
        return mean

    def shift(self, counts: Floats) -> None:
        self._ring.set_last(counts)
