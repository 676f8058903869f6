"""Arrival rates per workload type: in each window of time, and over a whole trace."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError, WorkloadType
from oserve.workload.columns import Floats, Indices, zero_traffic
from oserve.workload.model import WorkloadModel

MAX_CELLS = 10_000_000
"""The largest table: windows times types."""

MIN_SPAN_S = 1.0
"""The shortest duration that a rate is computed over, unless one is given."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rates:
    """Arrival rates by window (w of them) and type (k).

    ``window_start_s`` and ``window_s``, both of shape (w,), are each window's start, on the trace's
    clock, and its length; ``rate_rps`` has shape (w, k).
    """

    window_start_s: Floats
    window_s: Floats
    rate_rps: Floats

    @property
    def counts(self) -> Indices:
        """Arrivals, shape (w, k)."""
        return np.rint(self.rate_rps * self.window_s[:, None]).astype(np.intp)


def arrival_rates(
    arrival_s: npt.ArrayLike,
    type_index: npt.ArrayLike,
    k: int,
    *,
    window_s: float,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Rates:
    """Rates of ``k`` types in windows of ``window_s`` seconds; arrivals (n,) in any order.

    Windows begin at ``start_s`` or at the first arrival, and are half-open: they exclude their end.
    They run to ``end_s``, which truncates the last window; its rate is over the rest. Without
    ``end_s`` the last window is that of the last arrival, at full length, since the end of the
    trace is unknown. Arrivals outside the windows are not counted.

    Raises OServeError for no requests, invalid times, or more than 10 million cells.
    """
    times, kinds = _checked(arrival_s, type_index, k)
    if not (math.isfinite(window_s) and window_s > 0):
        raise OServeError(f"it is {window_s}", place="window_s", remedy="give seconds over 0")
    start = float(times.min()) if start_s is None else start_s
    last = float(times.max())
    if end_s is None:
        windows = math.floor(max(0.0, last - start) / window_s) + 1
    else:
        if not end_s > start:
            raise OServeError(
                f"no time lies between {start:g} s and {end_s:g} s",
                place="end_s",
                remedy="give an end after the start",
            )
        # Rounding must not leave a tiny last window.
        windows = max(1, math.ceil((end_s - start) / window_s - 1e-9))
    if windows * k > MAX_CELLS:
        raise OServeError(
            f"{windows} windows of {window_s:g} s are too many",
            place="window_s",
            remedy="give longer windows or a shorter span",
        )
    starts = np.arange(windows, dtype=np.float64) * window_s + start
    widths = np.full(windows, window_s, dtype=np.float64)
    inside = times >= start
    if end_s is not None:
        widths[-1] = end_s - starts[-1]
        inside &= times < end_s
    window = np.searchsorted(starts, times[inside], side="right") - 1
    counts = np.bincount(window * k + kinds[inside], minlength=windows * k).reshape(windows, k)
    return Rates(window_start_s=starts, window_s=widths, rate_rps=counts / widths[:, None])


def mean_rates(
    arrival_s: npt.ArrayLike,
    type_index: npt.ArrayLike,
    k: int,
    *,
    duration_s: float | None = None,
) -> Floats:
    """Each type's requests per second over the whole trace, shape (k,).

    The duration is ``duration_s`` if known. Otherwise it is estimated from the arrivals: n of them
    span n - 1 gaps and the trace lasted n gaps, so ``span * n / (n - 1)``; at least 1 s, which
    applies to a single request or burst. Raises OServeError for no requests, invalid times, or a
    duration not over 0.
    """
    times, kinds = _checked(arrival_s, type_index, k)
    if duration_s is None:
        count = len(times)
        span_s = float(times.max() - times.min())
        duration_s = max(MIN_SPAN_S, span_s * count / max(1, count - 1))
    elif not (math.isfinite(duration_s) and duration_s > 0):
        raise OServeError(f"it is {duration_s}", place="duration_s", remedy="give seconds over 0")
    return np.bincount(kinds, minlength=k) / duration_s


def workload_types(
    model: WorkloadModel, rates_rps: Sequence[float] | Floats
) -> tuple[WorkloadType, ...]:
    """The types as input of the planner, each with its rate (k of them, in requests/s).

    Raises OServeError for an invalid rate.
    """
    found = []
    for item, rate in zip(model.types, rates_rps, strict=True):
        if not (math.isfinite(rate) and rate >= 0):
            raise OServeError(
                f"the arrival rate is {rate}", place=item.name, remedy="give requests/s, 0 or more"
            )
        found.append(
            WorkloadType(
                name=item.name,
                prompt_tokens=item.prompt_tokens,
                output_tokens=item.output_tokens,
                arrival_rate_rps=float(rate),
            )
        )
    return tuple(found)


def _checked(arrival_s: npt.ArrayLike, type_index: npt.ArrayLike, k: int) -> tuple[Floats, Indices]:
    times = np.asarray(arrival_s, dtype=np.float64)
    kinds = np.asarray(type_index, dtype=np.intp)
    if times.ndim != 1 or times.shape != kinds.shape:
        raise ValueError(f"arrivals {times.shape} and types {kinds.shape}, not (n,) twice")
    if not times.size:
        raise zero_traffic()
    if kinds.min() < 0 or kinds.max() >= k:
        raise ValueError(f"types {kinds.min()} to {kinds.max()} where there are {k}")
    bad = np.flatnonzero(~np.isfinite(times))
    if bad.size:
        raise OServeError(
            f"the arrival time is {times[bad[0]]}",
            place=f"request {bad[0] + 1}",
            remedy="correct the trace",
        )
    return times, kinds
