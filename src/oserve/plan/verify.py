"""Verification of a plan: candidates and homogeneous deployments, scored again.

On some shapes the linear model errs by more than a heterogeneous deployment gains (see
``search``), so its ranking only selects the candidates. The caller passes in the scorer, a
simulator or measurements. Pure.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from oserve.core import ReplicaShape
from oserve.plan.assign import Assigner
from oserve.plan.problem import PlanProblem, ReplicaCounts
from oserve.plan.search import DeploymentCandidate, Planned, neighbours

MIN_GAIN = 0.03
"""The gain over the best homogeneous deployment from which a heterogeneous one is preferred."""

DeploymentScorer = Callable[[DeploymentCandidate], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """A deployment with its score, a scale of the demand; ``predicted`` is the linear model's."""

    deployment: DeploymentCandidate
    scale: float
    homogeneous: bool

    @property
    def predicted(self) -> float:
        """The scale in the linear model."""
        return self.deployment.score.scale

    @property
    def error(self) -> float:
        """The relative error of the linear model: 0.1 is 10 % too much; infinite at scale 0."""
        return self.predicted / self.scale - 1.0 if self.scale > 0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The choice, all scored deployments (best first), and the homogeneous ones left out."""

    chosen: Rescored
    best_homogeneous: Rescored
    scored: tuple[Rescored, ...]
    min_gain: float
    left_out: int

    @property
    def gain(self) -> float:
        """The best deployment's scale over the best homogeneous one's: 1.1 is a gain of 10 %."""
        best, base = self.scored[0].scale, self.best_homogeneous.scale
        return best / base if base > 0 else float("inf")


def verify(
    problem: PlanProblem,
    planned: Planned,
    score: DeploymentScorer,
    *,
    min_gain: float = MIN_GAIN,
    more: int = 0,
) -> Verified:
    """Score the candidates and homogeneous deployments again, and choose.

    Of homogeneous deployments that differ only in ``max_num_seqs``, it scores the linear model's
    best. ``more``: then it climbs from the best by so many further scores (see ``climb``). It
    chooses the best homogeneous one unless another gains ``min_gain`` over it.
    """
    homogeneous = _of_each_form(problem, planned.homogeneous)
    baselines = {item.counts for item in planned.homogeneous}
    scored: dict[ReplicaCounts, Rescored] = {}
    for item in (*homogeneous, planned.best, *planned.candidates):
        if item.counts not in scored:
            scored[item.counts] = Rescored(
                deployment=item, scale=score(item), homogeneous=item.counts in baselines
            )
    start = max(scored.values(), key=lambda item: item.scale)
    for other in climb(problem, start.deployment, start.scale, score, known=scored, most=more):
        scored[other.deployment.counts] = other
    ranked = sorted(scored.values(), key=lambda item: (-item.scale, item.deployment.counts))
    base = next(item for item in ranked if item.homogeneous)
    best = ranked[0]
    chosen = best if best.scale > base.scale * (1.0 + min_gain) else base
    return Verified(
        chosen=chosen,
        best_homogeneous=base,
        scored=tuple(ranked),
        min_gain=min_gain,
        left_out=len(planned.homogeneous) - len(homogeneous),
    )


def climb(
    problem: PlanProblem,
    start: DeploymentCandidate,
    scale: float,
    score: DeploymentScorer,
    *,
    known: Container[ReplicaCounts] = (),
    most: int,
) -> list[Rescored]:
    """Neighbours of a deployment, scored: at most ``most``, without those ``known``.

    They come in the order of the linear model's worth. The first that is better becomes the one
    whose neighbours are tried.
    """
    if most <= 0:
        return []
    assigner = Assigner(problem)
    found: dict[ReplicaCounts, Rescored] = {}
    counts = start.counts
    while True:
        better = False
        for other in neighbours(problem, assigner, counts):
            if other in found or other in known or not problem.is_eligible(other):
                continue
            if len(found) >= most:
                break
            item = DeploymentCandidate(
                counts=other, score=assigner.score(other), assignment=assigner.assign(other)
            )
            found[other] = Rescored(deployment=item, scale=score(item), homogeneous=False)
            if found[other].scale > scale:
                counts, scale, better = other, found[other].scale, True
                break
        if not better:
            return list(found.values())


def _of_each_form(
    problem: PlanProblem, homogeneous: Sequence[DeploymentCandidate]
) -> list[DeploymentCandidate]:
    """The first of each group that differs only in ``max_num_seqs``, in order (best first)."""
    kept: dict[tuple[ReplicaShape, ...], DeploymentCandidate] = {}
    for item in homogeneous:
        form = tuple(
            replace(option.shape, max_num_seqs=0)
            for option, count in zip(problem.options, item.counts, strict=True)
            if count
        )
        kept.setdefault(form, item)
    return list(kept.values())
