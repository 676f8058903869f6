"""The plan that a server computes if it is given none.

A controller later repeats the same request with other rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oserve.config import Settings, load_rates
from oserve.control.decision import Mode
from oserve.core import DeploymentPlan, Device, Objective, OServeError, Precision, ReplicaShape
from oserve.perf import TokenCosts, token_costs
from oserve.perf.capacity import LatencyLimits
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.device import Link
from oserve.perf.profile import ProfileSource
from oserve.perf.selection import SourceChoice, costs_from, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.perf.source import DEFAULT_NETWORK, RooflineSource
from oserve.perf.table import PerformanceSource
from oserve.plan.demand import Demand, demand_from_rates, demand_from_trace, scaled
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan, used_shapes
from oserve.traces import Skipped, read_trace, synthesise
from oserve.traces.read import BadRows

# Fewer records come from a trial of the server, not from its traffic.
_ENOUGH_RECORDS = 500
_MOST_RECORDS = 100_000
_ASSUMED_S = 1800.0
# The assumed mix has no rate. A tiny one always fits, so that the plan follows the mix alone.
_TRICKLE = 1e-3
_TIME_LIMIT_S = 10.0
_AS_MEASURED = Speeds()
# A heterogeneous plan must gain more than the error of the model.
_MIN_GAIN = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPlan:
    """``why``: one line on where the plan comes from; ``notes``: what to know about it."""

    plan: DeploymentPlan
    why: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A source of step times, and the context length in tokens that requests must fit."""

    source: ProfileSource | RooflineSource
    context: int

    @property
    def costs(self) -> Callable[[ReplicaShape, str], TokenCosts]:
        """Token costs for the router, from the source."""
        return costs_from(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoStepTimes:
    """Why there is no source of step times."""

    reason: str

    @property
    def costs(self) -> Callable[[ReplicaShape, str], TokenCosts]:
        """Token costs for the router, from the prior."""
        return token_costs


def brief_file(settings: Settings) -> Path:
    """The file of a brief measurement by an earlier start."""
    return Path(settings.state_dir) / "profile-brief.json"


def find_step_times(
    settings: Settings, devices: tuple[Device, ...], network: str | Link = DEFAULT_NETWORK
) -> StepTimes | NoStepTimes:
    """Find the source of step times for the settings; ``network``: the link between nodes.

    Raises OServeError if the profile file in the settings cannot be used.
    """
    choice = SourceChoice(
        model=settings.model,
        devices=devices,
        network=network,
        perf=settings.planning.profile or None,
        own_profile=Path(settings.state_dir) / "profile.json",
        brief_profile=brief_file(settings),
        context=settings.engines.max_model_len,
    )
    try:
        source, context = find_source(choice)
    except OServeError as error:
        if settings.planning.profile:
            raise
        return NoStepTimes(reason=f"{error.message}; {error.remedy}")
    return StepTimes(source=source, context=context)


def plan_request_for(
    settings: Settings,
    devices: tuple[Device, ...],
    times: StepTimes,
    plain: Sequence[Precision],
    *,
    demand: Demand | None = None,
    shapes: tuple[ReplicaShape, ...] = (),
) -> PlanRequest:
    """The request for a plan, for traffic that is given, else recorded, else assumed.

    ``plain``: precisions that the model's own checkpoint runs in, the preferred first; they matter
    only without ``shapes``.
    """
    planning = settings.planning
    demand = demand or _demand(settings, times.context)
    limits = LatencyLimits(
        ttft_s=None if planning.slo_ttft_ms is None else planning.slo_ttft_ms / 1e3,
        tpot_s=None if planning.slo_tpot_ms is None else planning.slo_tpot_ms / 1e3,
    )
    precisions, notes = wanted_precisions(settings, times.source, plain)
    choices = ShapeChoices(
        precisions=precisions,
        max_num_batched_tokens=(),
        max_num_seqs=(),
        kv_cache_memory_bytes=settings.engines.kv_cache_memory_bytes or None,
    )
    return PlanRequest(
        model=settings.model,
        devices=devices,
        demand=demand,
        source=times.source,
        shapes=shapes or shapes_for(times.source, devices, choices),
        limits={kind.name: limits for kind in demand.types},
        time_limit_s=_TIME_LIMIT_S,
        candidates=0,
        min_gain=_MIN_GAIN,
        min_shapes=planning.min_shapes,
        spread=planning.spread,
        notes=() if shapes else notes,
    )


def wanted_precisions(
    settings: Settings, source: PerformanceSource, plain: Sequence[Precision]
) -> tuple[tuple[Precision, ...], tuple[str, ...]]:
    """The precisions that replicas may have, and notes about them.

    By default every variant, and the first plain precision whose speed is known.
    """
    if settings.planning.precisions:
        return settings.planning.precisions, ()
    variants = [Precision(name) for name in settings.engines.variants if name in set(Precision)]
    known = [item for item in plain if _is_known(source, item)]
    notes = []
    if plain and plain[0] not in known:
        instead = ", ".join(dict.fromkeys([*known[:1], *variants])) or "nothing else"
        notes.append(
            f"{plain[0]}, the fastest plain precision of this processor, was not measured: planned "
            f"with {instead} (oserve profile {settings.model})"
        )
    return tuple(dict.fromkeys([*(known or plain)[:1], *variants])), tuple(notes)


def _is_known(source: PerformanceSource, precision: Precision) -> bool:
    """Whether the source covers replicas in ``precision``."""
    if not isinstance(source, ProfileSource):
        return True
    return any(key[2] is precision for key in source.keys())  # noqa: SIM118 - no mapping


def first_plan(request: PlanRequest, speeds: Speeds = _AS_MEASURED) -> FirstPlan:
    """The best plan for replicas at these speeds, and why."""
    found = compute_plan(replace(request, source=corrected(request.source, speeds)))
    return FirstPlan(plan=found.plan, why=_why(found), notes=found.notes)


def _demand(settings: Settings, context: int) -> Demand:
    planning = settings.planning
    if planning.trace:
        skipped = Skipped()
        # A plan depends neither on the order of requests nor on single ones.
        rows = read_trace(
            planning.trace,
            bad_rows=BadRows.SKIP,
            time_unit=planning.time_unit,
            sort=True,
            skipped=skipped,
        )
        found = demand_from_trace(rows, source=planning.trace, max_model_len=context)
        notes = [skipped.assumed] if skipped.assumed else []
        if skipped.count:
            notes.append(f"skipped {skipped.count} bad rows of the trace; {skipped.first[0]}")
        return replace(found, notes=(*found.notes, *notes))
    if planning.rates:
        return demand_from_rates(
            load_rates(planning.rates), source="planning.rates", max_model_len=context
        )
    records = settings.gateway.records_file
    if records and Path(records).is_file():
        try:
            requests = list(
                read_trace(records, limit=_MOST_RECORDS, bad_rows=BadRows.SKIP, skipped=Skipped())
            )
        except OServeError:
            requests = []
        if len(requests) >= _ENOUGH_RECORDS:
            name = f"{len(requests):,} recorded requests"
            return demand_from_trace(requests, source=name, max_model_len=context)
    assumed = demand_from_trace(
        synthesise(rate_rps=2.0, duration_s=_ASSUMED_S, seed=0),
        source="an assumed mix of conversations and code",
        max_model_len=context,
    )
    return scaled(assumed, _TRICKLE)


def _why(found: PlanResult) -> str:
    score, base = found.planned.best.score, found.baseline.score
    demand = found.request.demand
    homogeneous = " + ".join(
        f"{count} x {shape.name}" for shape, count in used_shapes(found.problem, found.baseline)
    )
    carried = (
        f"carries {score.scale * demand.rate_rps:.2f} requests/s of it "
        f"(best homogeneous, {homogeneous}: {base.scale * demand.rate_rps:.2f})"
    )
    if score.scale < 1:
        carried = (
            f"serves {score.served_rps:.2f} of {demand.rate_rps:.2f} requests/s "
            f"(best homogeneous, {homogeneous}: {base.served_rps:.2f})"
        )
    origin = found.request.source.origin
    return f"a plan computed for {demand.source}: {carried}{_variety(found)}; {origin}"


def objective_note(settings: Settings, mode: Mode) -> str:
    """What the controller makes of the first plan, which is made for capacity or given."""
    planning = settings.planning
    own = ", ".join(f"{name}: {item}" for name, item in planning.type_objectives.items())
    asked = f"objective {planning.objective}" + (f" ({own})" if own else "")
    if {planning.objective, *planning.type_objectives.values()} == {Objective.CAPACITY}:
        return f"{asked}: replicas are planned for capacity alone"
    if not settings.control.simulate:
        return f"{asked}: without control.simulate replicas are planned for capacity alone"
    follows = "follows the load" if mode is Mode.AUTO else "advises by load"
    return f"{asked}: this plan serves first; the controller {follows} once traffic is known"


def _variety(found: PlanResult) -> str:
    """The gain or loss by ``planning.min_shapes``."""
    least = found.request.min_shapes
    if least == 1:
        return ""
    if not found.problem.is_varied(found.planned.best.counts):
        return f"; {least} different shapes (planning.min_shapes) do not fit these devices"
    change = 100 * (found.gain - 1)
    return f"; {least} different shapes are required (planning.min_shapes): {change:+.1f} %"
