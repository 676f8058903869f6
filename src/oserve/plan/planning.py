"""Planning: from a model, a cluster and a demand to a plan with its reasons.

``oserve plan`` calls it, and ``oserve serve`` without a plan. It combines the performance table,
the search and the placement, and prints nothing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from oserve.core import (
    DeploymentPlan,
    Device,
    OServeError,
    PlannedType,
    Precision,
    ReplicaShape,
    Tier,
)
from oserve.perf import ShapePerformance
from oserve.perf.capacity import LatencyLimits
from oserve.perf.table import PerformanceSource, performance_table
from oserve.plan.demand import Demand
from oserve.plan.deploy import PlacedReplicas
from oserve.plan.problem import AmongEquals, Maximise, PlanProblem
from oserve.plan.redundancy import place_redundantly
from oserve.plan.score import EQUAL
from oserve.plan.search import DeploymentCandidate, Planned, Search, plan_deployment
from oserve.plan.tier_table import tier_table

# Overflow covers smaller shares.
_LEAST_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A planning problem. ``limits`` are the SLOs by type name; ``shapes`` the allowed shapes.

    A heterogeneous deployment must gain ``min_gain`` (0.02: two per cent) over the best homogeneous
    one, which is simpler; the model errs by some per cent. If ``min_shapes`` asks for several
    shapes, the best deployment with so many wins, if there is one. ``spread``: the share of the
    objective that may be paid so that the loss of one node leaves every type a replica (see
    ``redundancy``). ``tiers``: service tiers, whose limits ``limits`` has by type. ``notes``:
    remarks on the request itself.
    """

    model: str
    devices: tuple[Device, ...]
    demand: Demand
    source: PerformanceSource
    shapes: tuple[ReplicaShape, ...]
    limits: Mapping[str, LatencyLimits]
    search: Search = Search.EXACT
    maximise: Maximise = Maximise.CAPACITY
    among_equals: AmongEquals = AmongEquals.FEWEST_DEVICES
    enough_scale: float | None = None
    current: DeploymentPlan | None = None
    seed: int = 0
    time_limit_s: float = 60.0
    candidates: int = 10
    min_gain: float = 0.0
    min_shapes: int = 1
    spread: float = 0.0
    tiers: tuple[Tier, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedRates:
    """Requests per second: served regardless of SLOs, served within all SLOs, and demanded."""

    served_rps: float
    goodput_rps: float
    demand_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """The plan, how it was found, and the deployments it is compared with.

    ``usual`` is the common practice: the smallest tensor-parallel size that holds the model and its
    requests, on all devices. ``table_s`` and ``solve_s`` are seconds on this machine. ``price`` is
    the share of the objective given up for ``spread``; ``exposed`` the types that still lose their
    last replica with a node.
    """

    request: PlanRequest
    problem: PlanProblem
    planned: Planned
    placed: PlacedReplicas
    plan: DeploymentPlan
    predicted: PredictedRates
    baseline: DeploymentCandidate
    baseline_predicted: PredictedRates
    usual: DeploymentCandidate | None
    table_s: float
    solve_s: float
    price: float = 0.0
    exposed: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """The caveats of the plan."""
        request = self.request
        notes = [*request.notes, *request.demand.notes, *request.source.caveats(self._shapes)]
        return tuple(dict.fromkeys([*notes, *self._spread_notes()]))

    def _spread_notes(self) -> list[str]:
        """What was paid against the loss of a node, and what is left exposed."""
        notes = []
        if self.price > EQUAL:
            notes.append(
                f"{self.price:.1%} of the objective is paid so that the loss of one node leaves "
                "types a replica (planning.spread)"
            )
        if self.exposed:
            names = ", ".join(sorted(frozenset().union(*self.exposed.values())))
            nodes = ", ".join(self.exposed)
            notes.append(
                f"the loss of one node ({nodes}) would leave no replica for {names}; "
                "planning.spread says what may be paid against that"
            )
        return notes

    @property
    def _shapes(self) -> tuple[ReplicaShape, ...]:
        return tuple(shape for shape, _ in used_shapes(self.problem, self.planned.best))

    @property
    def gain(self) -> float:
        """The gain of the plan over the best homogeneous deployment: a ratio of objectives."""
        return _gain(self.planned, self.planned.best, self.baseline)


def compute_plan(request: PlanRequest) -> PlanResult:
    """Compute the plan. Raises OServeError, with a remedy, if nothing can serve the demand."""
    demand = request.demand
    started = time.perf_counter()
    table = request_table(request)
    tabled = time.perf_counter()
    _refuse_unmet(request, table)
    problem = PlanProblem(
        devices=request.devices,
        types=demand.types,
        options=table,
        maximise=request.maximise,
        among_equals=request.among_equals,
        enough_scale=request.enough_scale,
        current=request.current,
        min_shapes=request.min_shapes,
    )
    planned = plan_deployment(
        problem,
        request.search,
        time_limit_s=request.time_limit_s,
        seed=request.seed,
        candidates=request.candidates,
    )
    varied = request.min_shapes > 1 and problem.is_varied(planned.best.counts)
    if not varied and _gain(planned, planned.best, planned.homogeneous[0]) < 1 + request.min_gain:
        planned = replace(planned, best=planned.homogeneous[0])
    choice = place_redundantly(problem, planned, planned.best, spread=request.spread)
    planned, placed = replace(planned, best=choice.deployment), choice.placed
    solved = time.perf_counter()
    baseline = planned.homogeneous[0]
    return PlanResult(
        request=request,
        problem=problem,
        planned=planned,
        placed=placed,
        plan=deployment_plan(request, placed),
        predicted=predict(request, problem, planned.best),
        baseline=baseline,
        baseline_predicted=predict(request, problem, baseline),
        usual=_usual(problem, planned.homogeneous),
        table_s=tabled - started,
        solve_s=solved - tabled,
        price=choice.price,
        exposed=choice.exposed,
    )


def request_table(request: PlanRequest) -> tuple[ShapePerformance, ...]:
    """The capacities of a request's shapes; with tiers see ``tier_table``."""

    def make(limits: Mapping[str, LatencyLimits]) -> tuple[ShapePerformance, ...]:
        return performance_table(
            request.source,
            request.shapes,
            request.demand.types,
            limits=limits,
            longest_tokens=request.demand.longest_tokens,
        )

    if not request.tiers:
        return make(request.limits)
    return tier_table([kind.name for kind in request.demand.types], request.limits, make)


def _gain(planned: Planned, best: DeploymentCandidate, base: DeploymentCandidate) -> float:
    """The gain of one deployment over another, in scale or else in rate served."""
    if planned.bounds_scale:
        return best.score.scale / base.score.scale if base.score.scale > 0 else math.inf
    return best.score.served_rps / base.score.served_rps if base.score.served_rps > 0 else math.inf


def predict(
    request: PlanRequest, problem: PlanProblem, deployment: DeploymentCandidate
) -> PredictedRates:
    """The rates that a deployment serves, with and without regard to SLOs."""
    from oserve.plan.assign import Assigner  # noqa: PLC0415

    used = [index for index, count in enumerate(deployment.counts) if count]
    table = performance_table(
        request.source,
        [problem.options[index].shape for index in used],
        problem.types,
        limits={
            name: LatencyLimits(precisions=own.precisions) for name, own in request.limits.items()
        },
        longest_tokens=request.demand.longest_tokens,
    )
    free = replace(problem, options=table, current=None)
    served = Assigner(free).score([deployment.counts[index] for index in used]).served_rps
    return PredictedRates(
        served_rps=max(served, deployment.score.served_rps),
        goodput_rps=deployment.score.served_rps,
        demand_rps=problem.demand_rps,
    )


def used_shapes(
    problem: PlanProblem, deployment: DeploymentCandidate
) -> list[tuple[ReplicaShape, int]]:
    """The shapes of a deployment with their numbers of replicas."""
    return [
        (option.shape, count)
        for option, count in zip(problem.options, deployment.counts, strict=True)
        if count
    ]


def deployment_plan(request: PlanRequest, placed: PlacedReplicas) -> DeploymentPlan:
    """The deployment plan; a length class has the weighted mean of its types' shares."""
    demand = request.demand
    shares: dict[str, dict[str, float]] = {}
    for item in demand.classes:
        mix = demand.class_mix[item.name]
        mixed: dict[str, float] = {}
        for kind, part in mix.items():
            for name, share in placed.routing_shares[kind].items():
                mixed[name] = mixed.get(name, 0.0) + part * share
        shares[item.name] = _whole(mixed or {spec.id: 1.0 for spec in placed.replicas})
    tiers = {kind.name: kind.tier for kind in demand.types}
    return DeploymentPlan(
        id="planned",
        replicas=placed.replicas,
        length_classes=demand.classes,
        routing_shares=shares,
        planned_types=tuple(
            PlannedType(
                name=name,
                prompt_tokens=round(prompt, 3),
                output_tokens=round(output, 3),
                shares=_whole(placed.routing_shares[name]),
                tier=tiers[name],
            )
            for name, (prompt, output) in demand.centres.items()
        ),
    )


def _whole(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares without negligible ones, scaled to sum to 1."""
    total = sum(shares.values())
    kept = {name: value for name, value in shares.items() if value > _LEAST_SHARE * total}
    total = sum(kept.values())
    return {name: value / total for name, value in kept.items()}


def _usual(
    problem: PlanProblem, homogeneous: Sequence[DeploymentCandidate]
) -> DeploymentCandidate | None:
    """The deployment of the smallest TP size that serves every type, at vLLM's chunk budget."""

    def unusual(deployment: DeploymentCandidate) -> tuple[float, ...]:
        shapes = [shape for shape, _ in used_shapes(problem, deployment)]
        return (
            max(shape.pipeline_parallel_size for shape in shapes),
            max(shape.tensor_parallel_size for shape in shapes),
            max(abs(shape.max_num_batched_tokens - 2048) for shape in shapes),
            -max(shape.max_num_seqs for shape in shapes),
            *(float(shape.precision is not Precision.BF16) for shape in shapes),
        )

    able = [item for item in homogeneous if item.score.scale > 0]
    return min(able, key=unusual, default=None)


def _refuse_unmet(request: PlanRequest, table: Sequence[ShapePerformance]) -> None:
    """Raise OServeError if no shape serves a type with traffic: too little memory or tight SLO."""
    unmet = [
        index
        for index, kind in enumerate(request.demand.types)
        if kind.arrival_rate_rps > 0 and not any(row.capacity_rps[index] > 0 for row in table)
    ]
    if not unmet:
        return
    nearest = []
    for index in unmet:
        kind = request.demand.types[index]
        timed = [row for row in table if row.ttft_s[index] < math.inf]
        if not timed:
            raise OServeError(
                f"no shape has KV cache for requests of type {kind.name!r} "
                f"({request.demand.longest_tokens.get(kind.name, 0):,.0f} tokens at most)",
                place="--cluster",
                remedy="use more devices a replica, fewer bits a weight, or shorter requests",
            )
        limits = request.limits.get(kind.name, LatencyLimits())
        row = min(timed, key=lambda row, i=index, own=limits: _excess(row, i, own))  # type: ignore[misc]
        nearest.append((_excess(row, index, limits), index, row, limits))
    _, index, row, _ = max(nearest, key=lambda item: item[0])
    kind = request.demand.types[index]
    # Common limits must suffice for the type that is hardest to serve.
    ttft_s = [row.ttft_s[i] for _, i, row, own in nearest if own.ttft_s is not None]
    tpot_s = [row.tpot_s[i] for _, i, row, own in nearest if own.tpot_s is not None]
    closest = " ".join(
        f"--slo-{name}-ms {_above(max(seconds))}"
        for name, seconds in (("ttft", ttft_s), ("tpot", tpot_s))
        if seconds
    )
    raise OServeError(
        f"no shape meets the SLO for type {kind.name!r} "
        f"({kind.prompt_tokens:,.0f} tokens in, {kind.output_tokens:,.0f} out), "
        f"not even idle: {row.bound_by[index]} with {row.shape.name}",
        place="--slo",
        remedy=f"the closest feasible one is about {closest}",
    )


def _excess(row: ShapePerformance, index: int, limits: LatencyLimits) -> float:
    """The factor by which an idle replica misses the limits."""
    return max(
        row.ttft_s[index] / limits.ttft_s if limits.ttft_s else 0.0,
        row.tpot_s[index] / limits.tpot_s if limits.tpot_s else 0.0,
    )


def _above(seconds: float) -> int:
    """Milliseconds, rounded up so that a small load fits as well."""
    return int(seconds * 1.05 * 1e3) + 1
