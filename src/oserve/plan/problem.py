"""The planning problem: devices, demand, the capacities of replica shapes, and the objective.

Rates and capacities are in requests per second. A deployment is a tuple of counts, one per entry of
``options``, since identical replicas are interchangeable.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from oserve.core import DeploymentPlan, Device, OServeError, WorkloadType
from oserve.perf import ShapePerformance
from oserve.plan.packing import Packing

ReplicaCounts = tuple[int, ...]


class Maximise(StrEnum):
    """The objective of a deployment.

    ``CAPACITY``: first the rate served within the demand; once all of it fits, the largest common
    scale of the demand that still fits. ``THROUGHPUT``: only the rate served within the demand, as
    in the paper, section 3.
    """

    CAPACITY = "capacity"
    THROUGHPUT = "throughput"


class AmongEquals(StrEnum):
    """The tie-break between deployments that serve equally well."""

    FEWEST_DEVICES = "fewest_devices"
    LEAST_ENERGY = "least_energy"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProblem:
    """The input of a search.

    ``options`` are the candidate replica shapes with their capacities, in the order of ``types``;
    ``shape.device_kind`` names the kind of device ("any" stands for the only kind). Headroom beyond
    ``enough_scale`` (at least 1; ``None``: no limit) times the demand has no value. Deployments of
    fewer than ``min_shapes`` distinct shapes (by name) are not eligible, nor those with fewer than
    ``min_replicas`` for some type with traffic (1: no condition). ``current`` is the plan in force:
    among equals the deployment that keeps most of its replicas wins.
    """

    devices: tuple[Device, ...]
    types: tuple[WorkloadType, ...]
    options: tuple[ShapePerformance, ...]
    tensor_parallel_across_nodes: bool = False
    maximise: Maximise = Maximise.CAPACITY
    enough_scale: float | None = None
    among_equals: AmongEquals = AmongEquals.FEWEST_DEVICES
    current: DeploymentPlan | None = None
    min_shapes: int = 1
    min_replicas: int = 1

    @property
    def demand_rps(self) -> float:
        """Total requests per second."""
        return sum(kind.arrival_rate_rps for kind in self.types)

    @property
    def packing(self) -> Packing:
        """The packing of the options on the devices (built on each call)."""
        return Packing(
            self.devices,
            [option.shape for option in self.options],
            tensor_parallel_across_nodes=self.tensor_parallel_across_nodes,
        )

    @property
    def kept_counts(self) -> ReplicaCounts:
        """The current plan's replicas of each option on devices of this cluster."""
        if self.current is None:
            return (0,) * len(self.options)
        known = {device.id for device in self.devices}
        have = Counter(
            spec.shape
            for spec in self.current.replicas
            if spec.devices and known.issuperset(spec.devices)
        )
        return tuple(have[option.shape] for option in self.options)

    def is_eligible(self, counts: ReplicaCounts) -> bool:
        """Whether a deployment meets ``min_shapes`` and ``min_replicas``."""
        return self.is_varied(counts) and self.is_redundant(counts)

    def is_redundant(self, counts: ReplicaCounts) -> bool:
        """Whether each type with traffic has at least ``min_replicas`` that can serve it."""
        return self.min_replicas == 1 or all(
            sum(
                count
                for option, count in zip(self.options, counts, strict=True)
                if option.capacity_rps[j] > 0
            )
            >= self.min_replicas
            for j, kind in enumerate(self.types)
            if kind.arrival_rate_rps > 0
        )

    def is_varied(self, counts: ReplicaCounts) -> bool:
        """Whether a deployment has at least ``min_shapes`` distinct shapes that serve."""
        if self.min_shapes == 1:
            return True
        active = [j for j, kind in enumerate(self.types) if kind.arrival_rate_rps > 0]
        names = {
            option.shape.name
            for option, count in zip(self.options, counts, strict=True)
            if count and any(option.capacity_rps[j] > 0 for j in active)
        }
        return len(names) >= self.min_shapes


def check_problem(problem: PlanProblem) -> None:
    """Raise OServeError for the first inconsistency of the problem."""
    if not problem.devices:
        raise OServeError(
            "this is an empty cluster", place="plan.devices", remedy="give at least one device"
        )
    _check_unique([device.id for device in problem.devices], "device", "plan.devices")
    _check_types(problem.types)
    if not problem.options:
        raise OServeError(
            "there are no replica shapes to choose from",
            place="plan.options",
            remedy="give shapes with their capacities",
        )
    names = [str(option.shape) for option in problem.options]
    _check_unique(names, "replica shape", "plan.options")
    for index, option in enumerate(problem.options):
        _check_option(option, len(problem.types), f"plan.options[{index}]")
    if problem.min_shapes < 1:
        raise OServeError(
            f"min_shapes is {problem.min_shapes}", place="plan.min_shapes", remedy="give at least 1"
        )
    if problem.min_replicas < 1:
        raise OServeError(
            f"min_replicas is {problem.min_replicas}",
            place="plan.min_replicas",
            remedy="give at least 1",
        )
    enough = problem.enough_scale
    if enough is not None and not (math.isfinite(enough) and enough >= 1):
        raise OServeError(
            f"enough_scale is {enough}",
            place="plan.enough_scale",
            remedy="give a number of at least 1, or none",
        )
    _check_fit(problem)


def _check_types(types: Sequence[WorkloadType]) -> None:
    if not types:
        raise OServeError(
            "there are no workload types", place="plan.types", remedy="give at least one type"
        )
    _check_unique([kind.name for kind in types], "workload type", "plan.types")
    for index, kind in enumerate(types):
        rate = kind.arrival_rate_rps
        if not math.isfinite(rate) or rate < 0:
            raise OServeError(
                f"workload type {kind.name!r} arrives at {rate} requests per second",
                place=f"plan.types[{index}].arrival_rate_rps",
                remedy="give a finite rate of at least 0",
            )
    if sum(kind.arrival_rate_rps for kind in types) <= 0:
        raise OServeError(
            "there is zero traffic: every arrival rate is 0",
            place="plan.types",
            remedy="give at least one type a rate above 0",
        )


def _check_option(option: ShapePerformance, type_count: int, place: str) -> None:
    for field, values in (
        ("capacity_rps", option.capacity_rps),
        ("latency_s", option.latency_s),
    ):
        if len(values) != type_count:
            raise OServeError(
                f"{option.shape.name} has {len(values)} values for {type_count} workload types",
                place=f"{place}.{field}",
                remedy="give one value per type",
            )
    for capacity, latency in zip(option.capacity_rps, option.latency_s, strict=True):
        if not math.isfinite(capacity) or capacity < 0:
            raise OServeError(
                f"{option.shape.name} has a capacity of {capacity} requests per second",
                place=f"{place}.capacity_rps",
                remedy="give finite capacities of at least 0",
            )
        if capacity > 0 and not (math.isfinite(latency) and latency >= 0):
            raise OServeError(
                f"{option.shape.name} has a latency of {latency} s for a type it can serve",
                place=f"{place}.latency_s",
                remedy="give finite latencies of at least 0",
            )
    if not math.isfinite(option.power_w) or option.power_w < 0:
        raise OServeError(
            f"{option.shape.name} draws {option.power_w} W",
            place=f"{place}.power_w",
            remedy="give a finite power of at least 0",
        )


def _check_fit(problem: PlanProblem) -> None:
    packing = problem.packing
    fitting = [option for index, option in enumerate(problem.options) if packing.largest(index) > 0]
    if not fitting:
        shapes = ", ".join(
            sorted({f"{o.shape.name} on {o.shape.device_kind}" for o in problem.options})[:6]
        )
        raise OServeError(
            f"none of the replica shapes fits on {packing.describe()}: {shapes}",
            place="plan.options",
            remedy="give smaller shapes, or more devices per node",
        )
    for column, kind in enumerate(problem.types):
        if kind.arrival_rate_rps > 0 and not any(o.capacity_rps[column] > 0 for o in fitting):
            raise OServeError(
                f"no replica shape that fits can serve workload type {kind.name!r}",
                place=f"plan.types[{column}]",
                remedy="loosen its SLO, or give shapes with more memory or more devices",
            )


def _check_unique(names: Sequence[str], what: str, place: str) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise OServeError(f"the {what} {name} stands {count} times", place=place, remedy="keep one")
