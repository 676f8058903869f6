"""Choosing by a second opinion: candidates and homogeneous deployments scored again.

The linear model errs by more on some shapes than a heterogeneous deployment gains (see
``search``), so its ranking decides only what is looked at. What scores is passed in: a simulator,
or measurements. Pure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oserve.plan.problem import Counts, PlanProblem
from oserve.plan.search import Deployment, Planned

MIN_GAIN = 0.03
"""What different replicas must gain over the best homogeneous deployment to be preferred."""

# Of the homogeneous deployments of one tensor and pipeline parallel size and precision, so many of
# the linear model's best are scored; the others differ in chunk budget and sequences only.
PER_FORM = 3

Score = Callable[[Deployment], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """A deployment with its score, a scale of the demand; ``predicted`` is the linear model's."""

    deployment: Deployment
    scale: float
    homogeneous: bool

    @property
    def predicted(self) -> float:
        """The scale in the linear model."""
        return self.deployment.score.scale

    @property
    def error(self) -> float:
        """Of the linear model: 0.1 means that it promised 10 % too much; infinite where all."""
        return self.predicted / self.scale - 1.0 if self.scale > 0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The choice, what else was scored (best first), and how many homogeneous were left out."""

    chosen: Rescored
    best_homogeneous: Rescored
    scored: tuple[Rescored, ...]
    min_gain: float
    left_out: int

    @property
    def gain(self) -> float:
        """Of the best of all over the best homogeneous one: 1.1 is 10 %."""
        best, base = self.scored[0].scale, self.best_homogeneous.scale
        return best / base if base > 0 else float("inf")


def verify(
    problem: PlanProblem,
    planned: Planned,
    score: Score,
    *,
    min_gain: float = MIN_GAIN,
    per_form: int = PER_FORM,
) -> Verified:
    """Score the best candidates and homogeneous deployments again, and choose.

    The best homogeneous one is taken unless another gains ``min_gain`` over it.
    """
    homogeneous = _of_each_form(problem, planned.homogeneous, per_form)
    baselines = {item.counts for item in planned.homogeneous}
    scored: dict[Counts, Rescored] = {}
    for item in (*homogeneous, planned.best, *planned.candidates):
        if item.counts not in scored:
            scored[item.counts] = Rescored(
                deployment=item, scale=score(item), homogeneous=item.counts in baselines
            )
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


def _of_each_form(
    problem: PlanProblem, homogeneous: Sequence[Deployment], most: int
) -> list[Deployment]:
    """The first ``most`` of each form, in the order given (best first)."""
    kept: dict[tuple[tuple[int, int, str], ...], list[Deployment]] = {}
    for item in homogeneous:
        shapes = [
            option.shape
            for option, count in zip(problem.options, item.counts, strict=True)
            if count
        ]
        form = tuple(
            (shape.tensor_parallel_size, shape.pipeline_parallel_size, str(shape.precision))
            for shape in shapes
        )
        found = kept.setdefault(form, [])
        if len(found) < most:
            found.append(item)
    return [item for found in kept.values() for item in found]
