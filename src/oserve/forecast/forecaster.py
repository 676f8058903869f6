"""The forecaster: one model of the arrivals of k types, its quantiles, and its rules.

The rules for every model:

- Cold start: a type without observations is forecast at ``prior_counts`` (default 0), with the
  quantiles of counts of that mean and unknown dispersion. From the first window on, observations
  replace the prior.
- Gaps: a NaN is a missing count. The forecaster learns nothing from it, its forecast stands, and
  the quantiles widen with each such window. ``skip`` passes over several windows.
- Zero traffic is a count like any other: the forecast goes to 0, and its 0.95 quantile with it.
- A type that vanishes has zero traffic. One that appears starts from zeros and rises within the
  first windows, or at once after ``shift``.
- New types: ``retype`` maps the history to them.

Pure: no clock, no randomness. Memory is bounded and does not grow with time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError
from oserve.forecast.bands import Bands
from oserve.forecast.model import PointModel, Ring
from oserve.forecast.state import PlainState, Stateful, unfit
from oserve.workload.columns import Floats

QUANTILES = (0.05, 0.5, 0.9, 0.95)
HISTORY = 1024
"""The windows of counts in the history, which are mapped to new types when types change."""

MAX_STEPS = 48
MAX_TYPES = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """A forecast of the next windows.

    ``mean_counts`` (steps, k) and ``quantile_counts`` (q, steps, k), at the levels ``quantiles``
    (q). Counts are per window of ``interval_s`` seconds.
    """

    names: tuple[str, ...]
    interval_s: float
    quantiles: tuple[float, ...]
    mean_counts: Floats
    quantile_counts: Floats

    @property
    def rates_rps(self) -> Floats:
        """Expected requests per second, shape (steps, k)."""
        return self.mean_counts / self.interval_s

    def quantile_rps(self, level: float) -> Floats:
        """That quantile of the rates, shape (steps, k). Raises KeyError for another level."""
        if level not in self.quantiles:
            raise KeyError(level)
        rates: Floats = self.quantile_counts[self.quantiles.index(level)] / self.interval_s
        return rates


class Forecaster(Stateful):
    """Observes windows one by one and forecasts the next ``steps``.

    Raises OServeError for invalid parameters.
    """

    _saved = ("_model", "_bands", "_history", "_said", "_quantiles", "_prior")

    def __init__(
        self,
        model: PointModel,
        names: Sequence[str],
        *,
        interval_s: float,
        steps: int = 5,
        quantiles: Sequence[float] = QUANTILES,
        prior_counts: npt.ArrayLike | None = None,
    ) -> None:
        k = len(names)
        _check(k, interval_s, steps, quantiles)
        self.names, self.interval_s, self.steps = tuple(names), interval_s, steps
        self.levels = tuple(quantiles)
        self._model = model
        self._bands = Bands(k, self.levels, steps)
        self._history = Ring(HISTORY, k)
        self._prior = np.zeros(k) if prior_counts is None else np.array(prior_counts, dtype=float)
        if self._prior.shape != (k,) or not (self._prior >= 0).all():
            raise OServeError(
                f"{self._prior.tolist()} are no counts of {k} types",
                place="prior_counts",
                remedy="give one number for each type, 0 or more",
            )
        # _said[a, s]: the mean forecast a + 1 windows ago for s + 1 windows ahead.
        self._said = np.full((steps, steps, k), np.nan)
        self._quantiles = np.full((len(self.levels), steps, k), np.nan)
        self._say()

    @property
    def model(self) -> PointModel:
        """The model of the means."""
        return self._model

    @property
    def history(self) -> Floats:
        """Counts of the last windows, oldest first, shape (up to 1024, k); NaN where missing."""
        return self._history.last(HISTORY)

    def update(self, counts: npt.ArrayLike, parts: Floats | None = None) -> None:
        """Observe a completed window: ``counts`` (k,), NaN where missing, in ``parts`` (s, k).

        Raises ValueError for other shapes and OServeError for counts below 0 or infinite.
        """
        k = len(self.names)
        row = np.array(counts, dtype=np.float64)
        pieces = row[None] if parts is None else np.asarray(parts, dtype=np.float64)
        if row.shape != (k,) or pieces.ndim != 2 or pieces.shape[1] != k or not len(pieces):
            raise ValueError(f"counts {row.shape} and parts {pieces.shape} of {k} types")
        if (row < 0).any() or np.isinf(row).any() or (pieces < 0).any() or np.isinf(pieces).any():
            raise OServeError(
                f"the counts are {row.tolist()}",
                place="counts",
                remedy="give finite counts of 0 or more, NaN where there is none",
            )
        steps = np.arange(self.steps)
        said = self._said[steps, steps]
        quantiles = np.where(np.isnan(said[0]), np.nan, self._quantiles[:, 0])
        self._bands.learn(said, quantiles, row)
        self._model.update(row, pieces)
        self._history.push(row)
        self._say()

    def skip(self, windows: int) -> None:
        """Pass over ``windows`` missing windows."""
        for _ in range(min(windows, HISTORY)):
            self.update(np.full(len(self.names), np.nan))

    def shift(self, counts: npt.ArrayLike) -> None:
        """Move the forecast to about ``counts`` (k,) after a detected change; NaN leaves a type.

        The levels move at once; experts with a longer memory follow as windows arrive.
        """
        self._model.shift(np.array(counts, dtype=np.float64))
        self._say(again=True)

    def forecast(self) -> Forecast:
        """The forecast of the next ``steps`` windows, computed at the end of the last one."""
        return Forecast(
            names=self.names,
            interval_s=self.interval_s,
            quantiles=self.levels,
            mean_counts=self._mean(),
            quantile_counts=self._quantiles.copy(),
        )

    def restore(self, state: PlainState) -> None:
        """Restore ``state``. Raises OServeError if it is of other types."""
        if not isinstance(state, dict) or list(self.names) != state.get("names"):
            raise unfit("it is of other workload types")
        super().restore(state)

    def state(self) -> PlainState:
        return {**super().state(), "names": list(self.names)}

    def _say(self, again: bool = False) -> None:
        mean = np.maximum(self._model.predict(self.steps), 0.0)
        if not again:
            self._said = np.concatenate([mean[None], self._said[:-1]])
        # Without observations it stays NaN: errors of the prior do not count against the model.
        self._said[0] = mean
        self._quantiles = self._bands.quantiles(self._mean())

    def _mean(self) -> Floats:
        return np.where(np.isnan(self._said[0]), self._prior, self._said[0])


def _check(k: int, interval_s: float, steps: int, quantiles: Sequence[float]) -> None:
    if not 1 <= k <= MAX_TYPES:
        raise OServeError(f"{k} types", place="types", remedy=f"give 1 to {MAX_TYPES}")
    if not 0 < interval_s < float("inf"):
        raise OServeError(f"it is {interval_s}", place="interval_s", remedy="give seconds over 0")
    if not 1 <= steps <= MAX_STEPS:
        raise OServeError(f"it is {steps}", place="steps", remedy=f"give 1 to {MAX_STEPS}")
    if not all(0 < level < 1 for level in quantiles) or list(quantiles) != sorted(set(quantiles)):
        raise OServeError(
            f"they are {list(quantiles)}",
            place="quantiles",
            remedy="give levels between 0 and 1, ascending",
        )
