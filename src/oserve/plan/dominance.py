"""Dominated options, which an optimal deployment does not need.

``m`` copies of option B dominate option A of the same kind if they need no more devices, in
tensor-parallel groups no wider (so that they fit wherever A fits, if the widths divide each other),
draw no more power where power decides, and together serve no less of every type. Replacing A with
them then never lowers a score's served rate or scale, and never increases its devices.
"""

from collections.abc import Sequence

from oserve.perf import ShapePerformance
from oserve.plan.problem import AmongEquals, PlanProblem


def undominated(problem: PlanProblem, *, limited: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """Indices of the undominated options, ascending.

    Also drops options that fit nowhere or serve nothing. Keeps shapes of the current plan, since
    keeping them may decide among equals; of otherwise equal options it keeps the one with the lower
    latency. Options in ``limited`` dominate none, since there may be too few of them. If the
    problem asks for several shapes, only options of the same name can dominate each other.
    """
    packing = problem.packing
    active = [j for j, kind in enumerate(problem.types) if kind.arrival_rate_rps > 0]
    useful = [
        i
        for i, option in enumerate(problem.options)
        if packing.largest(i) > 0 and any(option.capacity_rps[j] > 0 for j in active)
    ]

    def slowness(i: int) -> float:
        option = problem.options[i]
        return sum(option.latency_s[j] for j in active if option.capacity_rps[j] > 0)

    # The most likely to dominate first. Dropped options need no further comparison, since dominance
    # is transitive.
    useful.sort(key=lambda i: (problem.options[i].shape.device_count, slowness(i), i))
    names = [option.shape.name for option in problem.options]
    energy = problem.among_equals is AmongEquals.LEAST_ENERGY
    have = problem.kept_counts
    kept: list[int] = []
    for i in reversed(useful):
        others = [
            k
            for k in useful
            if k != i
            and k not in limited
            and packing.kinds[k] == packing.kinds[i]
            and (problem.min_shapes == 1 or names[k] == names[i])
        ]
        if have[i] or not any(
            _dominates(problem.options[k], problem.options[i], active, energy=energy)
            for k in others
        ):
            kept.append(i)
        else:
            useful = [k for k in useful if k != i]
    return tuple(sorted(kept))


def _dominates(
    one: ShapePerformance, other: ShapePerformance, active: Sequence[int], *, energy: bool
) -> bool:
    width, wider = one.shape.tensor_parallel_size, other.shape.tensor_parallel_size
    if width > wider or wider % width:
        return False
    copies = other.shape.device_count // one.shape.device_count
    if copies == 0 or (energy and copies * one.power_w > other.power_w):
        return False
    return all(copies * one.capacity_rps[j] >= other.capacity_rps[j] for j in active)
