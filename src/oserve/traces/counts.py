"""Request counts per window, for published traces that hold no single requests.

The first column of a counts CSV (plain or gzipped) is ``window_s``, the start of each window in
seconds: a multiple of one step, the smallest difference between two windows. The file is either

- wide: one row per window and one further column per series. A value is the number of requests in
  the window, or a rate if the column's name ends in ``_per_min`` or ``_rps``; an empty field is a
  missing count; or
- long: ``window_s,<label>,count`` and further columns, which are ignored; one row per window and
  series with requests. A series that is not listed in a window has 0, unless no series is.

A window without a row is missing. Rows of the wide form ascend in time; those of the long form may
come in any order.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError

MAX_CELLS = 10_000_000
"""The largest table: windows times series."""

_RATES_S = {"_per_min": 60.0, "_rps": 1.0}
_REMEDY = "a counts file begins with window_s and has columns of numbers, or a label and count"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountTable:
    """``counts`` (n, m) of m series in n windows of ``window_s`` seconds from ``start_s`` on.

    NaN is a missing count.
    """

    names: tuple[str, ...]
    start_s: float
    window_s: float
    counts: npt.NDArray[np.float64]


def is_counts(path: Path) -> bool:
    """Whether the file starts with a counts header; False if it cannot be read."""
    try:
        with _Lines(path) as lines:
            header = next(csv.reader(lines), [])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error):
        return False
    return bool(header) and _word(header[0]) == "window_s"


def read_counts(path: Path) -> CountTable:
    """Read a counts file. Raises OServeError, with file and line, if it is invalid."""
    number = 1
    try:
        with _Lines(path) as lines:
            rows = csv.reader(lines)
            header = [_word(name) for name in next(rows, [])]
            if header[:1] != ["window_s"] or len(header) < 2:
                raise _error(path, 1, "the header is not that of a counts file")
            found = _Rows(path, header)
            for number, row in enumerate(rows, start=2):
                if row:
                    found.add(number, row)
    except OSError as error:
        raise OServeError(
            f"cannot read the counts: {error.strerror or error}",
            place=str(path),
            remedy="check the path",
        ) from None
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise _error(path, number, f"the file is damaged: {error}") from None
    return found.table()


class _Rows:
    """Collects the rows of both forms as (time, series, value)."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._path, self._width = path, len(header)
        self._long = "count" in header[2:]
        self._names: dict[str, int] = {}
        self._at = header.index("count") if self._long else 0
        self._columns = header[1:]
        if not self._long:
            if len(set(self._columns)) < len(self._columns):
                raise _error(path, 1, "two columns have one name")
            self._names = {name: place for place, name in enumerate(self._columns)}
        # The first line of each window, and the values: time, series, value, line.
        self._lines: dict[float, int] = {}
        self._cells: list[tuple[float, int, float, int]] = []
        self._latest_s = -1.0

    def add(self, number: int, row: Sequence[str]) -> None:
        """Add one row. Raises OServeError."""
        if len(row) != self._width:
            raise _error(
                self._path, number, f"{len(row)} fields where the header has {self._width}"
            )
        time_s = self._number(number, "window_s", row[0])
        self._lines.setdefault(time_s, number)
        if self._long:
            series = self._names.setdefault(row[1].strip(), len(self._names))
            count = self._number(number, "count", row[self._at])
            self._cells.append((time_s, series, count, number))
            return
        if time_s <= self._latest_s:
            raise _error(self._path, number, f"time does not go on: {time_s:g} s")
        self._latest_s = time_s
        for series, (name, value) in enumerate(zip(self._columns, row[1:], strict=True)):
            count = self._number(number, name, value) if value.strip() else math.nan
            self._cells.append((time_s, series, count, number))

    def _number(self, number: int, name: str, value: str) -> float:
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if not (math.isfinite(found) and found >= 0):
            raise _error(self._path, number, f"{name} is {value[:40]!r}, not a number of 0 or more")
        return found

    def table(self) -> CountTable:
        """Raises OServeError for too few windows, too many, or times off the step."""
        if len(self._lines) < 2:
            raise _error(self._path, 2, "there are not two windows")
        times = np.array(sorted(self._lines))
        start, step = float(times[0]), float(np.diff(times).min())
        places = np.rint((times - start) / step).astype(np.intp)
        off = np.flatnonzero(np.abs(times - start - places * step) > 1e-3 * step)
        if off.size:
            time_s = float(times[off[0]])
            raise _error(
                self._path,
                self._lines[time_s],
                f"the window at {time_s:g} s is off the step of {step:g} s",
            )
        windows = int(places[-1]) + 1
        if windows * len(self._names) > MAX_CELLS:
            last = self._lines[float(times[-1])]
            raise _error(self._path, last, f"{windows} windows of {step:g} s are too many")
        counts = np.full((windows, len(self._names)), np.nan)
        counts[places] = 0.0
        scale = [self._scale(name, step) for name in self._names]
        window_of = dict(zip(times.tolist(), places.tolist(), strict=True))
        seen = set()
        for time_s, series, value, number in self._cells:
            if (time_s, series) in seen:
                raise _error(self._path, number, f"a second count of a series at {time_s:g} s")
            seen.add((time_s, series))
            counts[window_of[time_s], series] = value * scale[series]
        return CountTable(names=tuple(self._names), start_s=start, window_s=step, counts=counts)

    def _scale(self, name: str, step: float) -> float:
        if not self._long:
            for ending, unit_s in _RATES_S.items():
                if name.endswith(ending):
                    return step / unit_s
        return 1.0


def _word(text: str) -> str:
    return text.removeprefix("\ufeff").strip().lower()


class _Lines:
    """The lines of a text file, gzipped or not, as a context."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        opener = gzip.open if packed else open
        self._file = opener(path, "rt", encoding="utf-8", newline="")

    def __enter__(self) -> Iterator[str]:
        return self._file.__enter__()

    def __exit__(self, *what: object) -> None:
        self._file.close()


def _error(path: Path, number: int, message: str) -> OServeError:
    return OServeError(message, place=f"{path}:{number}", remedy=_REMEDY)
