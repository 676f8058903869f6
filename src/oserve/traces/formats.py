"""The text formats of request traces: from one line to one request.

- canonical CSV: ``arrival_s,input_tokens,output_tokens[,session][,model][,tier][,tenant]``
- Azure's CSV of 2023 and 2024: ``TIMESTAMP,ContextTokens,GeneratedTokens``, wall-clock stamps with
  up to nine digits of a second and, since 2024, a zone (github.com/Azure/AzurePublicDataset)
- BurstGPT's CSV: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``, in
  later releases with ``Session ID`` and ``Elapsed time``, in seconds (github.com/HPMLL/BurstGPT)
- Mooncake's JSONL: ``{"timestamp": n, "input_length": n, "output_length": n}``, in milliseconds
  (github.com/kvcache-ai/Mooncake)
- Bailian's JSONL: those, ``chat_id`` and ``parent_chat_id``, in seconds
  (github.com/alibaba-edu/qwen-bailian-usagetraces-anon)
- Vidur's and SplitwiseSim's CSV, in seconds (github.com/microsoft/vidur, Mutinifni/splitwise-sim)
- any CSV or JSONL with a time, a prompt length and an output length under a usual name

Columns may come in any order and case, separated by commas, semicolons or tabs. This module opens
no files and does not check the order of rows.
"""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oserve.traces.clocks import StampReader, Ticks, WallClock, is_stamp
from oserve.traces.request import TraceRequest
from oserve.traces.rows import BadRowError, number, request
from oserve.traces.units import AmbiguousUnitError, TimeUnit, infer_unit, unit_of_name

Parse = Callable[[str], TraceRequest | None]
"""Parses one line to a request; ``None`` for a request that failed when it was recorded.

Raises BadRowError.
"""

# Exporters' names of the columns, in snake case; the first that is present is taken.
_TIMES = (
    *("arrival", "arrived_at", "arrival_timestamp", "arrival_time", "timestamp"),
    *("request_timestamp", "request_time", "start_time", "time", "ts", "datetime", "date_time"),
)
_PROMPTS = (
    *("input_tokens", "prompt_tokens", "context_tokens", "contexttokens", "request_tokens"),
    *("num_prefill_tokens", "num_input_tokens", "num_prompt_tokens", "prefill_tokens"),
    *("input_length", "input_len", "prompt_length", "prompt_len", "prompt_size", "isl"),
)
_OUTPUTS = (
    *("output_tokens", "completion_tokens", "generated_tokens", "generatedtokens"),
    *("response_tokens", "num_decode_tokens", "num_output_tokens", "decode_tokens"),
    *("output_length", "output_len", "completion_length", "token_size", "osl"),
)
_SESSIONS = ("session", "session_id", "conversation_id")
_MODELS = ("model", "model_name")
_TIERS = ("tier",)
_TENANTS = ("tenant", "tenant_id")
_FIRST = 20
"""If one of so many first rows has a date, the timestamps are dates."""

_FIRST_CHATS = 1_000_000
"""The most Bailian chats remembered; a follow-up to a later chat starts a new session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """How to parse the lines of one file.

    ``assumed`` describes what was inferred rather than read; empty if nothing was.
    """

    parse: Parse
    has_header: bool
    assumed: str = ""


def find_format(header: str, sample: Sequence[str], unit: TimeUnit) -> TraceFormat:
    """The format of a file with that first line and the ``sample`` of lines after it.

    Raises BadRowError if the format is unknown, a column is missing or the time unit is ambiguous.
    """
    header = header.removeprefix("\ufeff").strip()
    if header.startswith("{"):
        fields = _object(header)
        names = _Names(list(fields), kind="field")
        lines: _Objects | _Columns = _Objects(names)
        rows = [header, *sample]
    else:
        delimiter = _delimiter(header)
        names = _Names(_split(header, delimiter), kind="column", header=header)
        lines = _Columns(names, delimiter)
        rows = list(sample)
    dialects = _OBJECTS if header.startswith("{") else _TABLES
    dialect = next((one for one in dialects if one.marks <= set(names.snake)), _OTHER)
    clock, assumed = _clock(lines, rows, names.time, unit=unit, dialect=dialect)
    reader = _Reader(lines, clock, zero_is_failure=dialect.zero_is_failure)
    return TraceFormat(parse=reader, has_header=not header.startswith("{"), assumed=assumed)


class _Names:
    """The positions of the needed columns among a file's names."""

    def __init__(self, given: Sequence[str], *, kind: str, header: str = "") -> None:
        self.given = given
        self.snake = [_snake(name) for name in given]
        times = {unit_of_name(name)[0]: at for at, name in reversed(list(enumerate(self.snake)))}
        found = {
            "time": next((times[name] for name in _TIMES if name in times), None),
            "prompt length": self._at(_PROMPTS),
            "output length": self._at(_OUTPUTS),
        }
        lacking = [what for what, at in found.items() if at is None]
        if len(lacking) == len(found):
            raise BadRowError(f"unknown format, its first line is {header[:60]!r}")
        if lacking:
            told = {
                "time": "arrival_s or timestamp",
                "prompt length": "input_tokens",
                "output length": "output_tokens",
            }
            raise BadRowError(
                f"the {kind} with the {lacking[0]} is missing (such as {told[lacking[0]]}); "
                f"there are {', '.join(given)[:200]}"
            )
        time, prompt, output = (at for at in found.values() if at is not None)
        self.needed = (time, prompt, output)
        self.wanted = tuple(self._at(names) for names in (_SESSIONS, _MODELS, _TIERS, _TENANTS))
        for at in self.needed:
            if self.snake.count(self.snake[at]) > 1:
                raise BadRowError(f"two columns are called {given[at].strip()}")

    @property
    def time(self) -> str:
        """The name of the time column, as in the file."""
        return self.given[self.needed[0]].strip()

    def _at(self, wanted: Sequence[str]) -> int | None:
        return next((self.snake.index(name) for name in wanted if name in self.snake), None)


@dataclass(frozen=True, slots=True)
class _Dialect:
    """Facts about a format, and the columns that identify it."""

    name: str
    marks: frozenset[str]
    unit: TimeUnit | None
    zero_is_failure: bool = False


_OBJECTS = (
    _Dialect("Bailian's", frozenset({"chat_id", "parent_chat_id"}), TimeUnit.SECONDS),
    _Dialect(
        "Mooncake's",
        frozenset({"timestamp", "input_length", "output_length"}),
        TimeUnit.MILLISECONDS,
    ),
)
_TABLES = (
    _Dialect(
        "BurstGPT's",
        frozenset({"timestamp", "request_tokens", "response_tokens"}),
        TimeUnit.SECONDS,
        zero_is_failure=True,
    ),
    _Dialect("Vidur's", frozenset({"arrived_at", "num_prefill_tokens"}), TimeUnit.SECONDS),
    _Dialect("SplitwiseSim's", frozenset({"arrival_timestamp", "prompt_size"}), TimeUnit.SECONDS),
)
_OTHER = _Dialect("", frozenset(), None)


def _clock(
    lines: "_Columns | _Objects",
    rows: Sequence[str],
    name: str,
    *,
    unit: TimeUnit,
    dialect: _Dialect,
) -> tuple[StampReader, str]:
    """The reader of the file's timestamps, and what was inferred about them."""
    stamps: list[object] = []
    for line in rows:
        try:
            stamps.append(lines(line)[0])
        except BadRowError:
            continue
    if any(isinstance(stamp, str) and is_stamp(stamp.strip()) for stamp in stamps[:_FIRST]):
        return WallClock(name), ""
    named = unit_of_name(_snake(name))[1]
    if unit is not TimeUnit.AUTO:
        if named is not None and named is not unit:
            raise BadRowError(f"the name {name} says {named.word}, --time-unit {unit.word}")
        return Ticks(unit, name), ""
    if named is not None:
        return Ticks(named, name), ""
    values = []
    for stamp in stamps:
        try:
            values.append(number(stamp, name))
        except BadRowError:
            continue
    try:
        found = infer_unit(values, usual=dialect.unit, whose=f"{dialect.name} timestamps")
    except AmbiguousUnitError as error:
        raise BadRowError(
            str(error),
            remedy="say the unit: --time-unit s, ms, us or ns; planning.time_unit in settings",
        ) from None
    return Ticks(found.unit, name), f"{name} is taken to be in {found.unit.word}, {found.why}"


class _Reader:
    """Parses one line to one request."""

    def __init__(
        self, lines: "_Columns | _Objects", clock: StampReader, *, zero_is_failure: bool
    ) -> None:
        self._lines, self._clock, self._zero_is_failure = lines, clock, zero_is_failure

    def __call__(self, line: str) -> TraceRequest | None:
        stamp, prompt, output, session, model, tier, tenant = self._lines(line)
        arrival_s = self._clock.arrival_s(stamp)
        row = request(
            arrival_s, prompt, output, session=session, model=model, tier=tier, tenant=tenant
        )
        self._clock.settle()
        # BurstGPT: failed requests have no response tokens, and mostly no request tokens.
        return None if self._zero_is_failure and float(output) == 0 else row


class _Columns:
    """Extracts time, prompt, output, session, model, tier and tenant from delimited lines."""

    def __init__(self, names: _Names, delimiter: str) -> None:
        self._width = len(names.given)
        self._delimiter = delimiter
        self._needed = names.needed
        self._wanted = names.wanted

    def __call__(self, line: str) -> list[Any]:
        values = _split(line, self._delimiter)
        if len(values) != self._width:
            raise BadRowError(f"{len(values)} fields where the header has {self._width}")
        found = [values[at] for at in self._needed]
        found += [values[at].strip() if at is not None else "" for at in self._wanted]
        return found


class _Objects:
    """Extracts the same from JSON objects. The first chat of a Bailian conversation names it."""

    def __init__(self, names: _Names) -> None:
        self._needed = [names.given[at] for at in names.needed]
        self._wanted = [names.given[at] if at is not None else "" for at in names.wanted]
        self._firsts: dict[object, str] = {}

    def __call__(self, line: str) -> list[Any]:
        row = _object(line)
        found: list[Any] = []
        for name in self._needed:
            if name not in row:
                raise BadRowError(f"expected JSON with {', '.join(self._needed)}")
            found.append(row[name])
        for name in self._wanted:
            value = row.get(name)
            found.append("" if value is None else str(value))
        found[3] = found[3] or self._conversation(row)
        return found

    def _conversation(self, row: dict[str, Any]) -> str:
        chat, before = row.get("chat_id"), row.get("parent_chat_id")
        if not isinstance(chat, int | str) or not isinstance(before, int | str):
            return ""
        first = self._firsts.get(before, str(chat))
        if len(self._firsts) < _FIRST_CHATS:
            self._firsts[chat] = first
        return first


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BadRowError("expected one JSON object a line")
    return row


def _snake(name: str) -> str:
    """``ContextTokens``, ``Request tokens`` and ``time (ms)`` in snake case."""
    name = name.strip()
    if not name.isupper():
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _delimiter(header: str) -> str:
    if "," in header:
        return ","
    return max((";", "\t", "|"), key=header.count) if re.search(r"[;\t|]", header) else ","


def _split(line: str, delimiter: str = ",") -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except (csv.Error, StopIteration):
        raise BadRowError("the quotes of the line do not match") from None
