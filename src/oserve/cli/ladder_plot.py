"""The plot of a ladder: latency, energy and devices by load, deployments as coloured bands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from oserve.control.ladder import LoadScore, Shapes, device_count, in_words
from oserve.core import OServeError
from oserve.evaluate.plan_ladder import PlanLadder

_BANDS = ("#2166ac", "#d9772b", "#4d9221", "#8e4b9e", "#b2182b", "#00838f", "#6d4c41", "#555555")
_P50, _P99, _CAPACITY, _PLAIN = "#1a1a1a", "#c0392b", "#1f77b4", "#7f7f7f"


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
    top = figure.add_subplot(grid[0])
    energy = figure.add_subplot(grid[1], sharex=top)
    devices = figure.add_subplot(grid[2], sharex=top)
    handles = _bands((top, energy, devices), answer)
    _latency(top, answer)
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
    last = 100 * answer.rows[-1].load
    panels[0].set_xlim(100 * answer.rows[0].load - half, last + half)
    return [
        Patch(color=colour, alpha=0.4, label=f"{in_words(shapes)}, {device_count(shapes)} devices")
        for shapes, colour in colours.items()
    ]


def _p50_s(score: LoadScore) -> float:
    return score.p50_e2e_s


def _p99_s(score: LoadScore) -> float:
    return score.p99_e2e_s


def _latency(axes: Any, answer: PlanLadder) -> None:
    for label, colour, value in (("P50", _P50, _p50_s), ("P99", _P99, _p99_s)):
        axes.plot(
            [100 * row.load for row in answer.rows],
            [value(row.score) for row in answer.rows],
            color=colour,
            linewidth=2.2,
            marker="o",
            markersize=4,
            label=f"ladder {label}",
        )
        _line(axes, answer, answer.capacity, value, _CAPACITY, label, "plan for capacity")
        _line(axes, answer, answer.homogeneous, value, _PLAIN, label, "best homogeneous")
    axes.axvline(100, color="#000000", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_ylabel("E2E latency (s)")
    axes.grid(alpha=0.25, which="both")
    # The legend needs room above the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.22)
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=2)
    upper = axes.secondary_xaxis(
        "top",
        functions=(
            lambda percent: percent / 100 * answer.ladder.reference_rps,
            lambda rate_rps: rate_rps * 100 / answer.ladder.reference_rps,
        ),
    )
    upper.set_xlabel("requests/s", fontsize=9)
    axes.tick_params(labelbottom=False)


def _line(
    axes: Any,
    answer: PlanLadder,
    index: int,
    value: Callable[[LoadScore], float],
    colour: str,
    quantile: str,
    name: str,
) -> None:
    """A single deployment as a thin line, as far as it holds the SLO."""
    held = [answer.at(index, row.load) for row in answer.rows if answer.holds_at(index, row.load)]
    shapes = in_words(answer.ladder.deployments[index].shapes)
    axes.plot(
        [100 * score.load for score in held],
        [value(score) for score in held],
        color=colour,
        linewidth=1.1,
        linestyle="-" if quantile == "P50" else "--",
        label=f"{quantile} of the {name} ({shapes})",
    )


def _energy(axes: Any, answer: PlanLadder) -> None:
    places = [100 * row.load for row in answer.rows]
    axes.plot(
        places,
        [row.score.joules / 1e3 for row in answer.rows],
        color=_P50,
        linewidth=2.0,
        marker="o",
        markersize=3,
    )
    axes.plot(
        places,
        [answer.at(answer.capacity, row.load).joules / 1e3 for row in answer.rows],
        color=_CAPACITY,
        linewidth=1.1,
        linestyle="--",
    )
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.set_ylabel("kJ a request")
    axes.grid(alpha=0.25, which="both")
    axes.tick_params(labelbottom=False)


def _devices(axes: Any, answer: PlanLadder) -> None:
    axes.plot(
        [100 * row.load for row in answer.rows],
        [row.devices for row in answer.rows],
        color=_P50,
        linewidth=1.6,
        drawstyle="steps-mid",
    )
    axes.set_ylim(0, 1.2 * max(row.devices for row in answer.rows))
    axes.set_ylabel("devices")
    axes.set_xlabel("load (% of the peak)")
    axes.grid(alpha=0.25)


def _plain_ticks(axes: Any) -> None:
    """Numbers on a logarithmic axis as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
