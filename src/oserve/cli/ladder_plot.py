"""The plot of a ladder: latency, energy and devices by load, deployments as coloured bands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oserve.control.ladder import LoadScore, Shapes, device_count, in_words
from oserve.core import OServeError
from oserve.evaluate.plan_ladder import PlanLadder

_BANDS = ("#2166ac", "#d9772b", "#4d9221", "#8e4b9e", "#b2182b", "#00838f", "#6d4c41", "#555555")
_LADDER, _CAPACITY, _PLAIN = "#111111", "#c0392b", "#1f77b4"
_THICK, _THIN = 2.2, 1.1


def draw(answer: PlanLadder, path: Path, *, title: str) -> None:
    """Write a PNG, SVG or PDF. Raises OServeError without matplotlib or if it cannot write."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise OServeError(
            "drawing needs matplotlib", place="--plot-ladder", remedy="pip install 'oserve[plot]'"
        ) from None
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(3, 1, height_ratios=(5, 2, 1.4))
    latency = figure.add_subplot(grid[0])
    energy = figure.add_subplot(grid[1], sharex=latency)
    devices = figure.add_subplot(grid[2], sharex=latency)
    handles = _bands((latency, energy, devices), answer)
    _latency(latency, answer)
    _energy(energy, answer)
    _devices(devices, answer)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OServeError(
            f"cannot write it: {error}", place=str(path), remedy="check the path"
        ) from None


def _bands(panels: tuple[Any, ...], answer: PlanLadder) -> list[Any]:
    """Shade the loads of each deployment; returns the handles of the legend."""
    from matplotlib.patches import Patch  # noqa: PLC0415 - an extra

    colours: dict[Shapes, str] = {}
    half = 50 * (answer.rows[1].load - answer.rows[0].load) if len(answer.rows) > 1 else 5.0
    for row in answer.rows:
        colour = colours.setdefault(row.shapes, _BANDS[len(colours) % len(_BANDS)])
        place = 100 * row.load
        for axes in panels:
            axes.axvspan(place - half, place + half, color=colour, alpha=0.16, linewidth=0)
    panels[0].set_xlim(100 * answer.rows[0].load - half, 100 * answer.rows[-1].load + half)
    return [
        Patch(color=colour, alpha=0.4, label=f"{in_words(shapes)}, {device_count(shapes)} devices")
        for shapes, colour in colours.items()
    ]


def _latency(axes: Any, answer: PlanLadder) -> None:
    """P50 as solid lines, P99 as dashed ones."""

    def p50_s(score: LoadScore) -> float:
        return score.p50_e2e_s

    def p99_s(score: LoadScore) -> float:
        return score.p99_e2e_s

    _lines(axes, answer, p50_s, "-", named=True)
    _lines(axes, answer, p99_s, "--")
    axes.axvline(100, color="#000000", linewidth=0.8, linestyle=":")
    _logarithmic(axes)
    axes.set_ylabel("E2E latency (s)\nP50 solid, P99 dashed")
    # The legend needs room above the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.25)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    unit = answer.ladder.reference_rps / 100
    upper = axes.secondary_xaxis(
        "top", functions=(lambda percent: percent * unit, lambda rate_rps: rate_rps / unit)
    )
    upper.set_xlabel("requests/s", fontsize=9)
    axes.tick_params(labelbottom=False)


def _energy(axes: Any, answer: PlanLadder) -> None:
    def kilojoules(score: LoadScore) -> float:
        return score.joules / 1e3

    _lines(axes, answer, kilojoules, "-")
    _logarithmic(axes)
    axes.set_ylabel("kJ a request")
    axes.tick_params(labelbottom=False)


def _devices(axes: Any, answer: PlanLadder) -> None:
    axes.plot(
        [100 * row.load for row in answer.rows],
        [row.devices for row in answer.rows],
        color=_LADDER,
        linewidth=_THICK,
        drawstyle="steps-mid",
    )
    axes.set_ylim(0, 1.2 * max(row.devices for row in answer.rows))
    axes.set_ylabel("devices")
    axes.set_xlabel("load (% of the peak)")
    axes.grid(alpha=0.25)


def _lines(
    axes: Any,
    answer: PlanLadder,
    value: Callable[[LoadScore], float],
    style: str,
    *,
    named: bool = False,
) -> None:
    """The ladder, and two single deployments as thin lines as far as they hold the SLO."""
    for index, colour, name in (
        (answer.capacity, _CAPACITY, "plan for capacity"),
        (answer.homogeneous, _PLAIN, "best homogeneous at the peak"),
    ):
        held = [answer.at(index, row.load) for row in answer.rows]
        held = [score for score in held if answer.holds_at(index, score.load)]
        shapes = in_words(answer.ladder.deployments[index].shapes)
        label = f"{name}: {shapes}" if named else None
        _line(axes, held, value, label, color=colour, linewidth=_THIN, linestyle=style)
    _line(
        axes,
        [row.score for row in answer.rows],
        value,
        "ladder" if named else None,
        color=_LADDER,
        linewidth=_THICK,
        linestyle=style,
        marker="o",
        markersize=4,
    )
    beyond = [row.score for row in answer.rows if not row.holds]
    if beyond:
        label = f"no deployment holds {answer.headroom:g} times the load" if named else None
        open_marks = {"marker": "o", "markersize": 7, "markerfacecolor": "white", "linewidth": 0}
        _line(axes, beyond, value, label, color=_LADDER, **open_marks)


def _line(
    axes: Any,
    scores: Sequence[LoadScore],
    value: Callable[[LoadScore], float],
    label: str | None,
    **style: Any,
) -> None:
    axes.plot(
        [100 * score.load for score in scores],
        [value(score) for score in scores],
        label=label,
        **style,
    )


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _place: f"{number:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
