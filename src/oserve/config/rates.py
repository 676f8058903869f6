"""Demand as text: ``512x128=3.5,chat:200x300=8``, or a YAML file.

A name ``TIER/NAME`` gives a type its tier; in a file it has a key of its own.
"""

import math
import re
from pathlib import Path

import msgspec

from oserve.config.reading import convert, read_document
from oserve.core import OServeError, WorkloadType

_PART = re.compile(r"^(?:([^:=,]+):)?\s*([^x=]+)x([^x=]+)=(.+)$")
_FORM = "for example 512x128=3.5,documents:6000x200=0.4 (prompt x output tokens = requests/s)"
MAX_TYPES = 64


class _TypeFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    prompt_tokens: float
    output_tokens: float
    arrival_rate_rps: float
    name: str = ""
    tier: str = ""


class _RatesFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    types: list[_TypeFile]


def load_rates(text: str) -> tuple[WorkloadType, ...]:
    """Workload types with their rates; raises OServeError naming the invalid part."""
    place = "--rates"
    if text.endswith((".yaml", ".yml", ".json")) or Path(text).is_file():
        place = text
        rows = convert(read_document(Path(text)), _RatesFile, place=text).types
    else:
        rows = [_row(part.strip()) for part in text.split(",") if part.strip()]
    if not rows:
        raise OServeError("there are no workload types", place=place, remedy=_FORM)
    if len(rows) > MAX_TYPES:
        raise OServeError(
            f"{len(rows)} workload types are too many", place=place, remedy=f"at most {MAX_TYPES}"
        )
    found = tuple(_checked(row, place) for row in rows)
    names = [kind.name for kind in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise OServeError(
            f"the workload type {twice!r} stands more than once",
            place=place,
            remedy="add their rates together, or name them apart",
        )
    if not any(kind.arrival_rate_rps > 0 for kind in found):
        raise OServeError("zero traffic: every rate is 0", place=place, remedy=_FORM)
    return found


def _row(part: str) -> _TypeFile:
    matched = _PART.match(part)
    if matched is None:
        raise OServeError(f"{part!r} is not a type with a rate", place="--rates", remedy=_FORM)
    try:
        prompt, output, rate = (float(matched[index]) for index in (2, 3, 4))
    except ValueError:
        raise OServeError(
            f"{part!r} holds something that is no number", place="--rates", remedy=_FORM
        ) from None
    name = (matched[1] or "").strip()
    return _TypeFile(
        name=name,
        tier=name.partition("/")[0] if "/" in name else "",
        prompt_tokens=prompt,
        output_tokens=output,
        arrival_rate_rps=rate,
    )


def _checked(row: _TypeFile, place: str) -> WorkloadType:
    name = row.name or f"{row.prompt_tokens:g}x{row.output_tokens:g}"
    for field, value, least in (
        ("prompt_tokens", row.prompt_tokens, 1.0),
        ("output_tokens", row.output_tokens, 1.0),
        ("arrival_rate_rps", row.arrival_rate_rps, 0.0),
    ):
        if not math.isfinite(value) or value < least:
            raise OServeError(
                f"{field} of {name!r} is {value:g}",
                place=place,
                remedy=f"give a finite number of at least {least:g}",
            )
    return WorkloadType(
        name=name,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        arrival_rate_rps=row.arrival_rate_rps,
        tier=row.tier,
    )
