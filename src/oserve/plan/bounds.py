"""Linear bounds on scores, used to find the best of a set of deployments.

The duals of one lower-level solve bound the score of *every* deployment: for prices p >= 0 of the
types with sum(p * demand) = 1, the scale is at most the sum over replicas of max_j p_j * capacity_j
(linear programming duality). The search therefore solves the most promising deployment, adds its
bound, prunes every deployment that can no longer win, and repeats. The result equals that of
solving them all.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oserve.plan.assign import Assigner
from oserve.plan.problem import AmongEquals, Maximise, PlanProblem, ReplicaCounts
from oserve.plan.programme import Vector
from oserve.plan.score import EQUAL, PlanScore, compare, criteria

CountMatrix = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCounts:
    """A deployment with its score."""

    counts: ReplicaCounts
    score: PlanScore


class Bounds:
    """The linear bounds of one problem; each solve adds one."""

    def __init__(self, problem: PlanProblem, assigner: Assigner) -> None:
        self._problem = problem
        self._assigner = assigner
        width = len(problem.options)
        self._worth: dict[bool, Vector] = {True: np.zeros((0, width)), False: np.zeros((0, width))}
        self._constant: dict[bool, Vector] = {True: np.zeros(0), False: np.zeros(0)}
        self._devices = np.array([option.shape.device_count for option in problem.options])
        self._power = np.array([option.power_w for option in problem.options])
        self._have = np.array(problem.kept_counts)

    def solve(self, counts: ReplicaCounts) -> ScoredCounts:
        """Score one deployment and add the bound from its duals."""
        score, bound, scale = self._assigner.score_and_bound(counts)
        self._worth[scale] = np.vstack([self._worth[scale], bound.worth])
        self._constant[scale] = np.append(self._constant[scale], bound.constant)
        return ScoredCounts(counts=counts, score=score)

    def best_of(
        self, deployments: CountMatrix, incumbent: ScoredCounts | None = None
    ) -> ScoredCounts | None:
        """The best of the rows of ``deployments`` and the incumbent; ``None`` if there is none.

        Returns the same object if no deployment beats the incumbent.
        """
        best = incumbent
        left = deployments
        limits = self._limits(left, 0, 0)
        while len(left):
            seen = {kind: len(self._constant[kind]) for kind in (True, False)}
            pick = self._most_promising(limits)
            found = self.solve(tuple(int(count) for count in left[pick]))
            if best is None or compare(self._problem, found.score, best.score) > 0:
                best = found
            newer = self._limits(left, seen[True], seen[False])
            np.minimum(limits[:, :2], newer[:, :2], out=limits[:, :2])
            keep = self._may_beat(limits, best)
            keep[pick] = False
            left, limits = left[keep], limits[keep]
        return best

    def _limits(self, deployments: CountMatrix, first_scale: int, first_served: int) -> Vector:
        """Per deployment: bounds on the share served and the scale, negated size, and kept."""
        shape = len(deployments)
        scale = np.full(shape, math.inf)
        share = np.ones(shape)
        for worth in self._worth[True][first_scale:]:
            np.minimum(scale, deployments @ worth, out=scale)
        served = zip(
            self._constant[False][first_served:], self._worth[False][first_served:], strict=True
        )
        for constant, worth in served:
            limit = (constant + deployments @ worth) / self._problem.demand_rps
            np.minimum(share, limit, out=share)
        if self._problem.among_equals is AmongEquals.FEWEST_DEVICES:
            size = deployments @ self._devices
        else:
            size = deployments @ self._power
        kept = np.minimum(deployments, self._have).sum(axis=1)
        return np.column_stack([share, scale, -size, kept])

    def _criteria(self, limits: Vector) -> list[Vector]:
        """The vectorised, optimistic counterpart of ``score.criteria``."""
        columns = [limits[:, 0]]
        if self._problem.maximise is Maximise.CAPACITY:
            scale = np.where(limits[:, 1] >= 1 - EQUAL, limits[:, 1], 0.0)
            columns.append(np.minimum(scale, self._problem.enough_scale or math.inf))
        return [*columns, limits[:, 2], limits[:, 3]]

    def _may_beat(self, limits: Vector, best: ScoredCounts) -> NDArray[np.bool_]:
        beats = np.zeros(len(limits), dtype=bool)
        level = np.ones(len(limits), dtype=bool)
        wanted = criteria(self._problem, best.score)
        for column, value in zip(self._criteria(limits), wanted, strict=True):
            margin = EQUAL * np.maximum(np.minimum(np.abs(column), 1e300), abs(value))
            beats |= level & (column > value + margin)
            level &= np.abs(column - value) <= margin
        return beats

    def _most_promising(self, limits: Vector) -> int:
        rows = np.arange(len(limits))
        for column in self._criteria(limits):
            values = column[rows]
            rows = rows[values >= values.max()]
        return int(rows[0])
