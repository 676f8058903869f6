"""``oserve plan``: plan replicas for given traffic and devices, with reasons."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oserve.cli import plan_report, verify_report
from oserve.cli.options import (
    ApiKeyOption,
    DurationOption,
    JsonOption,
    LimitOption,
    MaxModelLenOption,
    RateScaleOption,
    SkipBadRowsOption,
    SortOption,
    TimeUnitOption,
    TpotOption,
    TraceArgument,
    TraceOption,
    TraceSelection,
    TtftOption,
    UrlOption,
    argument_or_option,
    read_requests,
    url_from,
)
from oserve.cli.switch import live_plan
from oserve.config import ClusterSpec, load_cluster, load_plan, load_rates, plan_yaml
from oserve.config.rates import MAX_TYPES
from oserve.core import OServeError, Precision
from oserve.engines.devices import find_devices
from oserve.evaluate.simulator import traffic_from
from oserve.evaluate.verification import VerifiedAnswer, check_for, common_slo, verified_answer
from oserve.perf.capacity import LatencyLimits
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.plan.demand import Demand, demand_from_rates, demand_from_trace, scaled
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan
from oserve.plan.problem import AmongEquals, Maximise
from oserve.plan.search import Search
from oserve.plan.verify import MIN_GAIN
from oserve.traces import TimeUnit, TraceRequest

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def plan(
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
    rates: Annotated[
        str | None,
        typer.Option(help="Instead of a trace: 512x128=3.5,docs:6000x200=0.4, or a YAML file."),
    ] = None,
    rate_scale: RateScaleOption = 1.0,
    types: Annotated[
        int | None, typer.Option(help="Number of workload types; automatic by default.")
    ] = None,
    limit: LimitOption = None,
    duration_s: DurationOption = None,
    time_unit: TimeUnitOption = TimeUnit.AUTO,
    skip_bad_rows: SkipBadRowsOption = False,
    sort: SortOption = False,
    slo_ttft_ms: TtftOption = None,
    slo_tpot_ms: TpotOption = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="SLO of a type: NAME=TTFT_MS/TPOT_MS ('-': no limit); may be repeated."),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="Allowed precision of weights; may be repeated. Default: bf16."),
    ] = None,
    tensor_parallel_size: Annotated[str, typer.Option(help="Sizes to consider.")] = "1,2,4,8",
    pipeline_parallel_size: Annotated[str, typer.Option(help="Sizes to consider.")] = "1,2,4",
    max_num_batched_tokens: Annotated[
        str | None, typer.Option(help="Chunk budgets to consider.")
    ] = None,
    max_num_seqs: Annotated[str | None, typer.Option(help="Sequence limits to consider.")] = None,
    max_model_len: MaxModelLenOption = None,
    perf: Annotated[
        str | None,
        typer.Option(help="roofline, aiconfigurator, or a profile file (oserve profile)."),
    ] = None,
    search: Annotated[Search, typer.Option(help="How to search.")] = Search.EXACT,
    maximise: Annotated[Maximise, typer.Option(help="What to maximise.")] = Maximise.CAPACITY,
    among_equals: Annotated[
        AmongEquals, typer.Option(help="Tie-break between equal plans.")
    ] = AmongEquals.FEWEST_DEVICES,
    headroom: Annotated[
        float | None,
        typer.Option(help="Multiple of the demand beyond which capacity has no value."),
    ] = None,
    min_gain: Annotated[
        float,
        typer.Option(
            help="Least gain of a heterogeneous plan over the best homogeneous: 0.03 is 3 %."
        ),
    ] = 0.0,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Score the candidates by simulation and choose by that."),
    ] = False,
    current: Annotated[
        str | None, typer.Option(help="The present plan (YAML), to stay close to.")
    ] = None,
    time_limit_s: Annotated[float, typer.Option(help="Time limit of the exact search.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of clustering and the flow search.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Print detailed reasons.")] = False,
    as_json: JsonOption = False,
    plot: Annotated[
        str | None, typer.Option(help="Plot which replicas serve which types (PNG, SVG or PDF).")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Write the plan (YAML) for oserve serve.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask a running server what it would switch to now.")
    ] = False,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Plan replicas for a model, devices and traffic; show the plan beside the best homogeneous."""
    trace = argument_or_option(trace_argument, trace, name="--trace")
    if live:
        live_plan(url_from(url), api_key=api_key, as_json=as_json, output=output)
        return
    if model is None:
        raise OServeError("no model is named", place="--model", remedy="give --model, or --live")
    _check_numbers(rate_scale, slo_ttft_ms, slo_tpot_ms, headroom, time_limit_s)
    if types is not None and not 1 <= types <= MAX_TYPES:
        raise OServeError(f"it is {types}", place="--types", remedy=f"give 1 to {MAX_TYPES}")
    if not 0 <= min_gain < math.inf:
        raise OServeError(f"it is {min_gain:g}", place="--min-gain", remedy="give 0 or more")
    wish = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    spec = _cluster(cluster)
    choice = SourceChoice(
        model=model,
        devices=spec.devices,
        network=spec.network,
        perf=perf,
        own_profile=Path(".oserve") / "profile.json",
        context=max_model_len,
    )
    source, context = find_source(choice)
    if verify and slo_ttft_ms is None and slo_tpot_ms is None and not slo:
        raise OServeError(
            "without an SLO there is nothing to verify a plan against",
            place="--verify",
            remedy="give --slo-ttft-ms and --slo-tpot-ms",
        )
    demand, requests = _demand(
        trace, rates, wish, max_model_len=context, k=types, rate_scale=rate_scale, seed=seed
    )
    choices = ShapeChoices(
        tensor_parallel_sizes=_sizes("--tensor-parallel-size", tensor_parallel_size),
        pipeline_parallel_sizes=_sizes("--pipeline-parallel-size", pipeline_parallel_size),
        precisions=tuple(dict.fromkeys(precision or ())),
        max_num_batched_tokens=_sizes("--max-num-batched-tokens", max_num_batched_tokens),
        max_num_seqs=_sizes("--max-num-seqs", max_num_seqs),
    )
    found = compute_plan(
        PlanRequest(
            model=model,
            devices=spec.devices,
            demand=demand,
            source=source,
            shapes=shapes_for(source, spec.devices, choices),
            limits=_limits(demand, slo_ttft_ms, slo_tpot_ms, slo or []),
            search=search,
            maximise=maximise,
            among_equals=among_equals,
            enough_scale=headroom,
            current=load_plan(current) if current else None,
            seed=seed,
            time_limit_s=time_limit_s,
            min_gain=min_gain,
        )
    )
    checked = _verified(found, requests, context, rate_scale) if verify else None
    _give(
        found if checked is None else checked.answer,
        checked,
        explain=explain,
        as_json=as_json,
        plot=plot,
        output=output,
    )


def _give(
    found: PlanResult,
    checked: VerifiedAnswer | None,
    *,
    explain: bool,
    as_json: bool,
    plot: str | None,
    output: str | None,
) -> None:
    if plot:
        from oserve.cli.flow_plot import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(found, Path(plot))
    if output:
        _write(Path(output), plan_yaml(found.plan, head=plan_report.headline(found)))
    if as_json:
        said = plan_report.document(found)
        if checked is not None:
            said["verified"] = verify_report.document(checked)
        print(json.dumps(said, indent=2))
    else:
        plan_report.show(found, _screen(), explain=explain)
        if checked is not None:
            verify_report.show(checked, _screen())
    for name in (plot, output):
        if name:
            _console.print(f"written: {name}")


def _screen() -> Console:
    """A console with room for tables; files and pipes have no width of their own."""
    plain = Console(highlight=False, soft_wrap=True)
    return plain if plain.is_terminal else Console(highlight=False, soft_wrap=True, width=150)


def _cluster(text: str | None) -> ClusterSpec:
    return load_cluster(text) if text is not None else ClusterSpec(devices=find_devices())


def _demand(
    trace: str | None,
    rates: str | None,
    wish: TraceSelection,
    *,
    max_model_len: int,
    k: int | None,
    rate_scale: float,
    seed: int,
) -> tuple[Demand, list[TraceRequest]]:
    """The demand, and the requests of its trace if there is one. Raises OServeError."""
    if trace is not None and rates is None:
        requests = read_requests(trace, wish)
        demand = demand_from_trace(
            requests,
            source=trace,
            max_model_len=max_model_len,
            k=k,
            rate_scale=rate_scale,
            seed=seed,
        )
        return demand, requests
    if rates is not None and trace is None:
        demand = demand_from_rates(load_rates(rates), source="--rates", max_model_len=max_model_len)
        return scaled(demand, rate_scale), []
    raise OServeError(
        "the traffic must come from a trace or from --rates, and from exactly one of them",
        place="--trace",
        remedy="name a trace file, or give --rates 512x128=3.5",
    )


def _verified(
    found: PlanResult, requests: list[TraceRequest], context: int, rate_scale: float
) -> VerifiedAnswer:
    trace = traffic_from(requests, max_model_len=context) if requests else None
    check = check_for(
        found.request.demand,
        common_slo(found.request.limits),
        trace=trace,
        rate_scale=rate_scale,
        margin=found.request.min_gain or MIN_GAIN,
    )
    with _console.status(f"scoring candidates by simulation of {check.words}"):
        return verified_answer(found, check)


def _sizes(option: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise OServeError(
            f"{text!r} is not a list of counts", place=option, remedy="for example 1,2,4"
        )
    return sizes


def _limits(
    demand: Demand, ttft_ms: float | None, tpot_ms: float | None, own: Sequence[str]
) -> dict[str, LatencyLimits]:
    def seconds(value: float | None) -> float | None:
        return None if value is None else value / 1e3

    common = LatencyLimits(ttft_s=seconds(ttft_ms), tpot_s=seconds(tpot_ms))
    limits = {kind.name: common for kind in demand.types}
    for text in own:
        name, equals, values = text.rpartition("=")
        first, slash, second = values.partition("/")
        if not equals or not slash or name not in limits:
            known = ", ".join(repr(kind) for kind in limits)
            raise OServeError(
                f"{text!r} names no type and limits",
                place="--slo",
                remedy=f"write NAME=TTFT_MS/TPOT_MS; the types are {known}",
            )
        limits[name] = LatencyLimits(
            ttft_s=seconds(_milliseconds(first)), tpot_s=seconds(_milliseconds(second))
        )
    return limits


def _milliseconds(text: str) -> float | None:
    if text.strip() == "-":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    _check_numbers(1.0, value, None, None, 1.0)
    return value


def _check_numbers(
    rate_scale: float,
    ttft_ms: float | None,
    tpot_ms: float | None,
    headroom: float | None,
    time_limit_s: float,
) -> None:
    for option, value, least in (
        ("--rate-scale", rate_scale, 0.0),
        ("--slo-ttft-ms", ttft_ms, 0.0),
        ("--slo-tpot-ms", tpot_ms, 0.0),
        ("--headroom", headroom, 1.0 - 1e-12),
        ("--time-limit-s", time_limit_s, 0.0),
    ):
        if value is not None and not (math.isfinite(value) and value > least):
            bound = "of at least 1" if least else "over 0"
            raise OServeError(f"it is {value:g}", place=option, remedy=f"give a number {bound}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="check the path"
        ) from None
