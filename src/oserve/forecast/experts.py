"""The default model: many simple experts, combined online."""

import numpy as np

from oserve.forecast.autoregression import AUTOREGRESSIONS, Autoregressions
from oserve.forecast.combine import Weights
from oserve.forecast.restart import RestartLevel
from oserve.forecast.simple import Average, FittedSmoothing, Holt, Levels, Season
from oserve.forecast.state import PlainState, Stateful
from oserve.workload.columns import Floats

_TAUS = (0.3, 0.7, 1.5, 3.0, 6.0, 15.0, 50.0)
_LEVEL_NAMES = tuple(f"level {tau:g}" for tau in _TAUS)


class Combination(Stateful):
    """The experts and their weights; ``names`` (m) are the experts'."""

    _saved = (
        *("_levels", "_shape", "_total", "_single", "_autoregressions", "_seasons", "_weights"),
    )

    def __init__(self, k: int, periods: tuple[int, ...] = (), **options: float) -> None:
        self._k = k
        self._levels = Levels(k, _TAUS)
        self._shape = Levels(k, (12.0,))
        self._total = Levels(1, (0.3, 1.0))
        self._single: list[Average | FittedSmoothing | Holt | RestartLevel] = [
            Average(k, 1),
            Average(k, 5),
            FittedSmoothing(k),
            Holt(k),
            Holt(k, alpha=0.3, beta=0.1),
            RestartLevel(k),
        ]
        self._autoregressions = Autoregressions(k)
        self._seasons = [Season(k, period) for period in periods]
        self.names = (
            *_LEVEL_NAMES,
            "total 0.3",
            "total 1",
            *("last", "average", "fitted level", "trend", "slow trend", "restart"),
            *AUTOREGRESSIONS,
            *(f"season {p} {n}" for p in periods for n in ("naive", "smoothed")),
        )
        # The last forecasts, cached for learning; not part of the state.
        self._said: Floats | None = None
        self._weights = Weights(k, np.ones(len(self.names)), **options)

    def update(self, counts: Floats, parts: Floats) -> None:
        said = self._said if self._said is not None else self.experts(1)
        self._said = None
        self._weights.learn(said[:, 0], self._weights.combine(said[:, :1])[0], counts)
        self._levels.update(counts, parts)
        self._shape.update(counts, parts)
        self._total.update(counts.sum(keepdims=True), parts.sum(axis=1, keepdims=True))
        for model in (*self._single, self._autoregressions, *self._seasons):
            model.update(counts, parts)

    def experts(self, steps: int) -> Floats:
        """Each expert's forecasts of the next windows, shape (m, steps, k); NaN if it has none."""
        shape = self._shape.level[0]
        total = np.nansum(shape)
        shares = shape / total if total > 0 else shape
        groups = [
            self._levels.predict_all(steps),
            self._total.predict_all(steps) * shares,
            np.stack([model.predict(steps) for model in self._single]),
            self._autoregressions.predict_all(steps),
            *(season.predict_all(steps) for season in self._seasons),
        ]
        return np.concatenate(groups)

    def predict(self, steps: int) -> Floats:
        self._said = self.experts(steps)
        return self._weights.combine(self._said)

    @property
    def weights(self) -> Floats:
        """Shape (m, k)."""
        return self._weights.weight

    def shift(self, counts: Floats) -> None:
        for model in (self._levels, self._shape, *self._single, self._autoregressions):
            model.shift(counts)
        for season in self._seasons:
            season.shift(counts)
        self._said = None

    def restore(self, state: PlainState) -> None:
        super().restore(state)
        self._said = None
