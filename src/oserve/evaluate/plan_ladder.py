"""The ladder of a plan result: what serves best at each load, and which plan follows from it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.ladder import Goal, Ladder, LadderDeployment, LoadScore, Shapes, shapes_of
from oserve.control.ladder_table import LadderRow, ladder_rows
from oserve.control.plan_parts import even_shares
from oserve.core import Objective, ReplicaShape
from oserve.evaluate.ladder import LadderBuilder, LadderCase
from oserve.evaluate.peak import PeakTraffic
from oserve.evaluate.simulator import Simulator
from oserve.evaluate.switch_scorer import demand_lengths
from oserve.evaluate.verification import served_as, slo_of
from oserve.perf.table import performance_table
from oserve.plan.assign import Assigner
from oserve.plan.deploy import PlacedReplicas, place_deployment
from oserve.plan.planning import PlanResult, deployment_plan, predict
from oserve.plan.search import DeploymentCandidate
from oserve.traces import Slo

LOADS = tuple(level / 10 for level in range(1, 14))
"""The loads that a planner's ladder shows, as parts of the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledLatency:
    """The mean E2E of a workload type on a rung, in seconds: by the linear model, and simulated."""

    load: float
    name: str
    modelled_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """The relative error of the linear model."""
        return self.modelled_s / self.simulated_s - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLadder:
    """A ladder and the deployments that matter on it, as indices.

    ``chosen`` by the objective at the peak, ``holds`` with ``headroom`` there; ``capacity``: the
    programme's plan; ``homogeneous``: the best of one shape by the same objective. ``held``: the
    largest load up to which each deployment holds the SLO of every type, as far as any does.
    ``latencies``: how far the linear model is off on the rungs. ``seconds``: how long the
    simulations took.
    """

    ladder: Ladder
    goal: Goal
    headroom: float
    peak: PeakTraffic
    slo: Slo
    rows: tuple[LadderRow, ...]
    chosen: int
    holds: bool
    capacity: int
    homogeneous: int
    held: tuple[float, ...]
    latencies: tuple[ModelledLatency, ...]
    simulations: int
    seconds: float

    def at(self, index: int, load: float = 1.0) -> LoadScore:
        """The score of a deployment at a load."""
        return self.ladder.deployments[index].at(load)

    def holds_at(self, index: int, load: float) -> bool:
        """Whether a deployment holds the SLO of every type at a load, as far as any does."""
        return index in self.ladder.scores(load).holding(self.goal)


def plan_ladder(
    found: PlanResult,
    peak: PeakTraffic,
    goal: Goal,
    *,
    headroom: float,
    loads: Sequence[float] = LOADS,
    progress: Callable[[int], None] = lambda _done: None,
) -> PlanLadder:
    """Build the ladder of a plan result by simulation; ``loads`` must contain 1.

    Takes some hundred simulations; ``progress`` is called with their number so far.
    """
    began_s = time.monotonic()
    request = found.request
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done = number
        progress(number)

    case = LadderCase(
        names=tuple(kind.name for kind in request.demand.types),
        rates=peak.traffic.rates,
        lengths=demand_lengths(request.demand),
        work=_work(found),
        devices=request.devices,
        classes=request.demand.classes,
        shapes=_distinct(request.shapes),
        levers=served_as(request),
        slo=slo_of(request),
        goal=goal,
        present=_present(found),
        seed=request.seed,
        traffic=peak.traffic,
        plans=(found.plan,),
        # A rung must hold more than its own load.
        loads=(*loads, headroom * max(loads)) if headroom > 1 else tuple(loads),
    )
    ladder = LadderBuilder(Simulator(request.source), case, count).build()
    rows = ladder_rows(ladder, goal, loads, headroom=headroom)
    capacity = _index(ladder, shapes_of(found.plan.replicas))
    near = () if request.current is None else shapes_of(request.current.replicas)
    near = near or next(row.shapes for row in rows if row.load == 1.0)
    rung = ladder.choose(goal, required=headroom, expected=1.0, near=near)
    chosen, holds = rung.index, rung.holds
    if set(goal.objectives) == {Objective.CAPACITY}:
        chosen = capacity
        holds = capacity in ladder.scores(headroom).holding(goal)
    return PlanLadder(
        ladder=ladder,
        goal=goal,
        headroom=headroom,
        peak=peak,
        slo=case.slo,
        rows=rows,
        chosen=chosen,
        holds=holds,
        capacity=capacity,
        homogeneous=_best_homogeneous(ladder, goal, headroom),
        held=_held(ladder, goal),
        latencies=_latencies(found, ladder, rows),
        simulations=done,
        seconds=time.monotonic() - began_s,
    )


def chosen_plan(found: PlanResult, answer: PlanLadder) -> PlanResult:
    """The plan result with the deployment that the ladder chose, routed as it was simulated.

    The programme's own plan stays as it is.
    """
    if answer.chosen == answer.capacity:
        return found
    counts = dict(answer.ladder.deployments[answer.chosen].shapes)
    numbers = tuple(counts.get(option.shape, 0) for option in found.problem.options)
    assigner = Assigner(found.problem)
    best = DeploymentCandidate(
        counts=numbers, score=assigner.score(numbers), assignment=assigner.assign(numbers)
    )
    placed = _evenly(place_deployment(found.problem, best))
    return replace(
        found,
        planned=replace(found.planned, best=best),
        placed=placed,
        plan=deployment_plan(found.request, placed),
        predicted=predict(found.request, found.problem, best),
    )


def _evenly(placed: PlacedReplicas) -> PlacedReplicas:
    """Every replica serves every type."""
    even = even_shares([spec.id for spec in placed.replicas])
    return replace(placed, routing_shares=dict.fromkeys(placed.routing_shares, even))


def _distinct(shapes: Sequence[ReplicaShape]) -> tuple[ReplicaShape, ...]:
    """Of shapes that differ in ``max_num_seqs`` alone, the one with the most."""
    most: dict[ReplicaShape, ReplicaShape] = {}
    for shape in shapes:
        form = replace(shape, max_num_seqs=1)
        if form not in most or most[form].max_num_seqs < shape.max_num_seqs:
            most[form] = shape
    return tuple(most.values())


def _present(found: PlanResult) -> tuple[Shapes, ...]:
    """The programme's plan, its best homogeneous one, and the current one if shapes are known."""
    known = {option.shape for option in found.problem.options}
    base = place_deployment(found.problem, found.baseline).replicas
    plans = [found.plan.replicas, base]
    if found.request.current is not None:
        plans.append(found.request.current.replicas)
    return tuple(
        dict.fromkeys(
            shapes_of(replicas)
            for replicas in plans
            if replicas and all(spec.shape in known for spec in replicas)
        )
    )


def _work(found: PlanResult) -> tuple[float, ...]:
    """The least device-seconds that a request of each type needs."""
    return tuple(
        min(
            (
                option.shape.device_count / option.capacity_rps[column]
                for option in found.problem.options
                if option.capacity_rps[column] > 0
            ),
            default=1.0,
        )
        for column in range(len(found.problem.types))
    )


def _index(ladder: Ladder, shapes: Shapes) -> int:
    index = ladder.find(shapes)
    if index is None:
        raise LookupError("a deployment that was to be simulated is not in the ladder")
    return index


def _held(ladder: Ladder, goal: Goal) -> tuple[float, ...]:
    """The largest simulated load that each deployment holds, in steps of 1 %; 0 for none."""
    held = [0.0] * len(ladder.deployments)
    holding = set(range(len(held)))
    for percent in range(1, round(100 * ladder.loads[-1]) + 1):
        holding &= set(ladder.scores(percent / 100).holding(goal))
        for index in holding:
            held[index] = percent / 100
    return tuple(held)


def _best_homogeneous(ladder: Ladder, goal: Goal, headroom: float) -> int:
    """The best deployment of one shape at the peak."""
    plain = [item for item in ladder.deployments if is_homogeneous(item)]
    rung = replace(ladder, deployments=tuple(plain)).choose(goal, required=headroom, expected=1.0)
    return ladder.deployments.index(plain[rung.index])


def is_homogeneous(deployment: LadderDeployment) -> bool:
    """Whether all replicas have one shape, on whatever kinds of devices."""
    return len({replace(shape, device_kind="") for shape, _ in deployment.shapes}) == 1


def _latencies(
    found: PlanResult, ladder: Ladder, rows: Sequence[LadderRow]
) -> tuple[ModelledLatency, ...]:
    """The modelled and the simulated latency of each type on each rung."""
    request = found.request
    shapes = dict.fromkeys(shape for row in rows for shape, _ in row.shapes)
    table = performance_table(
        request.source,
        tuple(shapes),
        request.demand.types,
        longest_tokens=request.demand.longest_tokens,
    )
    by_shape = {row.shape: (row.capacity_rps, row.latency_s) for row in table}
    found_latencies = []
    for row in rows:
        for column, name in enumerate(ladder.names):
            modelled_s = _modelled_s(row.shapes, column, by_shape)
            if ladder.rates[column] > 0 and math.isfinite(modelled_s):
                found_latencies.append(
                    ModelledLatency(
                        load=row.load,
                        name=name,
                        modelled_s=modelled_s,
                        simulated_s=row.score.type_e2e_s[column],
                    )
                )
    return tuple(found_latencies)


def _modelled_s(
    shapes: Shapes,
    column: int,
    by_shape: Mapping[ReplicaShape, tuple[tuple[float, ...], tuple[float, ...]]],
) -> float:
    """The mean over replicas, which serve in proportion to their capacities."""
    known = [(by_shape[shape], count) for shape, count in shapes if shape in by_shape]
    weights = np.array([count * capacity[column] for (capacity, _), count in known])
    if weights.sum() <= 0:
        return math.inf
    latencies = np.array([latency[column] for (_, latency), _ in known])
    able = weights > 0
    return float(np.average(latencies[able], weights=weights[able]))
