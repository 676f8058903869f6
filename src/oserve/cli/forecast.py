"""``oserve forecast``: forecasts, and a backtest of every model."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperGroup

from oserve.cli.options import (
    DurationOption,
    JsonOption,
    LimitOption,
    SkipBadRowsOption,
    SortOption,
    TimeUnitOption,
    TraceArgument,
    TraceOption,
    TraceSelection,
    argument_or_option,
    report_reading,
)
from oserve.core import OServeError
from oserve.forecast.backtest import BacktestReport, Series, backtest, filled
from oserve.forecast.forecaster import MAX_STEPS
from oserve.forecast.forecaster import MAX_TYPES as MOST_TYPES
from oserve.forecast.lstm import read_lstm, write_lstm
from oserve.forecast.lstm_train import train_lstm
from oserve.forecast.models import SIMPLE, ModelSettings
from oserve.forecast.series import SeriesOptions, load_series
from oserve.traces import Skipped, TimeUnit

_console = Console(stderr=True, highlight=False, soft_wrap=True)


class _Group(TyperGroup):
    """``oserve forecast TRACE`` and ``oserve forecast train TRACE``, with an implicit ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the implicit command."""
        named = args[0] if args else ""
        return super().parse_args(ctx, args if named in self.commands else ["run", *args])


app = typer.Typer(cls=_Group, add_completion=False)

_LEAST_INTERVAL_S = 1e-3
_Interval = Annotated[
    float | None,
    typer.Option(
        "--interval-s",
        "--interval",
        help="Seconds per window: 60 for requests, the file's step for counts.",
    ),
]
_Types = Annotated[int, typer.Option(help="Workload types; for counts, the largest series.")]
_Seed = Annotated[int, typer.Option(help="Seed of clustering and training.")]


@app.command("run")
def forecast(
    trace_argument: TraceArgument = None,
    trace: TraceOption = None,
    interval_s: _Interval = None,
    types: _Types = 4,
    models: Annotated[
        str,
        typer.Option(help="Models beside the default; also arima and lstm. 'none': no others."),
    ] = ",".join(SIMPLE),
    steps: Annotated[int, typer.Option(help="Windows to forecast after the end.")] = 5,
    lstm: Annotated[
        Path | None, typer.Option(help="A trained LSTM; by default it trains on the first half.")
    ] = None,
    seed: _Seed = 0,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot counts, forecasts and 90 % band (PNG, SVG or PDF).")
    ] = None,
) -> None:
    """Forecast the next windows, and score models on the second half without look-ahead.

    Takes a trace of requests or a CSV of counts. `oserve forecast train` trains the LSTM.
    """
    wish = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    series = _series(
        argument_or_option(trace_argument, trace, name="--trace"), interval_s, types, seed, wish
    )
    if not 1 <= steps <= MAX_STEPS:
        raise OServeError(f"it is {steps}", place="--steps", remedy=f"give 1 to {MAX_STEPS}")
    names = [] if models == "none" else [name.strip() for name in models.split(",")]
    settings = ModelSettings(
        k=len(series.names),
        interval_s=series.interval_s,
        lstm=None if lstm is None else read_lstm(lstm),
    )
    report = backtest(series, names, steps=steps, timer=time.perf_counter, settings=settings)
    if plot:
        from oserve.cli.forecast_plot import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(series, report.walks[0], plot)
    if as_json:
        print(json.dumps(document(series, report), indent=2))
    else:
        _show(series, report)
    if plot:
        _console.print(f"written: {plot}", markup=False)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The model file to write (.npz).")],
    trace_argument: TraceArgument = None,
    trace: TraceOption = None,
    interval_s: _Interval = None,
    types: _Types = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 150,
    seed: _Seed = 0,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
) -> None:
    """Train the paper's LSTM, one small network per type, on a trace: requests or a counts CSV."""
    wish = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    series = _series(
        argument_or_option(trace_argument, trace, name="--trace"), interval_s, types, seed, wish
    )
    with Progress(console=_console) as progress:
        task = progress.add_task("training", total=len(series.names))
        weights = train_lstm(
            filled(series.counts),
            series.names,
            interval_s=series.interval_s,
            rounds=rounds,
            seed=seed,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    write_lstm(weights, output)
    _console.print(
        f"written: {output}, {len(series.names)} types, windows of {series.interval_s:g} s, "
        f"each from the last {weights.window}",
        markup=False,
    )


def document(series: Series, report: BacktestReport) -> dict[str, Any]:
    """The report as JSON-ready data."""
    following, regret = report.next, report.regret
    return {
        "interval_s": series.interval_s,
        "windows": len(series.parts),
        "scored_windows": len(series.parts) - series.half,
        "types": list(series.names),
        "floor": report.floor,
        "models": [
            {
                "model": walk.score.model,
                "rrmse": walk.score.rrmse,
                "pinball": walk.score.pinball,
                "coverage90": walk.score.coverage,
                "ms": walk.score.ms,
            }
            for walk in report.walks
        ],
        "regret": {
            "best_model": regret.best_model,
            "of_models": regret.of_models,
            "best_expert": regret.best_expert,
            "of_experts": regret.of_experts,
        },
        "forecast": [
            {
                "type": name,
                "mean_rps": following.rates_rps[:, kind].tolist(),
                "quantiles_rps": {
                    f"{level:g}": following.quantile_rps(level)[:, kind].tolist()
                    for level in following.quantiles
                },
            }
            for kind, name in enumerate(following.names)
        ],
    }


def _series(
    trace: str | None, interval_s: float | None, types: int, seed: int, wish: TraceSelection
) -> Series:
    if trace is None:
        raise OServeError("there is no trace", place="--trace", remedy="name a file")
    if interval_s is not None and not _LEAST_INTERVAL_S <= interval_s < float("inf"):
        raise OServeError(
            f"it is {interval_s:g}",
            place="--interval-s",
            remedy=f"give seconds, at least {_LEAST_INTERVAL_S:g}",
        )
    if not 1 <= types <= MOST_TYPES:
        raise OServeError(f"it is {types}", place="--types", remedy=f"give 1 to {MOST_TYPES}")
    skipped = Skipped()
    wanted = SeriesOptions(
        interval_s=interval_s,
        types=types,
        seed=seed,
        limit=wish.limit,
        until_s=wish.duration_s,
        bad_rows=wish.bad_rows,
        time_unit=wish.time_unit,
        sort=wish.sort,
    )
    series = load_series(Path(trace), wanted, skipped)
    report_reading(trace, skipped)
    return series


def _show(series: Series, report: BacktestReport) -> None:
    plain = Console(highlight=False, soft_wrap=True)
    screen = plain if plain.is_terminal else Console(highlight=False, soft_wrap=True, width=120)
    n, half = len(series.parts), series.half
    screen.print(
        f"{n} windows of {series.interval_s:g} s, {len(series.names)} types; scored on the last "
        f"{n - half}, one window ahead"
    )
    scores = Table()
    for title in ("model", "RRMSE %", "pinball %", "coverage of 90 %", "ms"):
        scores.add_column(title, justify="left" if title == "model" else "right")
    for score in (walk.score for walk in report.walks):
        scores.add_row(
            score.model,
            f"{score.rrmse:.1f}",
            f"{score.pinball:.2f}",
            f"{100 * score.coverage:.1f} %",
            f"{score.ms:.2f}",
        )
    scores.add_row("Poisson floor", f"{report.floor:.1f}", "", "", "")
    screen.print(scores)
    regret = report.regret
    if regret.of_models is not None:
        screen.print(
            f"default against the best of the others, {regret.best_model}: "
            f"{100 * regret.of_models:+.1f} %"
        )
    screen.print(
        f"default against its best expert in hindsight, {regret.best_expert}: "
        f"{100 * regret.of_experts:+.1f} %"
    )
    _show_next(screen, report)


def _show_next(screen: Console, report: BacktestReport) -> None:
    following = report.next
    steps = len(following.mean_counts)
    table = Table(title=f"requests/s in the next window, and {steps} ahead (5 to 95 %)")
    table.add_column("type")
    for title in ("next", "5 to 95 %", f"{steps} ahead", "5 to 95 %"):
        table.add_column(title, justify="right")
    low, high = following.quantile_rps(0.05), following.quantile_rps(0.95)
    for kind, name in enumerate(following.names):
        cells = []
        for step in (0, steps - 1):
            cells.append(f"{following.rates_rps[step, kind]:.2f}")
            cells.append(f"{low[step, kind]:.2f} to {high[step, kind]:.2f}")
        table.add_row(name, *cells)
    screen.print(table)
