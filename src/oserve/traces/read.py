"""Readers of request traces: streaming, gzip or plain, the format told by the first line.

- canonical CSV: ``arrival_s,input_tokens,output_tokens[,session][,model]``
- Azure's CSV: ``TIMESTAMP,ContextTokens,GeneratedTokens``, wall-clock stamps
- Mooncake's JSONL: ``{"timestamp": ms, "input_length": n, "output_length": n}``
"""

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from oserve.core import OServeError
from oserve.traces.request import TraceRequest

_FORMATS = "canonical CSV, Azure's CSV, or Mooncake's JSONL"
_MAX_LINE = 1 << 20


class _BadRowError(ValueError):
    """What is wrong with a row."""


def read_trace(
    path: str | Path, *, limit: int | None = None, until_s: float | None = None
) -> Iterator[TraceRequest]:
    """Requests in order of arrival, re-based so that Azure's first one is at 0 s.

    Stops after ``limit`` requests, or at the first that arrives at ``until_s`` or later, counted
    from the first request. Raises OServeError, with file and line, for a row that makes no sense.
    """
    path = Path(path)
    with _open(path) as lines:
        first_s = previous_s = 0.0
        for count, (number, request) in enumerate(_rows(path, lines)):
            if count == 0:
                first_s = previous_s = request.arrival_s
            if request.arrival_s < previous_s:
                raise _error(path, number, f"time runs backwards: {request.arrival_s:g} s")
            previous_s = request.arrival_s
            if until_s is not None and request.arrival_s - first_s >= until_s:
                return
            if limit is not None and count >= limit:
                return
            yield request


def _open(path: Path) -> IO[str]:
    try:
        with path.open("rb") as probe:
            packed = probe.read(2) == b"\x1f\x8b"
        if packed:
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise OServeError(
            f"cannot read the trace: {error.strerror}", place=str(path), remedy="check the path"
        ) from None


def _rows(path: Path, lines: IO[str]) -> Iterator[tuple[int, TraceRequest]]:
    number = 1
    try:
        header = lines.readline(_MAX_LINE)
        if not header.strip():
            raise _error(path, 1, "the trace is empty")
        parse, has_header = _parser(path, header.strip())
        if not has_header:
            yield 1, parse(header.strip())
        for number, line in enumerate(lines, start=2):
            if line.strip():
                yield number, parse(line.strip())
    except _BadRowError as error:
        raise _error(path, number, str(error)) from None
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise _error(path, number, f"the file is damaged: {error}") from None


def _parser(path: Path, header: str) -> tuple[Callable[[str], TraceRequest], bool]:
    """How to read a line, and whether the first one is a header."""
    if header.startswith("{"):
        return _mooncake, False
    columns = [name.strip() for name in header.split(",")]
    if columns[0] == "TIMESTAMP":
        return _Azure(path, columns), True
    if "arrival_s" in columns:
        return _Canonical(path, columns), True
    raise _error(path, 1, f"unknown format, its first line is {header[:60]!r}")


class _Canonical:
    def __init__(self, path: Path, columns: list[str]) -> None:
        for needed in ("arrival_s", "input_tokens", "output_tokens"):
            if needed not in columns:
                raise _error(path, 1, f"the column {needed} is missing")
        self._columns = columns

    def __call__(self, line: str) -> TraceRequest:
        row = _fields(line, self._columns)
        return _request(
            _number(row["arrival_s"], "arrival_s"),
            row["input_tokens"],
            row["output_tokens"],
            session=row.get("session", ""),
            model=row.get("model", ""),
        )


class _Azure:
    def __init__(self, path: Path, columns: list[str]) -> None:
        for needed in ("ContextTokens", "GeneratedTokens"):
            if needed not in columns:
                raise _error(path, 1, f"the column {needed} is missing")
        self._columns = columns
        self._first: datetime | None = None

    def __call__(self, line: str) -> TraceRequest:
        row = _fields(line, self._columns)
        stamp, _, fraction = row["TIMESTAMP"].partition(".")
        digits = fraction.split("+")[0].rstrip("Z")
        try:
            moment = datetime.fromisoformat(stamp[:19])
            part_s = float(f"0.{digits}") if digits else 0.0
        except ValueError:
            raise _BadRowError(f"TIMESTAMP is {row['TIMESTAMP'][:40]!r}, not a time") from None
        if self._first is None:
            self._first = moment
            self._part_s = part_s
        seconds = (moment - self._first).total_seconds() + part_s - self._part_s
        return _request(seconds, row["ContextTokens"], row["GeneratedTokens"])


def _mooncake(line: str) -> TraceRequest:
    try:
        row = json.loads(line)
        stamp, prompt, output = row["timestamp"], row["input_length"], row["output_length"]
    except (ValueError, KeyError, TypeError):
        raise _BadRowError("expected JSON with timestamp, input_length, output_length") from None
    return _request(_number(stamp, "timestamp") / 1000.0, prompt, output)


def _fields(line: str, columns: list[str]) -> dict[str, str]:
    values = next(csv.reader([line]))
    if len(values) != len(columns):
        raise _BadRowError(f"{len(values)} fields where the header has {len(columns)}")
    return dict(zip(columns, values, strict=True))


def _request(
    arrival_s: float, prompt: object, output: object, *, session: str = "", model: str = ""
) -> TraceRequest:
    if arrival_s < 0:
        raise _BadRowError(f"the arrival time is negative: {arrival_s:g}")
    return TraceRequest(
        arrival_s=arrival_s,
        prompt_tokens=_tokens(prompt, "prompt"),
        output_tokens=_tokens(output, "output"),
        session=session,
        model=model,
    )


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _BadRowError(f"{name} is {str(value)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise _BadRowError(f"{name} is {number}")
    return number


def _tokens(value: object, name: str) -> int:
    number = _number(value, f"the {name} length")
    if number < 0 or number != int(number):
        raise _BadRowError(f"the {name} length is {number:g}, not a count of tokens")
    # Some traces log requests that produced nothing; an engine always makes one token.
    return max(1, int(number))


def _error(path: Path, number: int, message: str) -> OServeError:
    return OServeError(
        message, place=f"{path}:{number}", remedy=f"correct the row; a trace is {_FORMATS}"
    )
