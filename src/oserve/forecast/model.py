"""What a model of arrivals is: counts in, expected counts of the windows to come out.

A window is one interval of the control loop; ``k`` is the number of workload types. Counts are per
window. ``parts`` are the counts of the same window in s equal parts, in order, which tell how the
window ended; without them the whole window is its only part. NaN stands for a count nobody saw.
"""

from typing import Protocol

import numpy as np

from oserve.forecast.state import PlainState, Stateful
from oserve.workload.columns import Floats


class PointModel(Protocol):
    """One way to forecast all types at once."""

    def update(self, counts: Floats, parts: Floats) -> None:
        """Take in the window that ended: ``counts`` (k,), ``parts`` (s, k), NaN where unseen."""
        ...

    def predict(self, steps: int) -> Floats:
        """Expected counts of the next windows, shape (steps, k), 0 or more; NaN before any."""
        ...

    def shift(self, counts: Floats) -> None:
        """A change was detected: from now on about ``counts`` (k,) a window; NaN where not."""
        ...

    def state(self) -> PlainState: ...

    def restore(self, state: PlainState) -> None: ...


class Ring(Stateful):
    """The last ``size`` windows of k types, in one array."""

    _kept = ("_rows", "_seen")

    def __init__(self, size: int, k: int) -> None:
        self._rows: Floats = np.full((size, k), np.nan)
        self._seen = 0

    def __len__(self) -> int:
        """How many are held."""
        return min(self._seen, len(self._rows))

    @property
    def seen(self) -> int:
        """How many ever came."""
        return self._seen

    def push(self, row: Floats) -> None:
        self._rows[self._seen % len(self._rows)] = row
        self._seen += 1

    def back(self, age: int) -> Floats:
        """The row of ``age`` windows ago, shape (k,): 1 is the last one."""
        row: Floats = self._rows[(self._seen - age) % len(self._rows)]
        return row

    def last(self, count: int) -> Floats:
        """The last ``count`` of those held, oldest first, shape (up to count, k)."""
        count = min(count, len(self))
        places = np.arange(self._seen - count, self._seen) % len(self._rows)
        rows: Floats = self._rows[places]
        return rows

    def set_last(self, row: Floats) -> None:
        """Correct the newest row where ``row`` is a number."""
        if self._seen:
            place = (self._seen - 1) % len(self._rows)
            self._rows[place] = np.where(np.isnan(row), self._rows[place], row)
