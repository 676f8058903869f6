"""The unit of a trace's timestamps: given, named, known for the format, or inferred.

A wrong unit makes a trace a thousand times too fast or too slow, and nothing else looks odd.
Therefore an ambiguous unit is an error, and an inferred unit is reported.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class TimeUnit(StrEnum):
    """The unit of numeric timestamps; ``auto`` infers it from the file."""

    AUTO = "auto"
    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"

    @property
    def per_s(self) -> float:
        """Units per second."""
        return _PER_S[self]

    @property
    def word(self) -> str:
        """The name in full, plural."""
        return self.name.lower()


_PER_S = {
    TimeUnit.AUTO: 1.0,
    TimeUnit.SECONDS: 1.0,
    TimeUnit.MILLISECONDS: 1e3,
    TimeUnit.MICROSECONDS: 1e6,
    TimeUnit.NANOSECONDS: 1e9,
}
_UNITS = tuple(unit for unit in TimeUnit if unit is not TimeUnit.AUTO)
_SUFFIXES = {
    TimeUnit.SECONDS: "s|sec|secs|second|seconds",
    TimeUnit.MILLISECONDS: "ms|msec|msecs|milli|millis|millisecond|milliseconds",
    TimeUnit.MICROSECONDS: "us|usec|usecs|micro|micros|microsecond|microseconds",
    TimeUnit.NANOSECONDS: "ns|nsec|nsecs|nano|nanos|nanosecond|nanoseconds",
}
_NAMED = {
    unit: re.compile(rf"(?P<stem>.+?)_(?:in_)?(?:{words})") for unit, words in _SUFFIXES.items()
}

# Unix times from 2000 to 2100. Relative times seldom start at 30 years.
_EPOCH_S = (946_684_800.0, 4_102_444_800.0)
# Every known trace of one model's requests is within these; the busiest published has some 350/s.
_MOST_RPS, _LEAST_RPS = 5000.0, 1e-3
# Fractions suggest seconds, unless the server would then be idle.
_LEAST_WITH_FRACTIONS_RPS = 0.05
# A shorter excerpt may be a burst or a pause.
_ENOUGH = 20


class AmbiguousUnitError(ValueError):
    """The unit is ambiguous; the message gives the arrival rate in each possible unit."""


@dataclass(frozen=True, slots=True)
class InferredUnit:
    """A unit and the reason for it; ``why`` is empty if the file or the user states the unit."""

    unit: TimeUnit
    why: str = ""


def unit_of_name(name: str) -> tuple[str, TimeUnit | None]:
    """Split ``timestamp_ms`` into ``timestamp`` and its unit; ``None`` for a name without one."""
    for unit, pattern in _NAMED.items():
        found = pattern.fullmatch(name)
        if found:
            return found["stem"], unit
    return name, None


def infer_unit(stamps: Sequence[float], *, usual: TimeUnit | None, whose: str) -> InferredUnit:
    """Infer the unit of a file's first timestamps.

    ``usual`` is the unit of the format ``whose``; it holds unless the arrival rate would be
    implausible. Without it the numbers must determine the unit. Raises AmbiguousUnitError.
    """
    broken = any(stamp != int(stamp) for stamp in stamps)
    if usual is not None:
        if broken and usual is not TimeUnit.SECONDS:
            raise AmbiguousUnitError(
                f"{whose} are whole {usual.word} and these have fractions{_others(stamps, None)}"
            )
        # Constant timestamps give no rate.
        rate = _rate_rps(stamps, usual)
        if rate is not None and len(stamps) >= _ENOUGH and not _LEAST_RPS <= rate <= _MOST_RPS:
            raise AmbiguousUnitError(
                f"in {usual.word}, as {whose} are, its first {len(stamps):,} requests would come "
                f"at {_shown(rate)}{_others(stamps, usual)}"
            )
        return InferredUnit(usual, f"as {whose} are")
    lowest = min(stamps, default=0.0)
    for unit in _UNITS:
        if _EPOCH_S[0] <= lowest / unit.per_s < _EPOCH_S[1]:
            return InferredUnit(unit, "as Unix times of this century")
    rates = {unit: _rate_rps(stamps, unit) for unit in _UNITS}
    if rates[TimeUnit.SECONDS] is None:
        return InferredUnit(TimeUnit.SECONDS, "though there is no telling: it never advances")
    likely = [unit for unit, rate in rates.items() if _LEAST_RPS <= (rate or 0.0) <= _MOST_RPS]
    if len(likely) == 1:
        return InferredUnit(likely[0], f"since that makes {_shown(rates[likely[0]] or 0.0)}")
    rate = rates[TimeUnit.SECONDS] or 0.0
    if broken and _LEAST_WITH_FRACTIONS_RPS <= rate <= _MOST_RPS:
        return InferredUnit(TimeUnit.SECONDS, f"since they have fractions: {_shown(rate)}")
    raise AmbiguousUnitError("the unit of its timestamps cannot be told" + _others(stamps, None))


def _rate_rps(stamps: Sequence[float], unit: TimeUnit) -> float | None:
    """Mean arrival rate; ``None`` where no time passes."""
    if len(stamps) < 2 or max(stamps) <= min(stamps):
        return None
    return (len(stamps) - 1) * unit.per_s / (max(stamps) - min(stamps))


def _others(stamps: Sequence[float], but: TimeUnit | None) -> str:
    rates = [(unit, _rate_rps(stamps, unit)) for unit in _UNITS if unit is not but]
    told = [
        f"{_shown(rate)} in {unit.word}"
        for unit, rate in rates
        if rate is not None and 1e-6 <= rate <= 1e6
    ]
    return f" ({', '.join(told)})" if told else ""


def _shown(rate_rps: float) -> str:
    return f"{rate_rps:,.0f} requests/s" if rate_rps >= 10 else f"{rate_rps:.2g} requests/s"
