"""Deployments of one shape for the tightest tiers and one for the others: simple alternatives.

The linear model knows neither bursts nor queues, and so likes many small shapes, each just right
for one type. A few large replicas of one shape often hold more. Such deployments are not best in
the linear model, but worth a simulation.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from oserve.core import ReplicaShape
from oserve.plan.problem import PlanProblem, ReplicaCounts

# Of each part of the tiers, so many shapes per device are combined.
_SHAPES = 4


def pooled(problem: PlanProblem, most: int) -> list[ReplicaCounts]:
    """The counts of such deployments, best first, at most ``most``; none without two tiers.

    Each is as good as the poorer of its two parts, with their own tiers alone. Tiers go from the
    one that the fewest options can serve to the one that most can.
    """
    active = [j for j, kind in enumerate(problem.types) if kind.arrival_rate_rps > 0]
    tiers = list(dict.fromkeys(problem.types[j].tier for j in active))
    groups = {tier: [j for j in active if problem.types[j].tier == tier] for tier in tiers}
    tiers.sort(key=lambda tier: sum(_scale(problem, i, groups[tier]) > 0 for i in _all(problem)))
    found: dict[ReplicaCounts, float] = {}
    for cut in range(1, len(tiers)):
        first = [j for tier in tiers[:cut] for j in groups[tier]]
        second = [j for tier in tiers[cut:] for j in groups[tier]]
        for counts, scale in _splits(problem, first, second):
            found[counts] = max(scale, found.get(counts, 0.0))
    return sorted(found, key=lambda counts: (-found[counts], counts))[:most]


def _all(problem: PlanProblem) -> range:
    return range(len(problem.options))


def _scale(problem: PlanProblem, option: int, types: Sequence[int]) -> float:
    """The multiple of the demand of these types that one replica serves."""
    capacity = problem.options[option].capacity_rps
    if any(capacity[j] <= 0 for j in types):
        return 0.0
    busy = math.fsum(problem.types[j].arrival_rate_rps / capacity[j] for j in types)
    return 1.0 / busy if busy > 0 else 0.0


def _best(problem: PlanProblem, types: Sequence[int]) -> list[int]:
    """The options that serve these types with the fewest devices, one of each form."""
    kept: dict[ReplicaShape, int] = {}

    def per_device(option: int) -> float:
        devices = problem.options[option].shape.device_count
        return _scale(problem, option, types) / devices

    for option in sorted(_all(problem), key=lambda option: (-per_device(option), option)):
        if per_device(option) > 0:
            kept.setdefault(_form(problem.options[option].shape), option)
    return list(kept.values())[:_SHAPES]


def _form(shape: ReplicaShape) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=shape.tensor_parallel_size,
        pipeline_parallel_size=shape.pipeline_parallel_size,
        precision=shape.precision,
        device_kind=shape.device_kind,
    )


def _splits(
    problem: PlanProblem, first: Sequence[int], second: Sequence[int]
) -> Iterator[tuple[ReplicaCounts, float]]:
    """All ways to give the devices to one option each, and how good they are."""
    packing = problem.packing
    for one, other in product(_best(problem, first), _best(problem, second)):
        if one == other:
            continue
        counts = [0] * len(problem.options)
        while True:
            counts[one] += 1
            counts[other] = 0
            if not packing.fits(counts):
                break
            while packing.fits(counts):
                counts[other] += 1
            counts[other] -= 1
            if not counts[other]:
                break
            scale = min(
                counts[one] * _scale(problem, one, first),
                counts[other] * _scale(problem, other, second),
            )
            yield tuple(counts), scale
