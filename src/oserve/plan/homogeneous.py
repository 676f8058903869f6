"""Homogeneous deployments: N replicas of one shape, the common practice and the baseline.

In a cluster of several device kinds no shape runs everywhere, so a deployment has one shape per
kind. To bound the combinations, only the best shape per kind of each (tensor parallel size,
pipeline parallel size, precision) takes part, and at most as many per kind as keep the combinations
under ``MOST_COMBINATIONS``.
"""

from collections.abc import Sequence
from itertools import product

from oserve.plan.assign import Assigner
from oserve.plan.bounds import ScoredCounts
from oserve.plan.problem import PlanProblem, ReplicaCounts
from oserve.plan.score import best_first

MOST_COMBINATIONS = 64


def homogeneous_deployments(problem: PlanProblem, assigner: Assigner) -> list[ScoredCounts]:
    """Deployments of as many replicas as fit of one option (per device kind), best first.

    Covers every option of a cluster of one kind; for several kinds see the module. Leaves out
    options of which none fits.
    """
    packing = problem.packing
    alone: dict[str, list[ScoredCounts]] = {}
    for index, kind in enumerate(packing.kinds):
        most = packing.largest(index)
        if most:
            counts = _counts(problem, {index: most})
            scored = ScoredCounts(counts=counts, score=assigner.score(counts))
            alone.setdefault(kind, []).append(scored)
    if len(alone) == 1:
        return _sorted(problem, next(iter(alone.values())))
    per_kind = [_of_each_form(problem, _sorted(problem, found)) for found in alone.values()]
    while _combinations(per_kind) > MOST_COMBINATIONS:
        max(per_kind, key=len).pop()
    together = []
    for parts in product(*per_kind):
        counts = tuple(sum(column) for column in zip(*(part.counts for part in parts), strict=True))
        together.append(ScoredCounts(counts=counts, score=assigner.score(counts)))
    return _sorted(problem, together)


def _of_each_form(problem: PlanProblem, deployments: Sequence[ScoredCounts]) -> list[ScoredCounts]:
    """The first deployment of each (tensor parallel, pipeline parallel, precision)."""
    first: dict[tuple[int, int, str], ScoredCounts] = {}
    for scored in deployments:
        index = next(i for i, count in enumerate(scored.counts) if count)
        shape = problem.options[index].shape
        form = (shape.tensor_parallel_size, shape.pipeline_parallel_size, shape.precision)
        first.setdefault(form, scored)
    return list(first.values())


def _combinations(per_kind: Sequence[Sequence[ScoredCounts]]) -> int:
    number = 1
    for found in per_kind:
        number *= len(found)
    return number


def _counts(problem: PlanProblem, some: dict[int, int]) -> ReplicaCounts:
    return tuple(some.get(index, 0) for index in range(len(problem.options)))


def _sorted(problem: PlanProblem, deployments: Sequence[ScoredCounts]) -> list[ScoredCounts]:
    return best_first(problem, deployments, lambda scored: scored.score)
