"""The score of a deployment: what it is worth, and which of two is worth more.

Scores come from floating-point optimisation, so values within ``EQUAL`` (relative) count as equal
and the next criterion decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import TypeVar

from oserve.plan.problem import AmongEquals, Objective, PlanProblem

EQUAL = 1e-6

Ranked = TypeVar("Ranked")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanScore:
    """What one deployment achieves.

    ``served_rps`` is the most requests per second it serves within the demand; ``scale`` the
    largest multiple of the whole demand, mix unchanged, that fits (1 or more: all is served).
    ``power_w`` is drawn by all its replicas; ``kept`` counts the replicas of the current plan whose
    shape it keeps.
    """

    served_rps: float
    scale: float
    device_count: int
    power_w: float
    kept: int


def criteria(problem: PlanProblem, score: PlanScore) -> tuple[float, ...]:
    """The score as numbers to compare one after the other, each the larger the better.

    CAPACITY: the share of the demand served; then the scale, which counts only once all is served
    and only up to ``enough_scale``. THROUGHPUT: the share served. Then, for both, devices or power
    (as told by ``among_equals``) and closeness to the current plan.
    """
    values = [score.served_rps / problem.demand_rps]
    if problem.objective is Objective.CAPACITY:
        scale = score.scale if score.scale >= 1 - EQUAL else 0.0
        values.append(scale if problem.enough_scale is None else min(scale, problem.enough_scale))
    if problem.among_equals is AmongEquals.FEWEST_DEVICES:
        values.append(-float(score.device_count))
    else:
        values.append(-score.power_w)
    values.append(float(score.kept))
    return tuple(values)


def compare(problem: PlanProblem, one: PlanScore, other: PlanScore) -> int:
    """1 if ``one`` is better, -1 if ``other`` is, 0 if they are worth the same."""
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
