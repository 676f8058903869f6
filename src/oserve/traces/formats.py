"""The text formats of request traces: from one line to one request.

- canonical CSV: ``arrival_s,input_tokens,output_tokens[,session][,model]``
- Azure's CSV of 2023 and 2024: ``TIMESTAMP,ContextTokens,GeneratedTokens``, wall-clock stamps with
  up to nine digits of a second and, since 2024, a zone (github.com/Azure/AzurePublicDataset)
- BurstGPT's CSV: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``, in
  later releases with ``Session ID`` and ``Elapsed time`` (github.com/HPMLL/BurstGPT)
- Mooncake's JSONL: ``{"timestamp": ms, "input_length": n, "output_length": n}``

Columns are found by name, in any order and case. This module opens no file and keeps no order.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime

from oserve.traces.request import TraceRequest

# More than any context; a larger number is damage, and would overflow sums of tokens.
_MAX_TOKENS = 10**9


class BadRowError(ValueError):
    """What is wrong with a row, without saying where it is."""


Parse = Callable[[str], TraceRequest | None]
"""One line to one request; ``None`` for the trace of a request that failed in its day.

Raises BadRowError.
"""


def parser(header: str) -> tuple[Parse, bool]:
    """How to read the lines of a file with that first line, and whether that line is a header.

    Raises BadRowError when the format is unknown or lacks a column.
    """
    header = header.removeprefix("\ufeff").strip()
    if header.startswith("{"):
        return _mooncake, False
    columns = [name.strip().lower() for name in _split(header)]
    for mark, build in _BY_COLUMN.items():
        if mark in columns:
            return build(columns), True
    raise BadRowError(f"unknown format, its first line is {header[:60]!r}")


class _Columns:
    """Picks fields by name out of lines of one width."""

    def __init__(
        self, columns: Sequence[str], needed: Sequence[str], wanted: Sequence[str] = ()
    ) -> None:
        for name in needed:
            if name.lower() not in columns:
                raise BadRowError(f"the column {name} is missing")
        self._width = len(columns)
        self._needed = [columns.index(name.lower()) for name in needed]
        self._wanted = [
            columns.index(name.lower()) if name.lower() in columns else None for name in wanted
        ]

    def __call__(self, line: str) -> list[str]:
        """The needed fields, then the wanted ones, empty where the file has no such column."""
        values = _split(line)
        if len(values) != self._width:
            raise BadRowError(f"{len(values)} fields where the header has {self._width}")
        found = [values[at] for at in self._needed]
        found += [values[at].strip() if at is not None else "" for at in self._wanted]
        return found


class _Canonical:
    def __init__(self, columns: Sequence[str]) -> None:
        needed = ("arrival_s", "input_tokens", "output_tokens")
        self._pick = _Columns(columns, needed, ("session", "model"))

    def __call__(self, line: str) -> TraceRequest:
        arrival, prompt, output, session, model = self._pick(line)
        return request(seconds(arrival, "arrival_s"), prompt, output, session=session, model=model)


class _BurstGpt:
    """Failed requests have no response tokens, says its description, and mostly no request's."""

    def __init__(self, columns: Sequence[str]) -> None:
        needed = ("Timestamp", "Request tokens", "Response tokens")
        self._pick = _Columns(columns, needed, ("Session ID", "Model"))

    def __call__(self, line: str) -> TraceRequest | None:
        stamp, prompt, output, session, model = self._pick(line)
        row = request(seconds(stamp, "Timestamp"), prompt, output, session=session, model=model)
        return None if float(output) == 0 else row


class _Azure:
    """Counts from the first good row. Stamps without a zone are taken as UTC."""

    _STAMP = re.compile(
        r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})"
        r"(?:\.([0-9]{1,9}))?(Z|[+-][0-9]{2}:?[0-9]{2})?"
    )

    def __init__(self, columns: Sequence[str]) -> None:
        self._pick = _Columns(columns, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        self._first: tuple[datetime, float] | None = None

    def __call__(self, line: str) -> TraceRequest:
        stamp, prompt, output = self._pick(line)
        # The fraction is kept apart: datetime holds six digits and the stamps have seven.
        moment, part_s = self._moment(stamp.strip())
        first, first_part_s = self._first or (moment, part_s)
        arrival_s = (moment - first).total_seconds() + (part_s - first_part_s)
        row = request(arrival_s, prompt, output)
        self._first = first, first_part_s
        return row

    def _moment(self, stamp: str) -> tuple[datetime, float]:
        found = self._STAMP.fullmatch(stamp)
        try:
            if found is None:
                raise ValueError
            date, time, digits, zone = found.groups()
            return datetime.fromisoformat(f"{date}T{time}{zone or 'Z'}"), float(f"0.{digits or 0}")
        except ValueError:
            raise BadRowError(f"TIMESTAMP is {stamp[:40]!r}, not a time") from None


_BY_COLUMN: dict[str, Callable[[Sequence[str]], Parse]] = {
    "arrival_s": _Canonical,
    "contexttokens": _Azure,
    "generatedtokens": _Azure,
    "request tokens": _BurstGpt,
    "response tokens": _BurstGpt,
}


def _mooncake(line: str) -> TraceRequest:
    try:
        row = json.loads(line)
        stamp, prompt, output = row["timestamp"], row["input_length"], row["output_length"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRowError("expected JSON with timestamp, input_length, output_length") from None
    return request(seconds(stamp, "timestamp") / 1000.0, prompt, output)


def _split(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line]))
    except (csv.Error, StopIteration):
        raise BadRowError("the quotes of the line do not match") from None


def request(
    arrival_s: float, prompt: object, output: object, *, session: str = "", model: str = ""
) -> TraceRequest:
    """A request from what a file says of it. Raises BadRowError where that makes no sense."""
    return TraceRequest(
        arrival_s=arrival_s,
        prompt_tokens=_tokens(prompt, "prompt"),
        output_tokens=_tokens(output, "output"),
        session=session,
        model=model,
    )


def seconds(value: object, name: str) -> float:
    """A time that counts from some start, so never negative. Raises BadRowError."""
    number = _number(value, name)
    if number < 0:
        raise BadRowError(f"the arrival time is negative: {number:g}")
    return number


def _number(value: object, name: str) -> float:
    try:
        # Python reads 1_000 and true as numbers; no trace means them so.
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{name} is {str(value)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise BadRowError(f"{name} is {number}")
    return number


def _tokens(value: object, name: str) -> int:
    # The usual case first: a trace of millions of rows spends its time here.
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdigit():
        return int(value) or 1
    number = _number(value, f"the {name} length")
    if number < 0 or number > _MAX_TOKENS or number != int(number):
        raise BadRowError(f"the {name} length is {number:g}, not a count of tokens")
    # Some traces log requests that produced nothing; an engine always makes one token.
    return max(1, int(number))
