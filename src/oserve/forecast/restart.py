"""A level that restarts at a change: short memory after a change, long memory otherwise.

A two-sided CUSUM (Page 1954) on window counts in units of their noise: a sum of
``|count - level| / deviation - 0.5`` over 4 indicates a change; the level then restarts at the last
count.
"""

import numpy as np

from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

_SLACK, _LIMIT = 0.5, 4.0
_MEMORY = 20.0


class RestartLevel(Stateful):
    """The running mean since the last change, with a memory of at most 20 windows."""

    _saved = ("_level", "_age", "_up", "_down", "_spread")

    def __init__(self, k: int) -> None:
        self._level = np.full(k, np.nan)
        self._age = np.zeros(k)
        self._up = np.zeros(k)
        self._down = np.zeros(k)
        self._spread = np.ones(k)

    def update(self, counts: Floats, parts: Floats) -> None:
        del parts
        seen = ~np.isnan(counts)
        level = np.where(np.isnan(self._level), counts, self._level)
        error = np.where(seen, counts - level, 0.0)
        noise = np.sqrt(self._spread * np.maximum(level, 1.0))
        z = np.where(seen, error / noise, 0.0)
        up = np.maximum(0.0, self._up + z - _SLACK)
        down = np.maximum(0.0, self._down - z - _SLACK)
        changed = seen & (np.maximum(up, down) > _LIMIT)
        self._up = np.where(changed, 0.0, np.where(seen, up, self._up))
        self._down = np.where(changed, 0.0, np.where(seen, down, self._down))
        age = np.where(changed, 0.0, self._age)
        gain = np.maximum(1 / (age + 1), 1 / _MEMORY)
        self._level = np.where(seen, level + gain * error, self._level)
        self._age = np.where(seen, age + 1, self._age)
        # One squared error says little, and less if a change caused it, so it is bounded.
        size = np.minimum(error**2 / np.maximum(level, 1.0), 9 * self._spread)
        self._spread = np.where(
            seen, np.maximum(1.0, 0.95 * self._spread + 0.05 * size), self._spread
        )

    def predict(self, steps: int) -> Floats:
        return np.tile(self._level, (steps, 1))

    def shift(self, counts: Floats) -> None:
        changed = ~np.isnan(counts)
        self._level = np.where(changed, counts, self._level)
        self._age = np.where(changed, 1.0, self._age)
        self._up = np.where(changed, 0.0, self._up)
        self._down = np.where(changed, 0.0, self._down)
