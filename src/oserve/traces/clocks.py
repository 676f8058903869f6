"""Conversion of a trace's timestamps to seconds from its start."""

import re
from datetime import datetime
from typing import Protocol

from oserve.traces.rows import BadRowError, ticks
from oserve.traces.units import TimeUnit

_STAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})"
    r"(?:\.([0-9]{1,9}))?(?: ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2}))?"
)
# Texts that are meant as a time, so that the error says "not a time" rather than "not a number".
_LIKE_A_STAMP = re.compile(r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}.*|.*[0-9]:[0-9]{2}.*")
# Numbers above this (31 years) are taken for Unix times.
_EPOCH_S = 946_684_800.0

# 300 years: larger than any offset or Unix time.
_MAX_S = 1e10


class StampReader(Protocol):
    """Reads timestamps: ``arrival_s`` converts one; ``settle`` confirms that its row is valid."""

    def arrival_s(self, stamp: object) -> float: ...

    def settle(self) -> None: ...


def is_stamp(text: str) -> bool:
    """Whether the text is meant as a date and time rather than a number."""
    return _LIKE_A_STAMP.fullmatch(text) is not None


class Ticks:
    """Numeric timestamps in one unit; Unix times are relative to the first valid row."""

    def __init__(self, unit: TimeUnit, name: str) -> None:
        self._per_s, self._name = unit.per_s, name
        self._origin_s: float | None = None
        self._maybe_s = 0.0

    def arrival_s(self, stamp: object) -> float:
        """Raises BadRowError."""
        at_s = ticks(stamp, self._name) / self._per_s
        if at_s > _MAX_S:
            raise BadRowError(f"{self._name} is {at_s:g} s, beyond any time")
        if self._origin_s is not None:
            return at_s - self._origin_s
        self._maybe_s = at_s if at_s >= _EPOCH_S else 0.0
        return at_s - self._maybe_s

    def settle(self) -> None:
        """The first sound row decides."""
        if self._origin_s is None:
            self._origin_s = self._maybe_s


class WallClock:
    """ISO 8601 timestamps, relative to the first valid row. Without a zone they are UTC."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: tuple[datetime, float] | None = None
        self._latest: tuple[datetime, float] | None = None

    def arrival_s(self, stamp: object) -> float:
        """Raises BadRowError."""
        moment, part_s = self._latest = self._moment(str(stamp).strip())
        first, first_part_s = self._first or self._latest
        return (moment - first).total_seconds() + (part_s - first_part_s)

    def settle(self) -> None:
        """The first sound row decides."""
        self._first = self._first or self._latest

    def _moment(self, stamp: str) -> tuple[datetime, float]:
        # The fraction is parsed separately: datetime holds six digits and Azure's stamps seven.
        found = _STAMP.fullmatch(stamp)
        try:
            if found is None:
                raise ValueError
            date, time, digits, zone = found.groups()
            zone = "Z" if zone in {None, "UTC"} else zone
            return datetime.fromisoformat(f"{date}T{time}{zone}"), float(f"0.{digits or 0}")
        except ValueError:
            raise BadRowError(
                f"{self._name} is {stamp[:40]!r}, not a time such as 2024-05-10 18:17:03.25Z"
            ) from None
