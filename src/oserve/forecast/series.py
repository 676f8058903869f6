"""Series for forecasting from a file of requests or counts.

Types are fitted on the first half of the trace only, so that a backtest has no look-ahead; from a
counts file it takes the series that are largest in the first half.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oserve.core import OServeError
from oserve.forecast.backtest import MIN_WINDOWS, Series
from oserve.traces import BadRows, Skipped, TimeUnit, TraceRequest, read_trace
from oserve.traces.counts import CountTable, is_counts, read_counts
from oserve.workload.columns import Floats, columns_of
from oserve.workload.rates import arrival_rates
from oserve.workload.types import fit_types

PARTS = 6
"""The parts in which a window of requests is counted, so that a model sees how it ended."""

_MAX_CELLS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOptions:
    """Options of a series; ``interval_s`` None: 60 s for requests, the file's step for counts."""

    interval_s: float | None = None
    types: int = 4
    seed: int = 0
    limit: int | None = None
    until_s: float | None = None
    bad_rows: BadRows = BadRows.REFUSE
    time_unit: TimeUnit = TimeUnit.AUTO
    sort: bool = False


def load_series(path: Path, options: SeriesOptions, skipped: Skipped | None = None) -> Series:
    """The series of a request trace or a counts file. Raises OServeError as their readers do."""
    if path.is_file() and is_counts(path):
        return series_of_counts(read_counts(path), options, source=str(path))
    requests = read_trace(
        path,
        limit=options.limit,
        until_s=options.until_s,
        bad_rows=options.bad_rows,
        time_unit=options.time_unit,
        sort=options.sort,
        skipped=skipped,
    )
    return series_of_requests(requests, options, source=str(path))


def series_of_requests(
    requests: Iterable[TraceRequest], options: SeriesOptions, *, source: str
) -> Series:
    """The series of a stream of requests, in whole windows aligned to multiples of the interval.

    Raises OServeError for no requests or too few windows.
    """
    interval_s = 60.0 if options.interval_s is None else options.interval_s
    columns = columns_of(requests)
    times = columns.arrival_s
    if not len(times):
        raise OServeError(
            "zero traffic: the trace has no requests",
            place=source,
            remedy="give a trace with requests",
        )
    start_s = float(times[0] // interval_s) * interval_s
    windows = int((times[-1] - start_s) // interval_s)
    if windows < MIN_WINDOWS or windows * PARTS * options.types > _MAX_CELLS:
        raise OServeError(
            f"{windows} whole windows of {interval_s:g} s",
            place=source,
            remedy=f"give an --interval-s that makes at least {MIN_WINDOWS}, and not millions",
        )
    first = times < start_s + windows // 2 * interval_s
    model = fit_types(
        columns.prompt_tokens[first],
        columns.output_tokens[first],
        k=options.types,
        seed=options.seed,
    )
    rates = arrival_rates(
        times,
        model.assign(columns.prompt_tokens, columns.output_tokens),
        model.k,
        window_s=interval_s / PARTS,
        start_s=start_s,
        end_s=start_s + windows * interval_s,
    )
    return Series(
        names=model.names,
        interval_s=interval_s,
        start_s=start_s,
        parts=rates.counts.astype(np.float64).reshape(windows, PARTS, model.k),
    )


def series_of_counts(table: CountTable, options: SeriesOptions, *, source: str) -> Series:
    """The ``types`` series with the largest counts in the first half.

    Raises OServeError for an interval that is no multiple of the file's step, or too few windows.
    """
    step = table.window_s
    interval_s = step if options.interval_s is None else options.interval_s
    size = round(interval_s / step)
    if size < 1 or abs(size * step - interval_s) > 1e-6 * interval_s:
        raise OServeError(
            f"{interval_s:g} s is no multiple of the {step:g} s that the file counts in",
            place="--interval-s",
            remedy=f"give {step:g}, {2 * step:g}, ...",
        )
    counts: Floats = table.counts
    if options.until_s is not None:
        counts = counts[: int(options.until_s // step)]
    windows = len(counts) // size
    if windows < MIN_WINDOWS:
        raise OServeError(
            f"{windows} whole windows of {interval_s:g} s",
            place=source,
            remedy=f"give an --interval-s that makes at least {MIN_WINDOWS}",
        )
    half = windows // 2 * size
    order = np.argsort(-np.nansum(counts[:half], axis=0), kind="stable")[: options.types]
    parts = counts[: windows * size, order].reshape(windows, size, len(order))
    return Series(
        names=tuple(table.names[place] for place in order),
        interval_s=interval_s,
        start_s=table.start_s,
        parts=parts,
    )
