"""``oserve simulate``: compare policies on a simulated cluster."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from oserve.cli.options import (
    DurationOption,
    JsonOption,
    LimitOption,
    MaxModelLenOption,
    RateScaleOption,
    SkipBadRowsOption,
    SortOption,
    TierOption,
    TimeUnitOption,
    TpotOption,
    TraceArgument,
    TraceOption,
    TraceSelection,
    TtftOption,
    argument_or_option,
    check_over_zero,
    read_requests,
    slo_from,
)
from oserve.config import load_cluster, load_switch_costs
from oserve.config.tiers import parse_tiers
from oserve.core import OServeError, Precision, Tier
from oserve.study.compare import CompareOptions, Row, compare, usable_cores
from oserve.study.groups import jain_index
from oserve.study.policies import STATIC, policy_names
from oserve.study.report import document, page
from oserve.study.scene import SceneChoice, make_scene
from oserve.switch.costs import SwitchCosts
from oserve.traces import TimeUnit, TraceRequest, synthesise

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_DEFAULT = "static-default,static-best,static-best-chunk,static-best-tuned,oserve"
_SYNTHETIC_RPS = 8.0
_SYNTHETIC_S = 900.0
_MOST_SYNTHETIC_S = 7 * 86_400.0
_DEFAULT_BY_TIER = "static-default,static-best,static-best-chunk,static-best-tuned,oserve-static"
# Tenants in a table; all of them are in the JSON document.
_MOST_TENANTS = 20
_SWEEP = (0.5, 0.75, 1.25, 1.5)


def simulate(
    model: Annotated[
        str, typer.Option(help="Catalogue name, model folder with config.json, or Hugging Face id.")
    ],
    cluster: Annotated[str, typer.Option(help="Such as 2x8xH100, or a YAML file.")],
    trace_argument: TraceArgument = None,
    trace: TraceOption = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Names, comma-separated, or all; by default five. See docs/simulation.md."
        ),
    ] = "",
    slo_ttft_ms: TtftOption = 2000.0,
    slo_tpot_ms: TpotOption = 100.0,
    tier: TierOption = None,
    rate_scale: RateScaleOption = 1.0,
    precisions: Annotated[
        str, typer.Option(help="Allowed precisions of weights; baselines take the first.")
    ] = "bf16",
    interval_s: Annotated[
        float, typer.Option("--interval-s", "--interval", help="Seconds between decisions.")
    ] = 60.0,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
    learn_s: Annotated[
        float | None,
        typer.Option(
            "--learn-s", "--learn", help="Tune settings on the first seconds, not in hindsight."
        ),
    ] = None,
    max_model_len: MaxModelLenOption = None,
    perf: Annotated[
        str | None, typer.Option(help="roofline, aiconfigurator, or a profile file.")
    ] = None,
    switch_costs: Annotated[
        str | None,
        typer.Option(help="File of switch costs, such as benchmarks/switch/fit.py writes."),
    ] = None,
    capacity: Annotated[
        bool, typer.Option(help="Also find the highest rate scale that meets the SLO.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of clustering and synthetic traffic.")] = 0,
    jobs: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    as_json: JsonOption = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots.")] = None,
) -> None:
    """Compare policies in the simulator; the live control loop drives each of them."""
    check_over_zero(
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        rate_scale=rate_scale,
        interval_s=interval_s,
        learn_s=learn_s,
        jobs=jobs,
    )
    part = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    trace = argument_or_option(trace_argument, trace, name="--trace")
    tiers = parse_tiers(tier or ())
    names = _policies(policies, tiers)
    spec = load_cluster(cluster)
    requests, source = _traffic(trace, part, seed)
    scene = make_scene(
        SceneChoice(
            model=model,
            devices=spec.devices,
            network=spec.network,
            slo=slo_from(slo_ttft_ms, slo_tpot_ms),
            tiers=tiers,
            perf=perf,
            precisions=_precisions(precisions),
            context=max_model_len,
            interval_s=interval_s,
            learn_s=learn_s,
            seed=seed,
            switch_costs=load_switch_costs(switch_costs) if switch_costs else SwitchCosts(),
        ),
        requests,
        source_name=source,
    )
    wish = CompareOptions(scale=rate_scale, capacity=capacity, sweep=_SWEEP if report else ())
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_console,
        transient=True,
    ) as progress:
        task = progress.add_task("searching and simulating", total=len(names))

        def done(_scene: int, name: str) -> None:
            progress.update(task, advance=1, description=f"done: {name}")

        rows = compare([scene], names, wish, jobs=jobs or usable_cores(), progress=done)[0]
    if report is not None:
        _write(report, page(scene, rows, rate_scale=rate_scale))
    if as_json:
        print(json.dumps(document(scene, rows, rate_scale=rate_scale), indent=2))
        return
    for note in scene.demand.notes:
        _console.print(f"note: {note}", markup=False)
    screen = Console(highlight=False, soft_wrap=True)
    wide = screen if screen.is_terminal else Console(highlight=False, width=170)
    wide.print(_table(rows))
    for table in (_tier_table(rows), _tenant_table(rows)):
        if table is not None:
            wide.print(table)
    if report is not None:
        _console.print(f"written: {report}", markup=False)


def _traffic(trace: str | None, wish: TraceSelection, seed: int) -> tuple[list[TraceRequest], str]:
    if trace is not None:
        return read_requests(trace, wish), trace
    duration_s = wish.duration_s or _SYNTHETIC_S
    if duration_s > _MOST_SYNTHETIC_S:
        raise OServeError(
            f"{duration_s:g} s of synthetic traffic are too many",
            place="--duration-s",
            remedy=f"give at most {_MOST_SYNTHETIC_S:g}",
        )
    made = synthesise(rate_rps=_SYNTHETIC_RPS, duration_s=duration_s, seed=seed)
    return list(
        itertools.islice(made, wish.limit)
    ), f"a synthetic mix of conversations and code (seed {seed})"


def _policies(text: str, tiers: Sequence[Tier]) -> list[str]:
    """The policies by name; with tiers those that never switch."""
    if not tiers:
        return policy_names(text or _DEFAULT)
    if text in {"", "all"}:
        return list(STATIC) if text else policy_names(_DEFAULT_BY_TIER)
    names = policy_names(text)
    switching = [name for name in names if name not in STATIC]
    if switching:
        raise OServeError(
            f"{switching[0]!r} switches, and knows no service tiers",
            place="--policies",
            remedy="use some of: " + ", ".join(STATIC),
        )
    return names


def _tier_table(rows: list[Row]) -> Table | None:
    if not any(row.tiers for row in rows):
        return None
    table = Table(
        "policy", "tier", "requests", "within limits", "P50 TTFT", "P99 TTFT", "P50 TPOT",
        "P99 TPOT", "P50 E2E", "P99 E2E",
    )  # fmt: skip
    for row in rows:
        for own in row.tiers:
            tpot = (f"{own.p50_tpot_s:.3f}", f"{own.p99_tpot_s:.3f}")
            table.add_row(
                *(row.policy, own.tier, str(own.requests), f"{own.attainment:.1%}"),
                *(f"{own.p50_ttft_s:.2f}", f"{own.p99_ttft_s:.2f}", *tpot),
                *(f"{own.p50_e2e_s:.2f}", f"{own.p99_e2e_s:.2f}"),
            )
    return table


def _tenant_table(rows: list[Row]) -> Table | None:
    if not any(row.tenants for row in rows):
        return None
    table = Table(
        "policy", "tenant", "requests", "P50 TTFT", "P99 TTFT", "device-seconds", "Jain's index"
    )
    for row in rows:
        jain = jain_index(row.tenants)
        for own in row.tenants[:_MOST_TENANTS]:
            table.add_row(
                *(row.policy, own.tenant or "(none)", str(own.requests)),
                *(f"{own.p50_ttft_s:.2f}", f"{own.p99_ttft_s:.2f}", f"{own.device_s:.0f}"),
                "" if jain is None else f"{jain:.3f}",
            )
    return table


def _precisions(text: str) -> tuple[Precision, ...]:
    known = {item.value for item in Precision}
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise OServeError(
            f"{text!r} is not a list of precisions",
            place="--precisions",
            remedy="use some of: " + ", ".join(sorted(known)),
        )
    return tuple(Precision(name) for name in names)


def _table(rows: list[Row]) -> Table:
    table = Table(
        "policy", "deployment", "max scale", "SLO met", "goodput", "P50 E2E", "P99 E2E",
        "P99 TTFT", "P99 TPOT", "device h", "MJ", "switches", "lost", "replayed",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.policy,
            ", ".join(f"{count} x {name}" for name, count in row.deployment),
            "" if row.max_rate_scale is None else f"{row.max_rate_scale:.2f}",
            f"{row.slo_attainment:.1%}",
            f"{row.goodput_rps:.2f}",
            f"{row.p50_e2e_s:.2f}",
            f"{row.p99_e2e_s:.2f}",
            f"{row.p99_ttft_s:.2f}",
            f"{row.p99_tpot_s:.3f}",
            f"{row.device_hours:.1f}",
            f"{row.energy_joules / 1e6:.1f}",
            str(row.switches),
            str(row.lost),
            str(row.replayed),
        )
    return table


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="check the path"
        ) from None
