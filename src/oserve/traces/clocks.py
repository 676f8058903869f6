"""From the timestamps of a trace to seconds from its start."""

import re
from datetime import datetime
from typing import Protocol

from oserve.traces.rows import BadRowError, ticks
from oserve.traces.units import TimeUnit

_STAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})"
    r"(?:\.([0-9]{1,9}))?(?: ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2}))?"
)
# What people take for a time, so that an error about it says "not a time" rather than "a number".
_LIKE_A_STAMP = re.compile(r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}.*|.*[0-9]:[0-9]{2}.*")
# Counts that begin after this are taken for Unix times: 31 years.
_EPOCH_S = 946_684_800.0

# 300 years: no count and no Unix time is later.
_MAX_S = 1e10


class StampReader(Protocol):
    """``arrival_s`` reads one stamp; ``settle`` says that its row was sound."""

    def arrival_s(self, stamp: object) -> float: ...

    def settle(self) -> None: ...


def is_stamp(text: str) -> bool:
    """Whether that is meant as a date and time, and not as a number."""
    return _LIKE_A_STAMP.fullmatch(text) is not None


class Ticks:
    """Numbers of one unit. They count from the file's own start, Unix times from the first row."""

    def __init__(self, unit: TimeUnit, name: str) -> None:
        self._per_s, self._name = unit.per_s, name
        self._origin_s: float | None = None
        self._maybe_s = 0.0

    def arrival_s(self, stamp: object) -> float:
        """Raises BadRowError."""
        at_s = ticks(stamp, self._name) / self._per_s
        if at_s > _MAX_S:
            raise BadRowError(f"{self._name} is {at_s:g} s, which is no time")
        if self._origin_s is not None:
            return at_s - self._origin_s
        self._maybe_s = at_s if at_s >= _EPOCH_S else 0.0
        return at_s - self._maybe_s

    def settle(self) -> None:
        """The first sound row decides."""
        if self._origin_s is None:
            self._origin_s = self._maybe_s


class WallClock:
    """Dates and times of ISO 8601, from the first sound row on. Without a zone they are UTC."""

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
        # The fraction is kept apart: datetime holds six digits and Azure's stamps have seven.
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
