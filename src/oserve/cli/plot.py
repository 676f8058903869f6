"""The plot of a replay: latency distributions and a timeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.traces import Outcome, OutcomeStatus, Slo

_BLUE, _ORANGE, _RED = "#2166ac", "#d9772b", "#b2182b"


def draw(outcomes: Sequence[Outcome], slo: Slo, path: Path, *, title: str) -> None:
    """Write a PNG, SVG or PDF. Raises OServeError without matplotlib or if it cannot write."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise OServeError(
            "drawing needs matplotlib", place="--plot", remedy="pip install 'oserve[plot]'"
        ) from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2, 3)
    done = [item for item in outcomes if item.status is OutcomeStatus.COMPLETED]
    ttft = [item.ttft_s for item in done]
    tpot = [item.tpot_s for item in done if item.tpot_s is not None]
    _cdf(figure.add_subplot(grid[0, 0]), ttft, "TTFT (s)", slo.ttft_s)
    _cdf(figure.add_subplot(grid[0, 1]), tpot, "TPOT (s)", slo.tpot_s)
    _cdf(figure.add_subplot(grid[0, 2]), [item.e2e_s for item in done], "E2E (s)", slo.e2e_s)
    _timeline(figure.add_subplot(grid[1, :]), outcomes)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise OServeError(
            f"cannot write it: {error}", place=str(path), remedy="check the path"
        ) from None


def _cdf(axes: Any, values: list[float], label: str, limit: float | None) -> None:
    ordered = sorted(values)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    axes.step(ordered, shares, where="post", color=_BLUE, linewidth=1.6)
    if ordered and ordered[-1] > 20 * max(ordered[0], 1e-4):
        axes.set_xscale("log")
    if limit is not None:
        axes.axvline(limit, color=_RED, linestyle="--", linewidth=1.2, label="SLO")
        axes.legend(loc="lower right", frameon=False)
    axes.set_xlabel(label)
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.25)


def _timeline(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Requests in flight over time, the TTFT of each as a dot, and failures."""
    changes = sorted(
        [(item.due_s, 1) for item in outcomes]
        + [(item.due_s + item.e2e_s, -1) for item in outcomes]
    )
    times, levels, level = [], [], 0
    for moment, change in changes:
        level += change
        times.append(moment)
        levels.append(level)
    axes.fill_between(times, levels, step="post", color=_BLUE, alpha=0.18, linewidth=0)
    axes.step(times, levels, where="post", color=_BLUE, linewidth=1.0, label="in flight")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("requests in flight", color=_BLUE)
    right = axes.twinx()
    good = [item for item in outcomes if item.status is OutcomeStatus.COMPLETED]
    bad = [item for item in outcomes if item.status is not OutcomeStatus.COMPLETED]
    right.scatter(
        [item.due_s for item in good],
        [item.ttft_s for item in good],
        s=9,
        color=_ORANGE,
        alpha=0.6,
        linewidths=0,
        label="TTFT",
    )
    if bad:
        marks = [item.due_s for item in bad]
        right.scatter(
            marks, [0.0] * len(marks), s=30, marker="x", color=_RED, label="not completed"
        )
    right.set_ylabel("TTFT (s)", color=_ORANGE)
    right.set_ylim(bottom=0)
    lines, names = axes.get_legend_handles_labels()
    more, others = right.get_legend_handles_labels()
    axes.legend(lines + more, names + others, loc="upper right", frameon=False, ncols=3)
    axes.grid(alpha=0.25)
