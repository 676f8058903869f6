"""The plot of a day: P99 and P50 E2E, devices and joules by hour, a line for each policy."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.study.hours import DayFigures, HourFigures

_CROSS = "x"


def draw(days: Sequence[DayFigures], path: Path, *, title: str) -> None:
    """Write a PNG, SVG or PDF. Raises OServeError without matplotlib or if it cannot write."""
    try:
        from matplotlib import colormaps  # noqa: PLC0415 - an extra
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise OServeError(
            "drawing needs matplotlib", place="--plot", remedy="pip install 'oserve[plot]'"
        ) from None
    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(textwrap.wrap(title, 130)), fontsize=10)
    grid = figure.add_gridspec(4, 1, height_ratios=(3, 3, 2, 2))
    colours = colormaps["tab20"](range(20))
    panels: Sequence[tuple[str, Callable[[HourFigures], float]]] = (
        ("P99 E2E (s)", lambda row: row.latencies.e2e.p99_s),
        ("P50 E2E (s)", lambda row: row.latencies.e2e.p50_s),
        ("devices held", lambda row: row.device_s / row.seconds),
        ("MJ, idle devices included", lambda row: row.total_j / 1e6),
    )
    for at, (label, value) in enumerate(panels):
        axes = figure.add_subplot(grid[at, 0])
        for place, day in enumerate(days):
            _line(axes, day, value, colours[place % len(colours)], marked=at == 0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if at > 0:
            axes.set_ylim(bottom=0)
        else:
            # An overloaded policy would hide the others.
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
            axes.legend(loc="upper left", frameon=False, ncols=5, fontsize=8)
    axes.set_xlabel(f"hour of the day ({_CROSS}: fewer than 95 % of the requests within the SLO)")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise OServeError(
            f"cannot write it: {error}", place=str(path), remedy="check the path"
        ) from None


def _line(
    axes: Any, day: DayFigures, value: Callable[[HourFigures], float], colour: Any, *, marked: bool
) -> None:
    values = [value(row) for row in day.hours]
    ours = day.policy.startswith("oserve")
    axes.plot(
        range(len(values)),
        values,
        color=colour,
        linewidth=2.4 if ours else 1.2,
        label=day.policy if marked else None,
    )
    if marked and day.missed:
        missed = list(day.missed)
        axes.plot(missed, [values[hour] for hour in missed], _CROSS, color=colour)
