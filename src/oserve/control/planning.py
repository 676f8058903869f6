"""The controller's planner, made from a request for a plan."""

from collections.abc import Sequence
from dataclasses import replace

from oserve.control.planner import Legs, PlannerFacts, TablePlanner
from oserve.control.starts import StartTimes
from oserve.core import OServeError, ReplicaShape, ReplicaSpec
from oserve.perf import ShapePerformance
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.table import performance_table
from oserve.plan.planning import PlanRequest

_AS_MEASURED = Speeds()


def planner_for(
    question: PlanRequest, starts: StartTimes, legs: Legs | None = None
) -> TablePlanner:
    """The controller's planner."""
    return TablePlanner(planner_facts(question, starts, legs))


def planner_facts(
    question: PlanRequest, starts: StartTimes, legs: Legs | None = None
) -> PlannerFacts:
    """What the planner plans from: the performance table is computed once, for any rates."""
    demand = question.demand
    kinds = {device.id: device.kind for device in question.devices}

    def rows(
        shapes: Sequence[ReplicaShape], speeds: Speeds = _AS_MEASURED
    ) -> tuple[ShapePerformance, ...]:
        return performance_table(
            corrected(question.source, speeds),
            shapes,
            demand.types,
            limits=question.limits,
            longest_tokens=demand.longest_tokens,
        )

    def row_of(spec: ReplicaSpec) -> ShapePerformance | None:
        """Performance of a shape outside the table, on the kind of its devices."""
        kind = kinds.get(spec.devices[0]) if spec.devices else None
        if kind is None:
            return None
        try:
            found = rows([replace(spec.shape, device_kind=kind)])
        except OServeError:
            return None
        return found[0] if found else None

    return PlannerFacts(
        devices=question.devices,
        types=demand.types,
        centres=tuple(demand.centres[kind.name] for kind in demand.types),
        classes=demand.classes,
        class_mix=demand.class_mix,
        table=rows(question.shapes),
        row_of=row_of,
        start_s=starts.start_s,
        legs=legs,
        min_gain=question.min_gain,
        min_shapes=question.min_shapes,
        spread=question.spread,
        time_limit_s=question.time_limit_s,
        rows_at=rows,
    )
