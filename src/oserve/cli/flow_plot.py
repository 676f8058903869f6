"""The plot of a plan: a Sankey diagram of workload types and replicas.

Left: the types, with heights by their rates. Right: groups of identical replicas, with heights by
their devices, filled by their utilisation. The width of a band at its left end is its rate.
"""

from pathlib import Path as FilePath
from typing import Any

from oserve.core import OServeError
from oserve.plan.planning import PlanResult

_COLOURS = ("#2166ac", "#d9772b", "#4d9221", "#8e4b9e", "#b2182b", "#00838f", "#6d4c41", "#555555")
_GAP = 0.03


def draw(found: PlanResult, path: FilePath) -> None:
    """Write the plot. Raises OServeError without matplotlib or if it cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise OServeError(
            "drawing needs matplotlib", place="--plot", remedy="pip install 'oserve[plot]'"
        ) from None
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-0.45, 1.5)
    axes.set_ylim(-0.03, 1.08)
    score = found.planned.best.score
    axes.set_title(
        f"{found.request.model}: {found.predicted.demand_rps:.2f} requests/s asked, "
        f"{score.served_rps:.2f} within limits, room for {score.scale:.2f} times",
        fontsize=11,
    )
    _bands(axes, found)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OServeError(
            f"cannot write it: {error}", place=str(path), remedy="check the path"
        ) from None


def _bands(axes: Any, found: PlanResult) -> None:
    problem, best = found.problem, found.planned.best
    assignment = best.assignment
    used = sorted(
        (index for index, count in enumerate(best.counts) if count),
        key=lambda option: _middle(assignment.served_rps[option]),
    )
    flows = [
        [max(0.0, assignment.served_rps[option][kind]) for option in used]
        for kind in range(len(problem.types))
    ]
    lefts = _stack([kind.arrival_rate_rps for kind in problem.types])
    sizes = [best.counts[option] * problem.options[option].shape.device_count for option in used]
    rights = _stack([float(size) for size in sizes])
    into = [sum(row[column] for row in flows) for column in range(len(used))]
    fill = [bottom for bottom, _ in rights]
    for index, kind in enumerate(problem.types):
        colour = _COLOURS[index % len(_COLOURS)]
        bottom, top = lefts[index]
        axes.fill_between([-0.02, 0.0], bottom, top, color=colour, linewidth=0)
        axes.text(
            -0.04,
            (bottom + top) / 2,
            f"{kind.name}\n{kind.prompt_tokens:,.0f} in, {kind.output_tokens:,.0f} out, "
            f"{kind.arrival_rate_rps:.2f}/s",
            ha="right",
            va="center",
            fontsize=8,
        )
        start = bottom
        for column, option in enumerate(used):
            rate = flows[index][column]
            if rate <= 0:
                continue
            wide = rate / kind.arrival_rate_rps * (top - bottom)
            low, high = rights[column]
            # At its right end the width of a band is its type's share of the replicas' time.
            share = rate / problem.options[option].capacity_rps[index] / best.counts[option]
            tall = min(1.0, share) * (high - low)
            _band(axes, (start, start + wide), (fill[column], fill[column] + tall), colour)
            start += wide
            fill[column] += tall
    for column, option in enumerate(used):
        bottom, top = rights[column]
        shape = problem.options[option].shape
        axes.fill_between([1.0, 1.02], bottom, top, color="#cccccc", linewidth=0)
        axes.fill_between([1.0, 1.02], bottom, fill[column], color="#333333", linewidth=0)
        axes.text(
            1.04,
            (bottom + top) / 2,
            f"{best.counts[option]} x {shape.name} on {shape.device_kind}\n"
            f"{sizes[column]} devices, {into[column]:.2f}/s, "
            f"{assignment.utilisation[option]:.0%} busy",
            ha="left",
            va="center",
            fontsize=8,
        )


def _middle(rates: tuple[float, ...]) -> float:
    """The mean position of a replica's types; in this order few bands cross."""
    return sum(index * rate for index, rate in enumerate(rates)) / max(sum(rates), 1e-9)


def _stack(sizes: list[float]) -> list[tuple[float, float]]:
    """The bottom and top of each box from 0 to 1, with gaps and a minimum height."""
    total = sum(sizes) or 1.0
    heights = [max(0.02, size / total) for size in sizes]
    unit = (1.0 - _GAP * (len(sizes) - 1)) / sum(heights)
    spans, bottom = [], 0.0
    for height in heights:
        spans.append((bottom, bottom + height * unit))
        bottom += height * unit + _GAP
    return spans


def _band(axes: Any, left: tuple[float, float], right: tuple[float, float], colour: str) -> None:
    steps = [index / 40 for index in range(41)]
    smooth = [step * step * (3 - 2 * step) for step in steps]
    low = [left[0] + (right[0] - left[0]) * part for part in smooth]
    high = [left[1] + (right[1] - left[1]) * part for part in smooth]
    axes.fill_between(steps, low, high, color=colour, alpha=0.55, linewidth=0)
