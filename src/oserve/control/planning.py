"""The controller's planner, made from a request for a plan."""

from collections.abc import Sequence
from dataclasses import replace

from oserve.control.planner import Legs, PlannerFacts, TablePlanner
from oserve.control.starts import StartTimes
from oserve.core import OServeError, ReplicaShape, ReplicaSpec
from oserve.perf import ShapePerformance
from oserve.perf.corrected import Speeds, corrected
from oserve.plan.planning import PlanRequest, request_table

_AS_MEASURED = Speeds()


def planner_for(
    question: PlanRequest, starts: StartTimes, legs: Legs | None = None
) -> TablePlanner:
    """The controller's planner: it computes the performance table once, for any rates."""
    demand = question.demand
    kinds = {device.id: device.kind for device in question.devices}

    def rows(
        shapes: Sequence[ReplicaShape], speeds: Speeds = _AS_MEASURED
    ) -> tuple[ShapePerformance, ...]:
        source = corrected(question.source, speeds)
        return request_table(replace(question, source=source, shapes=tuple(shapes)))

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

    return TablePlanner(
        PlannerFacts(
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
    )
