"""The interface of models of arrivals: counts in, expected counts of the next windows out.

A window is one interval of the control loop; ``k`` is the number of workload types. Counts are per
window. ``parts`` are the counts of a window's s equal parts, in order, so that a model sees how the
window ended; without them the window is its only part. NaN is a missing count.
"""

from typing import Protocol

import numpy as np

from oserve.forecast.state import PlainState, Stateful
from oserve.workload.columns import Floats


class PointModel(Protocol):
    """A model that forecasts the means of all types."""

    def update(self, counts: Floats, parts: Floats) -> None:
        """Observe a completed window: ``counts`` (k,), ``parts`` (s, k), NaN where missing."""
        ...

    def predict(self, steps: int) -> Floats:
        """Expected counts of the next windows, shape (steps, k), 0 or more; NaN without data."""
        ...

    def shift(self, counts: Floats) -> None:
        """Move the level to about ``counts`` (k,) per window after a change; NaN leaves a type."""
        ...

    def state(self) -> PlainState: ...

    def restore(self, state: PlainState) -> None: ...


class Ring(Stateful):
    """The last ``size`` windows of k types, in one array."""

    _saved = ("_rows", "_seen")

    def __init__(self, size: int, k: int) -> None:
        self._rows: Floats = np.full((size, k), np.nan)
        self._seen = 0

    def __len__(self) -> int:
        """The number of rows held."""
        return min(self._seen, len(self._rows))

    @property
    def seen(self) -> int:
        """The number of rows pushed so far."""
        return self._seen

    def push(self, row: Floats) -> None:
        self._rows[self._seen % len(self._rows)] = row
        self._seen += 1

    def back(self, age: int) -> Floats:
        """The row ``age`` windows back, shape (k,): 1 is the newest."""
        row: Floats = self._rows[(self._seen - age) % len(self._rows)]
        return row

    def last(self, count: int) -> Floats:
        """The last ``count`` rows, oldest first, shape (up to count, k)."""
        count = min(count, len(self))
        places = np.arange(self._seen - count, self._seen) % len(self._rows)
        rows: Floats = self._rows[places]
        return rows

    def set_last(self, row: Floats) -> None:
        """Correct the newest row where ``row`` is a number."""
        if self._seen:
            place = (self._seen - 1) % len(self._rows)
            self._rows[place] = np.where(np.isnan(row), self._rows[place], row)
