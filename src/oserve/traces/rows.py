"""Parsing and validation of the values of one row of a trace."""

import math

from oserve.traces.request import TraceRequest

# Longer than any context; a larger number is an error and would overflow sums of tokens.
_MAX_TOKENS = 10**9


class BadRowError(ValueError):
    """What is wrong with a row; the caller adds the place. ``remedy`` overrides the usual one."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


def request(
    arrival_s: float,
    prompt: object,
    output: object,
    *,
    session: str = "",
    model: str = "",
    tier: str = "",
    tenant: str = "",
) -> TraceRequest:
    """A request from the values of a row. Raises BadRowError if they are invalid."""
    return TraceRequest(
        arrival_s=arrival_s,
        prompt_tokens=_tokens(prompt, "prompt"),
        output_tokens=_tokens(output, "output"),
        session=session,
        model=model,
        tier=tier,
        tenant=tenant,
    )


def ticks(value: object, name: str) -> float:
    """A non-negative time relative to some origin. Raises BadRowError."""
    found = number(value, name)
    if found < 0:
        raise BadRowError(f"the arrival time is negative: {found:g}")
    return found


def number(value: object, name: str) -> float:
    """A finite number. Raises BadRowError."""
    try:
        # Python accepts 1_000 and true as numbers; traces do not use them.
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{name} is {str(value)[:40]!r}, not a number") from None
    if not math.isfinite(found):
        raise BadRowError(f"{name} is {found}")
    return found


def _tokens(value: object, name: str) -> int:
    # Fast path: reading a trace of millions of rows spends its time here.
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdigit():
        return int(value) or 1
    found = number(value, f"the {name} length")
    if found < 0 or found > _MAX_TOKENS or found != int(found):
        raise BadRowError(f"the {name} length is {found:g}, not a count of tokens")
    # Some traces log requests without output; an engine always generates one token.
    return max(1, int(found))
