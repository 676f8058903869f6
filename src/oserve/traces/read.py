"""Reading a request trace: streaming, gzip or plain, the format told by how the file begins.

The text formats are in ``formats``, OServe's own records in ``records``. Here are the order of
rows, where to stop, and what happens to a row that makes no sense.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO

from oserve.core import OServeError
from oserve.traces.formats import BadRowError, Parse, parser
from oserve.traces.records import MAGIC, record_rows
from oserve.traces.request import TraceRequest

_FORMATS = "canonical CSV, Azure's CSV, BurstGPT's CSV, Mooncake's JSONL, or OServe's records"
_MAX_LINE = 1 << 20
_REASONS = 5

# What became of a row: None is a request that failed in its day.
_Row = TraceRequest | BadRowError | None


class BadRows(StrEnum):
    """What to do with a row that makes no sense: stop there, or count it and go on."""

    REFUSE = "refuse"
    SKIP = "skip"


class Skipped:
    """What a reader left out, counted as it goes: give one to ``read_trace`` and look afterwards.

    ``count`` is of bad rows, ``first`` says what was wrong with the first few ("line 7: ...").
    ``failures`` counts rows that are sound and hold no served request: BurstGPT's failures, and
    records of requests that did not complete.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.failures = 0

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
    skipped: Skipped | None = None,
) -> Iterator[TraceRequest]:
    """Requests in order of arrival; Azure's and OServe's records are re-based to 0 s.

    Stops after ``limit`` requests, or at the first that arrives at ``until_s`` or later, counted
    from the first request. Requests that failed in their day are left out.

    Raises OServeError, with file and line (of records: the row id), for a row that makes no sense,
    one that goes back in time included. With ``BadRows.SKIP`` such rows are left out instead, and
    it is an error only when a file read to its end has no other; a file that is damaged or of no
    known format is one either way. ``skipped`` counts what is left out.
    """
    path = Path(path)
    skipped = Skipped() if skipped is None else skipped
    bad_before = skipped.count
    first_s = previous_s = 0.0
    count = 0
    with contextlib.closing(_rows(path)) as rows:
        for number, row in rows:
            if limit is not None and count >= limit:
                return
            if row is None:
                skipped.failures += 1
                continue
            if isinstance(row, BadRowError) or row.arrival_s < previous_s:
                reason = (
                    row
                    if isinstance(row, BadRowError)
                    else f"time runs backwards: {row.arrival_s:g} s"
                )
                if bad_rows is BadRows.REFUSE:
                    raise _error(path, number, str(reason))
                skipped.add(number, reason)
                continue
            first_s = first_s if count else row.arrival_s
            previous_s = row.arrival_s
            if until_s is not None and row.arrival_s - first_s >= until_s:
                return
            count += 1
            yield row
    if not count and skipped.count > bad_before:
        raise OServeError(
            f"every row is bad; {skipped.first[0] if skipped.first else 'none can be read'}",
            place=str(path),
            remedy=f"a trace is {_FORMATS}",
        )


def _rows(path: Path) -> Generator[tuple[int, _Row], None, None]:
    try:
        with path.open("rb") as probe:
            start = probe.read(len(MAGIC))
    except OSError as error:
        raise OServeError(
            f"cannot read the trace: {error.strerror}", place=str(path), remedy="check the path"
        ) from None
    if start == MAGIC:
        yield from record_rows(path)
        return
    packed = start.startswith(b"\x1f\x8b")
    with path.open("rb") as raw:
        unpacked = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(unpacked, encoding="utf-8", newline="") as lines:
            yield from _text_rows(path, lines)


def _text_rows(path: Path, lines: IO[str]) -> Iterator[tuple[int, _Row]]:
    number = 1
    try:
        header = lines.readline(_MAX_LINE)
        if not header.strip():
            raise _error(path, 1, "the trace is empty")
        try:
            parse, has_header = parser(header)
        except BadRowError as error:
            raise _error(path, 1, str(error)) from None
        if not has_header:
            yield 1, _parsed(parse, header)
        number = 2
        while line := lines.readline(_MAX_LINE):
            whole = len(line) < _MAX_LINE or line.endswith("\n")
            while not whole:
                rest = lines.readline(_MAX_LINE)
                whole = len(rest) < _MAX_LINE or rest.endswith("\n")
                line = ""
            if not line:
                yield number, BadRowError(f"the line is longer than {_MAX_LINE} characters")
            elif line.strip():
                yield number, _parsed(parse, line)
            number += 1
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise _error(path, number, f"the file is damaged: {error}") from None


def _parsed(parse: Parse, line: str) -> _Row:
    try:
        return parse(line.strip())
    except BadRowError as error:
        return error


def _error(path: Path, number: int, message: str) -> OServeError:
    return OServeError(
        message,
        place=f"{path}:{number}",
        remedy=f"correct the row, or have bad rows skipped; a trace is {_FORMATS}",
    )
