"""The plot of a backtest: counts, the default's forecast and its 90 % band, a row per type."""

from pathlib import Path

import numpy as np

from oserve.core import OServeError
from oserve.forecast.backtest import Series, Walk

_BLUE, _ORANGE, _GREY = "#2166ac", "#d9772b", "#777777"
_MOST_ROWS = 12


def draw(series: Series, walk: Walk, path: Path) -> None:
    """Write the plot. Raises OServeError without matplotlib or if it cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise OServeError(
            "drawing needs matplotlib", place="--plot", remedy="pip install 'oserve[plot]'"
        ) from None
    rows = min(len(series.names), _MOST_ROWS)
    figure = Figure(figsize=(11, 1.2 + 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    score = walk.score
    figure.suptitle(
        f"one window of {series.interval_s:g} s ahead: RRMSE {score.rrmse:.1f} %, "
        f"{100 * score.coverage:.0f} % of the counts in the 90 % band",
        fontsize=11,
    )
    hours = (series.start_s + series.interval_s * np.arange(len(series.parts))) / 3600
    later = hours[series.half :]
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False)
    for kind in range(rows):
        axes = grid[kind, 0]
        axes.fill_between(
            later,
            walk.quantiles[:, 0, kind],
            walk.quantiles[:, -1, kind],
            color=_ORANGE,
            alpha=0.25,
            linewidth=0,
            label="5 to 95 %",
        )
        axes.plot(hours, series.counts[:, kind], color=_BLUE, linewidth=1.0, label="came")
        axes.plot(later, walk.mean[:, kind], color=_ORANGE, linewidth=1.2, label="forecast")
        axes.axvline(later[0], color=_GREY, linestyle=":", linewidth=1.0)
        axes.set_ylim(bottom=0)
        axes.set_title(series.names[kind], fontsize=9, loc="left")
        axes.set_ylabel("requests", fontsize=8)
        axes.grid(alpha=0.25)
    grid[0, 0].legend(loc="upper left", frameon=False, fontsize=8, ncols=3)
    grid[-1, 0].set_xlabel("hours")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise OServeError(
            f"cannot write it: {error}", place=str(path), remedy="check the path"
        ) from None
