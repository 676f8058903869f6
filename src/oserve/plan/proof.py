"""The result of a search: a deployment and its optimality gap."""

from dataclasses import dataclass
from math import inf

from oserve.plan.bounds import ScoredCounts
from oserve.plan.problem import Maximise, PlanProblem
from oserve.plan.score import EQUAL, PlanScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """A deployment with its optimality gap.

    ``bound`` is an upper bound for every deployment: a scale if ``bounds_scale``, else a rate
    served. ``optimality_gap`` is (bound - achieved) / bound, 0 once proved (within 1e-6).
    """

    best: ScoredCounts
    bound: float
    bounds_scale: bool
    optimality_gap: float


def optimal(problem: PlanProblem, best: ScoredCounts) -> Proved:
    """A deployment known to be the best, as its own bound."""
    by_scale = problem.maximise is Maximise.CAPACITY and best.score.scale >= 1 - EQUAL
    bound = achieved_value(problem, best.score, by_scale=by_scale)
    return judged(problem, best, bound, by_scale=by_scale)


def achieved_value(problem: PlanProblem, score: PlanScore, *, by_scale: bool) -> float:
    """The objective: the scale of the demand (up to ``enough_scale``) or the rate served."""
    if not by_scale:
        return score.served_rps
    enough = problem.enough_scale
    return score.scale if enough is None else min(score.scale, enough)


def judged(problem: PlanProblem, best: ScoredCounts, bound: float, *, by_scale: bool) -> Proved:
    """A deployment with its gap to the bound."""
    achieved = achieved_value(problem, best.score, by_scale=by_scale)
    bound = max(bound, achieved)
    gap = (bound - achieved) / bound if 0 < bound < inf else float(bound > 0)
    return Proved(
        best=best,
        bound=bound,
        bounds_scale=by_scale,
        optimality_gap=0.0 if gap <= EQUAL else gap,
    )
