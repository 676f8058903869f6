"""Reading a request trace as a stream, plain or gzipped; the start of the file tells its format.

``formats`` has the text formats, ``units`` the units of their timestamps, ``records`` OServe's own
records. This module checks the order of rows, applies limits and handles invalid rows.
"""

import contextlib
import gzip
import io
import itertools
import zlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import IO

from oserve.core import OServeError
from oserve.traces.foreign import refuse_foreign_file
from oserve.traces.formats import Parse, find_format
from oserve.traces.records import MAGIC, record_rows
from oserve.traces.request import TraceRequest
from oserve.traces.rows import BadRowError
from oserve.traces.units import TimeUnit

FORMATS = (
    "CSV or JSONL with a time, a prompt length and an output length a row (canonical, Azure, "
    "BurstGPT, Mooncake, Bailian, Vidur), gzipped or not, or OServe's records"
)
_MAX_LINE = 1 << 20
_REASONS = 5
_SAMPLE_ROWS = 1000

# The result of a row; None is a request that failed when it was recorded.
_Row = TraceRequest | BadRowError | None


class BadRows(StrEnum):
    """How to handle an invalid row: raise an error, or count and skip it."""

    REFUSE = "refuse"
    SKIP = "skip"


class Skipped:
    """The rows that ``read_trace`` skipped, and what it assumed; filled in while it reads.

    ``count`` is the number of bad rows; ``first`` explains the first few ("line 7: ...").
    ``failures`` counts valid rows without a served request: BurstGPT's failures, and records of
    requests that did not complete. ``assumed`` gives the inferred unit of the timestamps and the
    reason; it is empty if the file or the caller states the unit.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.failures = 0
        self.assumed = ""

    def add(self, number: int, reason: object) -> None:
        """Count one bad row."""
        self.count += 1
        if len(self.first) < _REASONS:
            self.first.append(f"line {number}: {reason}")


def read_trace(
    path: str | Path,
    *,
    limit: int | None = None,
    until_s: float | None = None,
    bad_rows: BadRows = BadRows.REFUSE,
    time_unit: TimeUnit = TimeUnit.AUTO,
    sort: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[TraceRequest]:
    """Yield requests in order of arrival; wall-clock and Unix times and records start at 0 s.

    Stops after ``limit`` requests, or at the first that arrives ``until_s`` or more after the first
    one. Skips requests that failed when they were recorded. ``time_unit`` applies to numeric
    timestamps. With ``sort`` the rows may come in any order, and all are held in memory.

    Raises OServeError, with file and line (for records: the row id), for an invalid row, which
    includes one that goes back in time. With ``BadRows.SKIP`` it skips such rows and raises only if
    a file read to its end has no valid row. A damaged file, an unknown format and an ambiguous time
    unit are always errors. ``skipped`` counts the rows left out.
    """
    path = Path(path)
    skipped = Skipped() if skipped is None else skipped
    bad_before = skipped.count
    count = 0
    first_s = 0.0
    with contextlib.closing(_rows(path, time_unit, skipped)) as rows:
        found = _sound(path, rows, bad_rows, skipped, in_order=not sort)
        while limit is None or count < limit:
            if sort and not count:
                found = _sorted(found)
            row = next(found, None)
            if row is None:
                break
            first_s = first_s if count else row.arrival_s
            if until_s is not None and row.arrival_s - first_s >= until_s:
                return
            count += 1
            yield row
        else:
            return
    if not count and skipped.count > bad_before:
        raise OServeError(
            f"every row is bad; {skipped.first[0] if skipped.first else 'none can be read'}",
            place=str(path),
            remedy=f"a trace is {FORMATS}",
        )


def _sound(
    path: Path,
    rows: Iterable[tuple[int, _Row]],
    bad_rows: BadRows,
    skipped: Skipped,
    *,
    in_order: bool,
) -> Iterator[TraceRequest]:
    previous_s = 0.0
    for number, row in rows:
        if row is None:
            skipped.failures += 1
            continue
        wrong = row if isinstance(row, BadRowError) else None
        if isinstance(row, TraceRequest):
            if not in_order or row.arrival_s >= previous_s:
                previous_s = row.arrival_s
                yield row
                continue
            wrong = BadRowError(
                f"time runs backwards: {row.arrival_s:g} s", remedy="sort the rows, or give --sort"
            )
        if bad_rows is BadRows.REFUSE:
            raise _error(path, number, wrong)
        skipped.add(number, wrong)


def _sorted(found: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """The rows in order of arrival, shifted so that none is before 0 s."""
    rows = sorted(found, key=lambda row: row.arrival_s)
    early_s = min(0.0, rows[0].arrival_s) if rows else 0.0
    for row in rows:
        yield replace(row, arrival_s=row.arrival_s - early_s) if early_s else row


def _rows(
    path: Path, time_unit: TimeUnit, skipped: Skipped
) -> Generator[tuple[int, _Row], None, None]:
    try:
        # Opened once: a pipe can be read only once.
        raw = path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OServeError(
            f"cannot read the trace: {reason}", place=str(path), remedy="check the path"
        ) from None
    with raw:
        start = _start(raw)
        if start.startswith(MAGIC):
            yield from record_rows(path)
            return
        packed = start.startswith(b"\x1f\x8b")
        if not packed:
            refuse_foreign_file(path, start)
        unpacked = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(unpacked, encoding="utf-8", newline="") as lines:
            yield from _text_rows(path, lines, time_unit, skipped)


def _start(raw: io.BufferedReader) -> bytes:
    try:
        return raw.peek(256)[:256]
    except OSError:
        return b""


def _text_rows(
    path: Path, lines: IO[str], time_unit: TimeUnit, skipped: Skipped
) -> Iterator[tuple[int, _Row]]:
    numbered = _Lines(lines)
    try:
        header = next(numbered, "")
        if header is None:
            raise _error(path, 1, BadRowError(f"the line is longer than {_MAX_LINE} characters"))
        if not header.strip():
            reason = BadRowError("the trace is empty", remedy=f"a trace is {FORMATS}")
            raise _error(path, 1, reason)
        refuse_foreign_file(path, header[:256].encode())
        # The unit of the timestamps is inferred from the first rows.
        sample = list(itertools.islice(numbered, _SAMPLE_ROWS))
        try:
            found = find_format(header, [line for line in sample if line], time_unit)
        except BadRowError as error:
            raise _error(path, 1, error) from None
        skipped.assumed = found.assumed
        if not found.has_header:
            sample.insert(0, header)
        for number, line in enumerate(
            itertools.chain(sample, numbered), start=2 if found.has_header else 1
        ):
            if line is None:
                yield number, BadRowError(f"the line is longer than {_MAX_LINE} characters")
            elif line.strip():
                yield number, _parsed(found.parse, line)
    except UnicodeDecodeError:
        # Text is decoded in blocks, so the line number is unknown.
        raise OServeError(
            "it is not text in UTF-8", place=str(path), remedy="save it as UTF-8, or name a trace"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = BadRowError(f"the file is damaged: {error}", remedy="fetch it again")
        raise _error(path, numbered.count + 1, reason) from None


class _Lines:
    """Iterates over lines and yields ``None`` for a line that is too long."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines
        self.count = 0

    def __iter__(self) -> Iterator[str | None]:
        return self

    def __next__(self) -> str | None:
        line = self._lines.readline(_MAX_LINE)
        if not line:
            raise StopIteration
        self.count += 1
        if len(line) < _MAX_LINE or line.endswith("\n"):
            return line
        while len(line) == _MAX_LINE and not line.endswith("\n"):
            line = self._lines.readline(_MAX_LINE)
        return None


def _parsed(parse: Parse, line: str) -> _Row:
    try:
        return parse(line.strip())
    except BadRowError as error:
        return error


def _error(path: Path, number: int, reason: BadRowError | None) -> OServeError:
    usual = "correct the row, or skip such rows: --skip-bad-rows"
    if number == 1:
        usual = f"a trace is {FORMATS}"
    return OServeError(
        str(reason),
        place=f"{path}:{number}",
        remedy=(reason.remedy if reason else "") or usual,
    )
