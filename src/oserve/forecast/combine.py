"""Weights of experts, learned online: exponential weights with discounted losses and fixed share.

Per window and type, an expert's loss is its squared error over the combination's mean squared error
so far. Losses are discounted, so that recent performance counts. A fixed share of the weight is
spread over all experts, and no loss trails the best by more than ``LAG``, so that an expert can
recover (after Herbster and Warmuth 1998). An expert without forecasts so far starts at that lag.
Part of an expert's loss is its loss over all types, since a short history has little data per type.
"""

import numpy as np

from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

CAP = 9.0
"""The largest loss per window, in mean squared errors."""


LAG = 16.0
"""The most by which an expert's loss can trail the best one's, so that it can recover."""


class Weights(Stateful):
    """Weights (m, k) of m experts for k types; each type's sum to 1."""

    _saved = ("_loss", "_weight", "_scale", "_count")

    def __init__(
        self,
        k: int,
        prior: Floats,
        *,
        rate: float = 2.0,
        discount: float = 0.97,
        share: float = 0.005,
        own: float = 0.2,
    ) -> None:
        self._prior = (prior / prior.sum())[:, None]
        self._rate, self._discount, self._share, self._own = rate, discount, share, own
        self._loss = np.zeros((len(prior), k))
        self._weight = np.tile(self._prior, (1, k))
        self._scale = np.zeros(k)
        self._count = np.zeros(k)

    def learn(self, experts: Floats, combined: Floats, counts: Floats) -> None:
        """Learn from each expert's forecast (m, k; NaN: none), the combined one and the counts."""
        seen = ~(np.isnan(counts) | np.isnan(combined))
        if not seen.any():
            return
        truth = np.where(seen, counts, 0.0)
        said = np.where(np.isnan(experts), combined, experts)
        error = np.where(seen, (said - truth) ** 2, 0.0)
        mine = np.where(seen, (np.where(seen, combined, 0.0) - truth) ** 2, 0.0)
        # Poisson noise is the lower bound: a lucky start must not shrink the scale.
        self._count = self._count + seen
        gain = np.maximum(1 / np.maximum(self._count, 1.0), 0.03)
        typical = np.median(error, axis=0)
        self._scale = np.where(
            seen, self._scale + gain * (np.maximum(mine, typical) - self._scale), self._scale
        )
        loss = np.minimum(error / np.maximum(self._scale, np.maximum(combined, 1.0)), CAP)
        total = self._discount * self._loss + loss
        silent = np.isnan(experts)
        last = np.where(silent, np.inf, total).min(axis=0) + LAG
        total = np.where(silent, last, np.minimum(total, last))
        self._loss = np.where(seen, total, self._loss)
        shared = self._loss.mean(axis=1, keepdims=True)
        mixed = self._own * self._loss + (1 - self._own) * shared
        raw = self._prior * np.exp(-self._rate * (mixed - mixed.min(axis=0)))
        self._weight = (1 - self._share) * raw / raw.sum(axis=0) + self._share * self._prior

    def combine(self, experts: Floats) -> Floats:
        """Combine the experts' forecasts (m, steps, k) to (steps, k); ignores NaN."""
        speaks = ~np.isnan(experts)
        weight = np.where(speaks, self._weight[:, None, :], 0.0)
        total = weight.sum(axis=0)
        mean: Floats = (weight * np.where(speaks, experts, 0.0)).sum(axis=0)
        return np.where(total > 0, mean / np.where(total > 0, total, 1.0), np.nan)

    @property
    def weight(self) -> Floats:
        """Shape (m, k)."""
        return self._weight
