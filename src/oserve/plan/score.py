"""The score of a deployment, and the order of scores.

Scores come from floating-point optimisation, so values within ``EQUAL`` (relative) count as equal
and the next criterion decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import TypeVar

from oserve.plan.problem import AmongEquals, Maximise, PlanProblem

EQUAL = 1e-6

Ranked = TypeVar("Ranked")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanScore:
    """The score of one deployment.

    ``served_rps`` is the largest rate that it serves within the demand; ``scale`` the largest
    multiple of the demand, mix unchanged, that fits (1 or more: all is served). ``power_w`` is the
    power of all its replicas; ``kept`` counts the replicas of the current plan that it keeps.
    """

    served_rps: float
    scale: float
    device_count: int
    power_w: float
    kept: int


def criteria(problem: PlanProblem, score: PlanScore) -> tuple[float, ...]:
    """The criteria of the score in lexicographic order; larger is better.

    CAPACITY: the share of the demand served; then the scale, which counts only once all is served
    and only up to ``enough_scale``. THROUGHPUT: the share served. Then, for both, devices or power
    (by ``among_equals``) and the replicas kept.
    """
    values = [score.served_rps / problem.demand_rps]
    if problem.maximise is Maximise.CAPACITY:
        scale = score.scale if score.scale >= 1 - EQUAL else 0.0
        values.append(scale if problem.enough_scale is None else min(scale, problem.enough_scale))
    if problem.among_equals is AmongEquals.FEWEST_DEVICES:
        values.append(-float(score.device_count))
    else:
        values.append(-score.power_w)
    values.append(float(score.kept))
    return tuple(values)


def compare(problem: PlanProblem, one: PlanScore, other: PlanScore) -> int:
    """1 if ``one`` is better, -1 if ``other`` is, 0 if they are equal."""
    for a, b in zip(criteria(problem, one), criteria(problem, other), strict=True):
        if abs(a - b) > EQUAL * max(abs(a), abs(b)):
            return 1 if a > b else -1
    return 0


def best_first(
    problem: PlanProblem, items: Sequence[Ranked], score_of: Callable[[Ranked], PlanScore]
) -> list[Ranked]:
    """The items, best score first; equals keep their order."""

    def order(one: Ranked, other: Ranked) -> int:
        return compare(problem, score_of(other), score_of(one))

    return sorted(items, key=cmp_to_key(order))
