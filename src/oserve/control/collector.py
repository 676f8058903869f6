"""The collector: arrivals per type and second in a ring buffer, and windows over it.

Times are Unix seconds, so that counts keep their meaning across a restart. A second is *seen* if
the gateway counted throughout it; a window with too few seen seconds is a gap, marked NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oserve.control.tally import Batch
from oserve.workload.columns import Floats

# After a longer pause between two ticks, the seconds between them count as not seen.
_LONGEST_TICK_S = 5
# A window with a smaller fraction of seen seconds is a gap.
_MIN_COVERAGE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """Arrivals per type, (k,), from ``start_s`` for ``width_s`` seconds; NaN in a gap.

    ``parts``: counts of p equal parts, (p, k), in order of time.
    """

    start_s: int
    width_s: int
    counts: Floats
    parts: Floats


class Collector:
    """Holds the last ``size_s`` seconds of k types; ``too_late`` counts seconds older than that."""

    def __init__(self, names: Sequence[str], *, size_s: int = 3600) -> None:
        self.names = tuple(names)
        self.size_s = size_s
        self.gauges: dict[str, float] = {}
        self.too_late = 0
        self._counts: Floats = np.zeros((size_s, len(self.names)))
        # Requests that ended, their prompt tokens, their output tokens.
        self._tokens: Floats = np.zeros((size_s, 3))
        self._second = np.full(size_s, -1, dtype=np.int64)
        self._seen = np.zeros(size_s, dtype=bool)
        self._newest = -1

    def add(self, batch: Batch) -> None:
        """Add counts. Types are matched by name; unknown ones are ignored."""
        places = [self.names.index(name) if name in self.names else -1 for name in batch.names]
        for second, row in batch.arrivals.items():
            place = self._place(second)
            if place is None:
                continue
            for kind, count in zip(places, row, strict=True):
                if kind >= 0:
                    self._counts[place, kind] += count
        for second, numbers in batch.tokens.items():
            place = self._place(second)
            if place is not None:
                self._tokens[place] += numbers

    def tick(self, now_s: float, gauges: Mapping[str, float] | None = None) -> None:
        """Advance to ``now_s``; all whole seconds since the last tick were counted.

        ``gauges``: current values, such as queue length, KV cache usage, running and waiting.
        """
        second = int(now_s)
        first = self._newest + 1
        if self._newest < 0 or second - self._newest > _LONGEST_TICK_S:
            first = second
        for passed in range(first, second + 1):
            place = self._place(passed)
            if place is not None:
                self._seen[place] = True
        self._newest = max(self._newest, second)
        if gauges is not None:
            self.gauges = dict(gauges)

    def window(self, end_s: int, width_s: int, *, parts: int = 1) -> Window:
        """The ``width_s`` whole seconds before ``end_s``; ``parts`` must divide ``width_s``.

        Counts are scaled up by the fraction of seen seconds; below one half they are NaN.
        """
        if width_s % parts:
            raise ValueError(f"{width_s} s cannot be divided into {parts} equal parts")
        counts, seen = self._span(end_s - width_s, width_s)
        cut = counts.reshape(parts, width_s // parts, len(self.names)).sum(axis=1)
        share = seen.reshape(parts, width_s // parts).mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            pieces = np.where(share[:, None] >= _MIN_COVERAGE, cut / share[:, None], np.nan)
            whole = counts.sum(axis=0) / seen.mean()
        if seen.mean() < _MIN_COVERAGE:
            whole = np.full(len(self.names), np.nan)
        # A correction may arrive before the count that it corrects.
        return Window(
            start_s=end_s - width_s,
            width_s=width_s,
            counts=np.maximum(whole, 0.0),
            parts=np.maximum(pieces, 0.0),
        )

    def rates_rps(self, end_s: int, width_s: int) -> Floats:
        """Arrivals per second of each type, (k,), over that window; NaN in a gap."""
        rates: Floats = self.window(end_s, width_s).counts / width_s
        return rates

    def tokens_per_s(self, end_s: int, width_s: int) -> tuple[float, float]:
        """Prompt and output tokens per second of the requests that ended in that window."""
        places = self._places(end_s - width_s, width_s)
        held = self._second[places] == np.arange(end_s - width_s, end_s)
        sums = self._tokens[places][held].sum(axis=0)
        return float(sums[1]) / width_s, float(sums[2]) / width_s

    def ended_rps(self, end_s: int, width_s: int) -> float:
        """Requests per second that ended in that window."""
        places = self._places(end_s - width_s, width_s)
        held = self._second[places] == np.arange(end_s - width_s, end_s)
        return float(self._tokens[places][held][:, 0].sum()) / width_s

    @property
    def newest_s(self) -> int:
        """The last second that passed; -1 before the first."""
        return self._newest

    @property
    def watched_s(self) -> float:
        """The seconds for which requests were counted, up to the size of the buffer."""
        return float(self._seen.sum())

    def rows(self, first_s: int, last_s: int) -> list[tuple[int, list[float]]]:
        """The seen seconds from first to last that are still held, each with its counts."""
        first_s = max(first_s, last_s - self.size_s + 1, 0)
        if last_s < first_s:
            return []
        counts, seen = self._span(first_s, last_s - first_s + 1)
        table = np.maximum(counts, 0.0).round(4).tolist()
        return [(first_s + n, row) for n, row in enumerate(table) if seen[n]]

    def state(self) -> dict[str, Any]:
        """State for ``restore``: the seconds that are held, oldest first."""
        held = np.flatnonzero((self._second >= 0) & self._seen)
        order = held[np.argsort(self._second[held])]
        return {
            "names": list(self.names),
            "second": self._second[order].tolist(),
            "counts": self._counts[order].round(6).tolist(),
            "tokens": self._tokens[order].tolist(),
            "too_late": self.too_late,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the seconds of an earlier collector; types that no longer exist are ignored."""
        names = tuple(str(name) for name in state["names"])
        pairs = [(index, names.index(n)) for index, n in enumerate(self.names) if n in names]
        rows = zip(state["second"], state["counts"], state["tokens"], strict=True)
        for second, counts, tokens in rows:
            place = self._place(int(second))
            if place is None:
                continue
            for mine, its in pairs:
                self._counts[place, mine] = counts[its]
            self._tokens[place] = tokens
            self._seen[place] = True
            self._newest = max(self._newest, int(second))
        self.too_late = int(state["too_late"])

    def _place(self, second: int) -> int | None:
        """The row of a second, cleared if it held an older one; ``None`` if it is too old."""
        place = second % self.size_s
        if self._second[place] != second:
            if second < self._second[place] or 0 <= second <= self._newest - self.size_s:
                self.too_late += 1
                return None
            self._second[place] = second
            self._counts[place] = self._tokens[place] = 0.0
            self._seen[place] = False
        return place

    def _places(self, start_s: int, width_s: int) -> Any:
        if not 0 < width_s <= self.size_s:
            raise ValueError(f"a window of {width_s} s of {self.size_s} s")
        return np.arange(start_s, start_s + width_s) % self.size_s

    def _span(self, start_s: int, width_s: int) -> tuple[Floats, Any]:
        places = self._places(start_s, width_s)
        held = self._second[places] == np.arange(start_s, start_s + width_s)
        counts: Floats = np.where(held[:, None], self._counts[places], 0.0)
        return counts, held & self._seen[places]
