"""``oserve plan``: plan replicas for given traffic and devices, with reasons."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from oserve.cli import ladder_report, plan_report, verify_report
from oserve.cli.options import (
    ApiKeyOption,
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
    UrlOption,
    argument_or_option,
    check_over_zero,
    url_from,
)
from oserve.cli.plan_input import (
    check_at_least_one,
    check_objective,
    cluster_from,
    demand_from,
    goal_from,
    limits_from,
    played_from,
    precisions_from,
    seqs_for,
    sizes_from,
)
from oserve.cli.switch import live_plan
from oserve.cli.waiting import waiting
from oserve.config import load_plan, plan_yaml
from oserve.config.rates import MAX_TYPES
from oserve.config.tiers import parse_tiers
from oserve.control.ladder import Goal
from oserve.core import Objective, OServeError, Precision
from oserve.evaluate.peak import peak_traffic
from oserve.evaluate.plan_ladder import PlanLadder, chosen_plan, plan_ladder
from oserve.evaluate.simulator import SimulatedTraffic
from oserve.evaluate.verification import VerifiedAnswer, check_for, slo_of, verified_answer
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan
from oserve.plan.problem import AmongEquals, Maximise
from oserve.plan.search import Search
from oserve.plan.verify import MIN_GAIN
from oserve.traces import TimeUnit

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def plan(
    trace_argument: TraceArgument = None,
    model: Annotated[
        str | None,
        typer.Option(help="Catalogue name, model folder with config.json, or Hugging Face id."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="8xH100, 4x8xH100, a YAML file, ray or ray:HOST:PORT; default: this machine."
        ),
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
    tier: TierOption = None,
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
    enough_scale: Annotated[
        float | None,
        typer.Option(help="Multiple of the demand beyond which capacity has no value."),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="What to choose a deployment for, once the SLO holds. Default: latency."),
    ] = None,
    type_objective: Annotated[
        list[str] | None,
        typer.Option(help="Objective of a type: NAME=OBJECTIVE; may be repeated."),
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of requests, of each type and of all, within the SLO.")
    ] = 0.95,
    headroom: Annotated[
        float, typer.Option(help="A deployment must hold this many times the load.")
    ] = 1.1,
    ladder: Annotated[
        bool,
        typer.Option(help="Simulate the ladder and choose from it; without it plan for capacity."),
    ] = True,
    min_gain: Annotated[
        float,
        typer.Option(
            help="Least gain of a heterogeneous plan over the best homogeneous: 0.03 is 3 %."
        ),
    ] = 0.0,
    spread: Annotated[
        float,
        typer.Option(
            help="Share of the objective to pay so that each type survives the loss of a node."
        ),
    ] = 0.0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Choose the plan for capacity by simulation of the candidates."
        ),
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
    plot_ladder: Annotated[
        str | None, typer.Option(help="Plot latency, energy and devices by load (PNG, SVG or PDF).")
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
    """Plan replicas for a model, devices and traffic, and the deployment for each load."""
    trace = argument_or_option(trace_argument, trace, name="--trace")
    if live:
        live_plan(url_from(url), api_key=api_key, as_json=as_json, output=output)
        return
    if model is None:
        raise OServeError("no model is named", place="--model", remedy="give --model, or --live")
    check_over_zero(
        rate_scale=rate_scale,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        time_limit_s=time_limit_s,
    )
    check_at_least_one(enough_scale=enough_scale, headroom=headroom)
    check_objective(
        objective,
        ladder=ladder,
        attainment=attainment,
        given={"--type-objective": type_objective, "--plot-ladder": plot_ladder},
    )
    if types is not None and not 1 <= types <= MAX_TYPES:
        raise OServeError(f"it is {types}", place="--types", remedy=f"give 1 to {MAX_TYPES}")
    if not 0 <= min_gain < math.inf:
        raise OServeError(f"it is {min_gain:g}", place="--min-gain", remedy="give 0 or more")
    if not 0 <= spread <= 1:
        raise OServeError(f"it is {spread:g}", place="--spread", remedy="give 0 to 1")
    if verify and slo_ttft_ms is None and slo_tpot_ms is None and not slo and not tier:
        raise OServeError(
            "without an SLO there is nothing to verify a plan against",
            place="--verify",
            remedy="give --slo-ttft-ms and --slo-tpot-ms",
        )
    wish = TraceSelection(
        limit=limit,
        duration_s=duration_s,
        time_unit=time_unit,
        skip_bad_rows=skip_bad_rows,
        sort=sort,
    )
    spec = cluster_from(cluster)
    choice = SourceChoice(
        model=model,
        devices=spec.devices,
        network=spec.network,
        perf=perf,
        own_profile=Path(".oserve") / "profile.json",
        context=max_model_len,
    )
    source, context = find_source(choice)
    tiers = parse_tiers(tier or ())
    demand, requests = demand_from(
        trace,
        rates,
        wish,
        max_model_len=context,
        k=types,
        rate_scale=rate_scale,
        seed=seed,
        tiers=tiers,
    )
    goal = goal_from(demand, objective, type_objective or [], attainment)
    choices = ShapeChoices(
        tensor_parallel_sizes=sizes_from("--tensor-parallel-size", tensor_parallel_size),
        pipeline_parallel_sizes=sizes_from("--pipeline-parallel-size", pipeline_parallel_size),
        precisions=tuple(precisions_from(precision, tiers)),
        max_num_batched_tokens=sizes_from("--max-num-batched-tokens", max_num_batched_tokens),
        max_num_seqs=sizes_from("--max-num-seqs", max_num_seqs) or seqs_for(tiers),
    )
    found = compute_plan(
        PlanRequest(
            model=model,
            devices=spec.devices,
            demand=demand,
            source=source,
            shapes=shapes_for(source, spec.devices, choices),
            limits=limits_from(demand, slo_ttft_ms, slo_tpot_ms, slo or [], tiers),
            tiers=tiers,
            search=search,
            maximise=maximise,
            among_equals=among_equals,
            enough_scale=enough_scale,
            current=load_plan(current) if current else None,
            seed=seed,
            time_limit_s=time_limit_s,
            min_gain=min_gain,
            spread=spread,
        )
    )
    played = played_from(requests, tiers, max_model_len=context)
    checked = _verified(found, played, rate_scale) if verify else None
    found = found if checked is None else checked.answer
    answer = _laddered(found, goal, played, rate_scale, headroom) if ladder else None
    _give(
        found,
        checked,
        answer,
        explain=explain,
        as_json=as_json,
        plots=(plot, plot_ladder),
        output=output,
    )


def _give(
    capacity: PlanResult,
    checked: VerifiedAnswer | None,
    answer: PlanLadder | None,
    *,
    explain: bool,
    as_json: bool,
    plots: tuple[str | None, str | None],
    output: str | None,
) -> None:
    """Write and print the answer; ``plots``: the files of the plan and of the ladder."""
    found = capacity if answer is None else chosen_plan(capacity, answer)
    verdicts: Sequence[str] = ()
    if answer is not None:
        verdicts = ladder_report.verdicts(answer, plan_report.verdict(capacity))
    plot, plot_ladder = plots
    if plot:
        from oserve.cli.flow_plot import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(found, Path(plot))
    if plot_ladder and answer is not None:
        from oserve.cli.ladder_plot import draw as draw_ladder  # noqa: PLC0415 - also

        draw_ladder(answer, Path(plot_ladder), title=ladder_report.title(answer, found))
    if output:
        _write(Path(output), plan_yaml(found.plan, head=plan_report.headline(found, verdicts)))
    if as_json:
        said = plan_report.document(found)
        if answer is not None:
            said["ladder"] = ladder_report.document(answer)
        if checked is not None:
            said["verified"] = verify_report.document(checked)
        print(json.dumps(said, indent=2))
    else:
        screen = _screen()
        plan_report.show(found, screen, explain=explain, verdicts=verdicts)
        if answer is not None:
            ladder_report.show(answer, screen)
        if checked is not None:
            verify_report.show(checked, screen)
        plan_report.show_commands(found, screen)
    for name in (plot, plot_ladder, output):
        if name:
            _console.print(f"written: {name}")


def _screen() -> Console:
    """A console with room for tables; files and pipes have no width of their own."""
    plain = Console(highlight=False, soft_wrap=True)
    return plain if plain.is_terminal else Console(highlight=False, soft_wrap=True, width=150)


def _verified(
    found: PlanResult, trace: SimulatedTraffic | None, rate_scale: float
) -> VerifiedAnswer:
    check = check_for(
        found.request.demand,
        slo_of(found.request),
        trace=trace,
        rate_scale=rate_scale,
        margin=found.request.min_gain or MIN_GAIN,
    )
    with waiting(_console, f"scoring candidates by simulation of {check.words}"):
        return verified_answer(found, check)


def _laddered(
    found: PlanResult,
    goal: Goal,
    trace: SimulatedTraffic | None,
    rate_scale: float,
    headroom: float,
) -> PlanLadder:
    request = found.request
    peak = peak_traffic(request.demand, trace, rate_scale=rate_scale, seed=request.seed)
    words = f"simulating deployments at each load on {peak.words}"
    with waiting(_console, words) as note:
        return plan_ladder(
            found,
            peak,
            goal,
            headroom=headroom,
            progress=lambda done: note(f"{done} simulations"),
        )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="check the path"
        ) from None
