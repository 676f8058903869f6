"""``oserve tune``: better constants of dispatch for a trace, judged on a part held out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import yaml
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from oserve.cli.options import (
    ConfigOption,
    DurationOption,
    JsonOption,
    LimitOption,
    MaxModelLenOption,
    OverrideOption,
    RateScaleOption,
    SkipBadRowsOption,
    SortOption,
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
from oserve.config import (
    Settings,
    load_cluster,
    load_plan,
    load_settings,
    parse_override,
)
from oserve.config.cluster import ClusterSpec
from oserve.config.reading import read_document
from oserve.core import AttachedBackend, DeploymentPlan, OServeError
from oserve.engines.devices import find_devices
from oserve.evaluate.part_score import LEAST_WINDOW_S, Gain, ScoredServing
from oserve.evaluate.simulator import Simulator, traffic_from
from oserve.evaluate.tuning import Tuned, Verdict, value_of
from oserve.evaluate.tuning_run import (
    HOLD_OUT,
    MIN_GAIN,
    TuningChoice,
    TuningRun,
    is_pooled,
    run_tuning,
)
from oserve.gateway.constants import constants_of
from oserve.perf.capacity import LatencyLimits
from oserve.perf.profile import ProfileSource
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.perf.source import RooflineSource
from oserve.plan import check_plan
from oserve.plan.demand import demand_from_trace
from oserve.plan.planning import PlanRequest, compute_plan
from oserve.traces import Slo, TimeUnit, TraceRequest

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def tune(
    trace_argument: TraceArgument = None,
    model: Annotated[
        str | None,
        typer.Option(help="Catalogue name, model folder with config.json, or Hugging Face id."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="8xH100, 4x8xH100 or a YAML file; this machine's devices by default."),
    ] = None,
    trace: TraceOption = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file (YAML); computed for the first part by default.")
    ] = None,
    rate_scale: RateScaleOption = 1.0,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
    slo_ttft_ms: TtftOption = None,
    slo_tpot_ms: TpotOption = None,
    hold_out: Annotated[
        float, typer.Option(help="Share of the trace's time that is held out, at its end.")
    ] = HOLD_OUT,
    min_gain: Annotated[
        float, typer.Option(help="Least gain on the part held out: 0.02 is 2 %.")
    ] = MIN_GAIN,
    max_model_len: MaxModelLenOption = None,
    perf: Annotated[
        str | None, typer.Option(help="roofline, aiconfigurator, or a profile file.")
    ] = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
    seed: Annotated[int, typer.Option(help="Seed of clustering, if the plan is computed.")] = 0,
    as_json: JsonOption = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the settings (YAML) for oserve serve --config.")
    ] = None,
) -> None:
    """Search better constants of order, late dispatch and demotion by simulation.

    They are proposed on the first part of a trace, or of a server's records.sqlite, and promoted
    only for a gain on the part held out.
    """
    trace = argument_or_option(trace_argument, trace, name="--trace")
    if trace is None:
        raise OServeError("no trace is named", place="--trace", remedy="name one")
    if output is not None and not output.parent.is_dir():
        raise _not_written(output, "there is no such folder")
    check_over_zero(rate_scale=rate_scale)
    _check_shares(hold_out, min_gain)
    settings = load_settings(config, dict(parse_override(text) for text in override or []))
    settings = _with_slo(settings, slo_ttft_ms, slo_tpot_ms)
    slo = slo_from(settings.planning.slo_ttft_ms, settings.planning.slo_tpot_ms)
    if slo == Slo():
        raise OServeError(
            "without an SLO there is nothing to tune for",
            place="--slo-ttft-ms",
            remedy="give --slo-ttft-ms and --slo-tpot-ms",
        )
    name = model or settings.model
    if not name:
        raise OServeError("no model is named", place="--model", remedy="name one")
    part = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    spec = load_cluster(cluster) if cluster else ClusterSpec(devices=find_devices())
    source, context = find_source(
        SourceChoice(
            model=name,
            devices=spec.devices,
            network=spec.network,
            perf=perf or settings.planning.profile or None,
            own_profile=Path(settings.state_dir) / "profile.json",
            context=max_model_len,
        )
    )
    requests = read_requests(trace, part)
    found = (
        _given_plan(plan, spec)
        if plan
        else _computed_plan(name, spec, source, requests, context, slo, hold_out, rate_scale, seed)
    )
    choice = TuningChoice(
        present=constants_of(settings.gateway),
        serving=ScoredServing(
            plan=found, slo=slo, ordered=settings.gateway.order.policy == "priority"
        ),
        pooled=is_pooled(found),
        ttft_s=_demotes_by_s(settings),
        min_gain=min_gain,
        hold_out=hold_out,
        place=trace,
    )
    traffic = traffic_from(requests, max_model_len=context).faster(rate_scale)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=_console,
        transient=True,
    ) as progress:
        task = progress.add_task("searching", total=None)
        run = run_tuning(
            Simulator(source),
            traffic,
            choice,
            told=lambda runs: progress.update(task, description=f"searching: {runs} simulations"),
        )
    if output is not None:
        _write(output, _settings_yaml(run, config, settings))
    if as_json:
        print(json.dumps(_document(run, found), indent=2))
        return
    _show(run, found, traffic.rate_rps)
    if output is not None:
        _console.print(f"written: {output}", markup=False)


def _check_shares(hold_out: float, min_gain: float) -> None:
    if not 0.0 < hold_out < 1.0:
        raise OServeError(
            f"it is {hold_out:g}", place="--hold-out", remedy="give a share between 0 and 1"
        )
    if not 0.0 <= min_gain < 10.0:
        raise OServeError(
            f"it is {min_gain:g}", place="--min-gain", remedy="give a share; 0.02 is 2 %"
        )


def _with_slo(settings: Settings, ttft_ms: float | None, tpot_ms: float | None) -> Settings:
    """The settings with the SLO of the options, by which late requests are demoted, too."""
    check_over_zero(slo_ttft_ms=ttft_ms, slo_tpot_ms=tpot_ms)
    planning = msgspec.structs.replace(
        settings.planning,
        slo_ttft_ms=ttft_ms or settings.planning.slo_ttft_ms,
        slo_tpot_ms=tpot_ms or settings.planning.slo_tpot_ms,
    )
    overload = settings.gateway.overload
    overload = msgspec.structs.replace(overload, ttft_ms=overload.ttft_ms or planning.slo_ttft_ms)
    gateway = msgspec.structs.replace(settings.gateway, overload=overload)
    return msgspec.structs.replace(settings, planning=planning, gateway=gateway)


def _demotes_by_s(settings: Settings) -> float | None:
    wanted_ms = settings.gateway.overload.ttft_ms
    return None if wanted_ms is None else wanted_ms / 1e3


def _given_plan(file: str, spec: ClusterSpec) -> DeploymentPlan:
    found = load_plan(file)
    check_plan(found, spec.devices, place=file)
    kinds = {device.id: device.kind for device in spec.devices}
    if any(isinstance(item.backend, AttachedBackend) for item in found.replicas):
        raise OServeError(
            "an attached server cannot be simulated",
            place=file,
            remedy="tune without it: give a plan of replicas with shapes",
        )
    located = tuple(
        replace(item, shape=replace(item.shape, device_kind=kinds[item.devices[0]]))
        for item in found.replicas
    )
    return replace(found, replicas=located)


def _computed_plan(
    model: str,
    spec: ClusterSpec,
    source: ProfileSource | RooflineSource,
    requests: list[TraceRequest],
    context: int,
    slo: Slo,
    hold_out: float,
    rate_scale: float,
    seed: int,
) -> DeploymentPlan:
    """The plan for the first part, as ``oserve plan`` computes it."""
    start_s = requests[0].arrival_s
    split_s = start_s + (requests[-1].arrival_s - start_s) * (1.0 - hold_out)
    demand = demand_from_trace(
        [item for item in requests if item.arrival_s < split_s] or requests,
        source="its first part",
        max_model_len=context,
        rate_scale=rate_scale,
        seed=seed,
    )
    limits = LatencyLimits(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s)
    return compute_plan(
        PlanRequest(
            model=model,
            devices=spec.devices,
            demand=demand,
            source=source,
            shapes=shapes_for(source, spec.devices, ShapeChoices()),
            limits={kind.name: limits for kind in demand.types},
            seed=seed,
        )
    ).plan


# -- the outcome --------------------------------------------------------------------------------
def _settings_yaml(run: TuningRun, config: str | None, settings: Settings) -> str:
    """The given settings with the tuned constants, as a settings file."""
    document: dict[str, Any] = dict(read_document(Path(config))) if config else {}
    for path, value in tuned_settings(run.tuned).items():
        _put(document, path, value)
    for field in ("slo_ttft_ms", "slo_tpot_ms"):
        value = getattr(settings.planning, field)
        if value is not None:
            _put(document, f"planning.{field}", value)
    held = run.tuned.held_out_gain
    words = f"{held.mean:+.1%} on the part held out" if run.tuned.promoted else "nothing promoted"
    return f"# oserve tune: {words}\n" + yaml.safe_dump(document, sort_keys=False, width=100)


def tuned_settings(tuned: Tuned) -> Mapping[str, Any]:
    """The searched constants as they should be in force, by setting."""
    return {item.name.value: value_of(tuned.constants, item.name) for item in tuned.reports}


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
    document[name] = value


def _document(run: TuningRun, plan: DeploymentPlan) -> dict[str, Any]:
    tuned = run.tuned
    return {
        "plan": plan.id,
        "promoted": tuned.promoted,
        "gain": msgspec.to_builtins(tuned.gain),
        "held_out_gain": msgspec.to_builtins(tuned.held_out_gain),
        "constants": [
            {
                "name": item.name.value,
                "present": item.present,
                "proposed": item.proposed,
                "verdict": item.verdict.value,
                "gain": None if item.gain is None else item.gain.mean,
                "held_out_gain": None if item.held_out_gain is None else item.held_out_gain.mean,
            }
            for item in tuned.reports
        ],
        "settings": dict(tuned_settings(tuned)),
        "held_out": {
            "before": msgspec.to_builtins(run.before),
            "after": msgspec.to_builtins(run.after),
        },
        "knee": run.knee,
        "loads": msgspec.to_builtins(run.loads),
        "requests": list(run.requests),
        "windows": run.windows,
        "candidates": tuned.candidates,
        "simulations": run.runs,
    }


def _show(run: TuningRun, plan: DeploymentPlan, rate_rps: float) -> None:
    plain = Console(highlight=False, soft_wrap=True)
    screen = plain if plain.is_terminal else Console(highlight=False, soft_wrap=True, width=150)
    tuned = run.tuned
    loads = ", ".join(f"{load:.2f}" for load in (*run.loads.below, *run.loads.past))
    screen.print(
        f"plan {plan.id}; {run.requests[0]:,} requests to propose on, {run.requests[1]:,} held "
        f"out; loads {loads} times {rate_rps:.2f} requests/s, knee {run.knee:.2f}; "
        f"{tuned.candidates} candidates, {run.runs:,} simulations",
        markup=False,
    )
    if run.shortest_s < LEAST_WINDOW_S:
        _console.print(
            f"note: at the knee a part lasts only {run.shortest_s:.0f} s, so queues have no time "
            "to grow; a longer trace or fewer devices tell more",
            markup=False,
        )
    table = Table("constant", "present", "proposed", "gain", "gain held out", "verdict")
    for item in tuned.reports:
        changed = item.verdict is not Verdict.SAME
        table.add_row(
            item.name.value,
            _value(item.present),
            _value(item.proposed) if changed else "",
            _percent(item.gain),
            _percent(item.held_out_gain),
            item.verdict.value if changed else "",
        )
    table.add_row(
        "all together", "", "", _percent(tuned.gain), _percent(tuned.held_out_gain),
        "promoted" if tuned.promoted else "nothing changes",
    )  # fmt: skip
    screen.print(table)
    for words, part in (("present", run.before), ("tuned", run.after)):
        screen.print(
            f"held out, {words}: carries {part.capacity:.2f} times the rate; E2E mean "
            f"{part.mean_e2e_s:.2f} s, P99 {part.p99_e2e_s:.2f} s up to the knee; "
            f"{part.attainment_past:.1%} within the SLO past it",
            markup=False,
        )


def _value(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(gain: Gain | None) -> str:
    return "" if gain is None else f"{gain.mean:+.1%} (+-{gain.error:.1%})"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _not_written(path, str(error.strerror)) from None


def _not_written(path: Path, reason: str) -> OServeError:
    return OServeError(f"cannot write it: {reason}", place=str(path), remedy="check the path")
