"""The search for the best deployment of a problem, with runners-up and baselines.

One function offers three searches: exact (a mixed-integer programme), flow (the paper's search) and
brute (enumeration). The optimum is that of a linear model, so it bounds a real or simulated
cluster; candidates and homogeneous deployments serve to be scored again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations_with_replacement

import numpy as np

from oserve.core import OServeError
from oserve.plan.assign import Assigner, Assignment
from oserve.plan.bounds import ScoredCounts
from oserve.plan.brute import brute_force
from oserve.plan.dominance import undominated
from oserve.plan.exact import ExactSearch
from oserve.plan.guided import guided_search
from oserve.plan.homogeneous import homogeneous_deployments
from oserve.plan.problem import PlanProblem, ReplicaCounts, check_problem
from oserve.plan.proof import Proved, optimal
from oserve.plan.score import PlanScore, best_first
from oserve.plan.tier_pools import pooled

# Limits of the search for alternatives: solves with an option forbidden or reduced, the seconds and
# the final gap of each, and the neighbours that are scored.
_RESOLVES = 8
_RESOLVE_SECONDS = 1.0
_RESOLVE_GAP = 1e-3
_NEIGHBOURS = 100


class Search(StrEnum):
    """The search algorithm."""

    EXACT = "exact"
    FLOW = "flow"
    BRUTE = "brute"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentCandidate:
    """Counts of the problem's options with their score and assignment."""

    counts: ReplicaCounts
    score: PlanScore
    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The result of a search.

    ``bound`` is the upper bound in the linear model: a scale of the demand if ``bounds_scale``,
    else a served rate in requests per second. ``optimality_gap`` is (bound - achieved) / bound, 0
    if the optimum is proved.

    ``candidates`` are the next-best distinct deployments found, best first: optima with one used
    option forbidden or reduced by one, and the neighbours of the best at one exchange of replicas.
    They are good alternatives to score again, but not proved to be the k best. With several tiers
    half of them have one shape for some tiers and one for the others (see ``tier_pools``), in the
    order of that module. ``homogeneous`` are the baselines, best first (see ``homogeneous``).
    """

    search: Search
    best: DeploymentCandidate
    bound: float
    bounds_scale: bool
    optimality_gap: float
    candidates: tuple[DeploymentCandidate, ...]
    homogeneous: tuple[DeploymentCandidate, ...]


def plan_deployment(
    problem: PlanProblem,
    search: Search = Search.EXACT,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    candidates: int = 10,
) -> Planned:
    """The best deployment that the search finds, with alternatives and baselines.

    ``time_limit_s`` bounds the exact search (in seconds of the solver's clock); ``seed`` varies the
    flow-guided one. If no deployment has ``min_shapes`` shapes and ``min_replicas`` replicas, the
    best is the empty one, which serves nothing. Raises OServeError for an inconsistent problem
    (see ``check_problem``).
    """
    check_problem(problem)
    if max(problem.min_shapes, problem.min_replicas) > 1 and search is Search.FLOW:
        raise OServeError(
            "the flow-guided search cannot be held to several shapes or replicas",
            place="plan.search",
            remedy="use the exact search",
        )
    assigner = Assigner(problem)
    exact = ExactSearch(problem, assigner, time_limit_s=time_limit_s)
    baselines = homogeneous_deployments(problem, assigner)
    found = _SEARCHES[search](
        _Task(problem=problem, assigner=assigner, exact=exact, baselines=baselines, seed=seed)
    )
    others = _alternatives(problem, assigner, found.best, candidates)

    def whole(scored: ScoredCounts) -> DeploymentCandidate:
        return DeploymentCandidate(
            counts=scored.counts, score=scored.score, assignment=assigner.assign(scored.counts)
        )

    return Planned(
        search=search,
        best=whole(found.best),
        bound=found.bound,
        bounds_scale=found.bounds_scale,
        optimality_gap=found.optimality_gap,
        candidates=tuple(whole(scored) for scored in others),
        homogeneous=tuple(whole(scored) for scored in baselines),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    problem: PlanProblem
    assigner: Assigner
    exact: ExactSearch
    baselines: Sequence[ScoredCounts]
    seed: int


def _exact(task: _Task) -> Proved:
    first = task.baselines[0]
    return task.exact.solve(first=first if task.problem.is_eligible(first.counts) else None)


def _flow(task: _Task) -> Proved:
    best = guided_search(task.problem, task.assigner, seed=task.seed, start=task.baselines[0])
    return task.exact.judge(best)


def _brute(task: _Task) -> Proved:
    return optimal(task.problem, brute_force(task.problem, task.assigner))


_SEARCHES: Mapping[Search, Callable[[_Task], Proved]] = {
    Search.EXACT: _exact,
    Search.FLOW: _flow,
    Search.BRUTE: _brute,
}


def _alternatives(
    problem: PlanProblem, assigner: Assigner, best: ScoredCounts, most: int
) -> list[ScoredCounts]:
    """See ``Planned.candidates``."""
    if not most:
        return []
    pools = [
        ScoredCounts(counts=counts, score=assigner.score(counts))
        for counts in pooled(problem, most // 2)
        if problem.is_eligible(counts) and counts != best.counts
    ]
    near = _candidates(problem, assigner, best, most - len(pools))
    known = {item.counts for item in near}
    return [*near, *(item for item in pools if item.counts not in known)]


def _candidates(
    problem: PlanProblem, assigner: Assigner, best: ScoredCounts, most: int
) -> list[ScoredCounts]:
    """The next-best deployments found around the best one, best first, at most ``most``."""
    found: dict[ReplicaCounts, ScoredCounts] = {}
    used = [i for i, count in enumerate(best.counts) if count]
    limits = [{i: 0} for i in used]
    limits += [{i: best.counts[i] - 1} for i in used if best.counts[i] > 1]
    for at_most in limits[:_RESOLVES]:
        limited = ExactSearch(
            problem,
            assigner,
            time_limit_s=_RESOLVE_SECONDS,
            at_most=at_most,
            relative_gap=_RESOLVE_GAP,
        )
        proved = limited.solve(break_ties=False)
        found[proved.best.counts] = proved.best
    for counts in neighbours(problem, assigner, best.counts):
        if counts not in found:
            found[counts] = ScoredCounts(counts=counts, score=assigner.score(counts))
    found.pop(best.counts, None)
    found = {counts: scored for counts, scored in found.items() if problem.is_eligible(counts)}
    return best_first(problem, list(found.values()), lambda scored: scored.score)[:most]


def neighbours(
    problem: PlanProblem, assigner: Assigner, counts: ReplicaCounts
) -> list[ReplicaCounts]:
    """Neighbours of ``counts``: one or two replicas exchanged for another option, to capacity.

    Returns the most promising by the marginal worth of the options.
    """
    packing = problem.packing
    used = [i for i, count in enumerate(counts) if count]
    removals: list[tuple[int, ...]] = [(), *[(i,) for i in used]]
    removals += list(combinations_with_replacement(used, 2))
    options = undominated(problem)
    found: set[ReplicaCounts] = set()
    for removed in removals:
        base = list(counts)
        for i in removed:
            base[i] -= 1
        if min(base) < 0:
            continue
        for added in options:
            changed = list(base)
            while True:
                changed[added] += 1
                if not packing.fits(changed):
                    break
            changed[added] -= 1
            found.add(tuple(changed))
    found.discard(counts)
    _, bound, _ = assigner.score_and_bound(counts)
    return sorted(found, key=lambda other: (-float(bound.worth @ np.array(other)), other))[
        :_NEIGHBOURS
    ]
