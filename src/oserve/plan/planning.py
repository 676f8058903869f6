"""From a model, a cluster and a demand to a plan with its reasons: what ``oserve plan`` asks.

Also what ``oserve serve`` asks when it is given no plan. Everything is wired here: facts, the
performance table, the search, placement. It prints nothing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from oserve.core import (
    DeploymentPlan,
    Device,
    OServeError,
    PlannedType,
    Precision,
    ReplicaShape,
)
from oserve.perf import ShapePerformance
from oserve.perf.capacity import Limits
from oserve.perf.shapes import ShapeChoices
from oserve.perf.table import PerformanceSource, performance_table
from oserve.plan.demand import Demand
from oserve.plan.deploy import Placed, place_deployment
from oserve.plan.problem import AmongEquals, Objective, PlanProblem
from oserve.plan.search import Deployment, Planned, Search, plan_deployment

# A share below this is left to overflow.
_LEAST_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be planned. ``limits`` are the SLOs, by type name; ``shapes`` what may be used.

    Different replicas must be worth ``min_gain`` (0.02: two per cent) over the best homogeneous
    deployment, or that one is taken: it is simpler, and the model errs by some per cent. But where
    ``min_shapes`` asks for several, the best deployment of so many is taken, if there is one.
    ``notes``: what to know about the question itself.
    """

    model: str
    devices: tuple[Device, ...]
    demand: Demand
    source: PerformanceSource
    shapes: tuple[ReplicaShape, ...]
    limits: Mapping[str, Limits]
    search: Search = Search.EXACT
    objective: Objective = Objective.CAPACITY
    among_equals: AmongEquals = AmongEquals.FEWEST_DEVICES
    enough_scale: float | None = None
    current: DeploymentPlan | None = None
    seed: int = 0
    time_limit_s: float = 60.0
    candidates: int = 10
    min_gain: float = 0.0
    min_shapes: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedRates:
    """Requests per second: served with no regard to SLOs, within all of them, and asked for."""

    served_rps: float
    goodput_rps: float
    demand_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """The plan, how it was found, and what it is compared with.

    ``usual`` is what most people run: the smallest tensor-parallel size that holds the model with
    room for its requests, everywhere. ``table_s`` and ``solve_s`` are seconds of this machine.
    """

    question: PlanRequest
    problem: PlanProblem
    planned: Planned
    placed: Placed
    plan: DeploymentPlan
    predicted: PredictedRates
    baseline: Deployment
    baseline_predicted: PredictedRates
    usual: Deployment | None
    table_s: float
    solve_s: float

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know to judge the plan."""
        asked = self.question
        notes = [*asked.notes, *asked.demand.notes, *asked.source.caveats(self._shapes)]
        return tuple(dict.fromkeys(notes))

    @property
    def _shapes(self) -> tuple[ReplicaShape, ...]:
        return tuple(shape for shape, _ in used_shapes(self.problem, self.planned.best))

    @property
    def gain(self) -> float:
        """Of the plan over the best homogeneous deployment, as a ratio of what was sought."""
        return _gain(self.planned, self.planned.best, self.baseline)


def answer(question: PlanRequest) -> PlanResult:
    """Plan it. Raises OServeError where nothing can serve the demand, naming what would."""
    demand = question.demand
    started = time.perf_counter()
    table = performance_table(
        question.source,
        question.shapes,
        demand.types,
        limits=question.limits,
        longest_tokens=demand.longest_tokens,
    )
    tabled = time.perf_counter()
    _refuse_unmet(question, table)
    problem = PlanProblem(
        devices=question.devices,
        types=demand.types,
        options=table,
        objective=question.objective,
        among_equals=question.among_equals,
        enough_scale=question.enough_scale,
        current=question.current,
        min_shapes=question.min_shapes,
    )
    planned = plan_deployment(
        problem,
        question.search,
        time_limit_s=question.time_limit_s,
        seed=question.seed,
        candidates=question.candidates,
    )
    asked = question.min_shapes > 1 and problem.is_varied(planned.best.counts)
    if not asked and _gain(planned, planned.best, planned.homogeneous[0]) < 1 + question.min_gain:
        planned = replace(planned, best=planned.homogeneous[0])
    placed = place_deployment(problem, planned.best)
    solved = time.perf_counter()
    baseline = planned.homogeneous[0]
    return PlanResult(
        question=question,
        problem=problem,
        planned=planned,
        placed=placed,
        plan=deployment_plan(question, placed),
        predicted=predict(question, problem, planned.best),
        baseline=baseline,
        baseline_predicted=predict(question, problem, baseline),
        usual=_usual(problem, planned.homogeneous),
        table_s=tabled - started,
        solve_s=solved - tabled,
    )


def _gain(planned: Planned, best: Deployment, base: Deployment) -> float:
    """Of one deployment over another in what was sought: the scale, else the rate served."""
    if planned.bounds_scale:
        return best.score.scale / base.score.scale if base.score.scale > 0 else math.inf
    return best.score.served_rps / base.score.served_rps if base.score.served_rps > 0 else math.inf


def predict(question: PlanRequest, problem: PlanProblem, deployment: Deployment) -> PredictedRates:
    """What a deployment serves, with and without regard to SLOs."""
    from oserve.plan.assign import Assigner  # noqa: PLC0415

    used = [index for index, count in enumerate(deployment.counts) if count]
    table = performance_table(
        question.source,
        [problem.options[index].shape for index in used],
        problem.types,
        longest_tokens=question.demand.longest_tokens,
    )
    free = replace(problem, options=table, current=None)
    served = Assigner(free).score([deployment.counts[index] for index in used]).served_rps
    return PredictedRates(
        served_rps=max(served, deployment.score.served_rps),
        goodput_rps=deployment.score.served_rps,
        demand_rps=problem.demand_rps,
    )


def used_shapes(problem: PlanProblem, deployment: Deployment) -> list[tuple[ReplicaShape, int]]:
    """The shapes of a deployment and how many replicas each has."""
    return [
        (option.shape, count)
        for option, count in zip(problem.options, deployment.counts, strict=True)
        if count
    ]


def default_choices(precisions: Sequence[Precision] = ()) -> ShapeChoices:
    """What is varied unless said otherwise."""
    return ShapeChoices(precisions=tuple(precisions) or (Precision.BF16,))


def deployment_plan(question: PlanRequest, placed: Placed) -> DeploymentPlan:
    """Shares per length class: those of the types it is made of, in proportion."""
    demand = question.demand
    shares: dict[str, dict[str, float]] = {}
    for item in demand.classes:
        mix = demand.class_mix[item.name]
        mixed: dict[str, float] = {}
        for kind, part in mix.items():
            for name, share in placed.routing_shares[kind].items():
                mixed[name] = mixed.get(name, 0.0) + part * share
        shares[item.name] = _whole(mixed or {spec.id: 1.0 for spec in placed.replicas})
    return DeploymentPlan(
        id="planned",
        replicas=placed.replicas,
        workload_types=demand.classes,
        routing_shares=shares,
        types=tuple(
            PlannedType(
                name=name,
                prompt_tokens=round(prompt, 3),
                output_tokens=round(output, 3),
                shares=_whole(placed.routing_shares[name]),
            )
            for name, (prompt, output) in demand.centres.items()
        ),
    )


def _whole(shares: Mapping[str, float]) -> dict[str, float]:
    """Scaled to sum to 1, without what is too small to matter."""
    total = sum(shares.values())
    kept = {name: value for name, value in shares.items() if value > _LEAST_SHARE * total}
    total = sum(kept.values())
    return {name: value / total for name, value in kept.items()}


def _usual(problem: PlanProblem, homogeneous: Sequence[Deployment]) -> Deployment | None:
    """The smallest tensor-parallel size that serves every type, vLLM's usual chunk budget."""

    def unusual(deployment: Deployment) -> tuple[float, ...]:
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


def _refuse_unmet(question: PlanRequest, table: Sequence[ShapePerformance]) -> None:
    """Raise where no shape serves a type that comes: too little room, or too tight an SLO."""
    unmet = [
        index
        for index, kind in enumerate(question.demand.types)
        if kind.arrival_rate_rps > 0 and not any(row.capacity_rps[index] > 0 for row in table)
    ]
    if not unmet:
        return
    nearest = []
    for index in unmet:
        kind = question.demand.types[index]
        timed = [row for row in table if row.ttft_s[index] < math.inf]
        if not timed:
            raise OServeError(
                f"no shape has KV cache for requests of type {kind.name!r} "
                f"({question.demand.longest_tokens.get(kind.name, 0):,.0f} tokens at most)",
                place="--cluster",
                remedy="use more devices a replica, fewer bits a weight, or shorter requests",
            )
        limits = question.limits.get(kind.name, Limits())
        row = min(timed, key=lambda row, i=index, own=limits: _excess(row, i, own))  # type: ignore[misc]
        nearest.append((_excess(row, index, limits), index, row, limits))
    _, index, row, _ = max(nearest, key=lambda item: item[0])
    kind = question.demand.types[index]
    # Limits that are given for all types must suffice for the one that is hardest to serve.
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


def _excess(row: ShapePerformance, index: int, limits: Limits) -> float:
    """By what factor an idle replica misses the limits."""
    return max(
        row.ttft_s[index] / limits.ttft_s if limits.ttft_s else 0.0,
        row.tpot_s[index] / limits.tpot_s if limits.tpot_s else 0.0,
    )


def _above(seconds: float) -> int:
    """Milliseconds, a little above, so that a small load fits as well."""
    return int(seconds * 1.05 * 1e3) + 1
