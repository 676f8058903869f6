"""The upper level solved to a proved optimum: a mixed-integer programme over counts of shapes.

With identical devices in a node a deployment is how many replicas there are of each shape, so the
two levels of the paper, section 3, are one programme:

    maximise s  subject to  sum over j of busy[i, j] <= count[i]                   (each option i)
                            sum over i of busy[i, j] * capacity[i, j] >= s * rate[j]  (each type j)
                            counts fit on the nodes                                   (packing)

with integer counts; if s < 1 the rate served is maximised instead. Then, with that value held, the
fewest devices or the least power, and at last the most replicas of the current plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from oserve.plan.assign import Assigner, scale_unit
from oserve.plan.bounds import Scored
from oserve.plan.dominance import undominated
from oserve.plan.problem import AmongEquals, Counts, Objective, PlanProblem
from oserve.plan.programme import Column, Outcome, Programme, Vector
from oserve.plan.score import EQUAL, compare

# What a value held from an earlier stage may lose: within EQUAL, so that it still counts as equal.
_HOLD = EQUAL / 2
_TIE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """A deployment and how far from it the optimum can be.

    ``bound`` is what no deployment can exceed: a scale where ``bounds_scale``, else a rate served.
    ``optimality_gap`` is (bound - achieved) / bound, 0 once proved (within 1e-6).
    """

    best: Scored
    bound: float
    bounds_scale: bool
    optimality_gap: float


class ExactSearch:
    """The programmes of one problem; solves them, also with limits on single counts.

    ``time_limit_s`` holds for each call of ``solve``, by HiGHS's clock; tie-breaks get a part of
    what is left, and the solution before them stands if that is not enough.
    """

    def __init__(
        self, problem: PlanProblem, assigner: Assigner, *, time_limit_s: float = 60.0
    ) -> None:
        self._problem = problem
        self._assigner = assigner
        self._time_limit_s = time_limit_s
        self._options = undominated(problem)
        self._models = {
            scale: _CountModel(problem, self._options, scale) for scale in (True, False)
        }

    def solve(
        self,
        *,
        at_most: Mapping[int, int] | None = None,
        first: Scored | None = None,
        break_ties: bool = True,
    ) -> Proved | None:
        """The best deployment with ``counts[i] <= at_most[i]`` where given.

        ``first`` is a known deployment to start from, and to fall back on when time runs out.
        ``None`` if time runs out with nothing found.
        """
        left = self._time_limit_s
        begun = self._seconds
        for model in self._models.values():
            model.limit(at_most or {})
        bounds_scale = self._problem.objective is Objective.CAPACITY
        if bounds_scale and self._models[True].relaxed() < 1 - EQUAL:
            bounds_scale = False
        found, bound = self._stage(self._models[bounds_scale], first, left)
        if bounds_scale and bound < 1 - EQUAL:
            bounds_scale = False
            left = self._time_limit_s - (self._seconds - begun)
            found, bound = self._stage(self._models[False], found or first, left)
        if found is None:
            return None
        if bounds_scale and found.score.scale < 1 - EQUAL:
            # Out of time before s >= 1 was reached or ruled out: what is served still counts.
            left = self._time_limit_s - (self._seconds - begun)
            other, _ = self._stage(self._models[False], found, left)
            found = self._better(found, other)
        if break_ties:
            left = self._time_limit_s - (self._seconds - begun)
            found = self._broken_ties(self._models[bounds_scale], found, min(left, _TIE_SECONDS))
        achieved = found.score.scale if bounds_scale else found.score.served_rps
        if bounds_scale and self._problem.enough_scale is not None:
            achieved = min(achieved, self._problem.enough_scale)
        gap = max(0.0, (bound - achieved) / bound) if 0 < bound < math.inf else float(bound > 0)
        return Proved(
            best=found,
            bound=max(bound, achieved),
            bounds_scale=bounds_scale,
            optimality_gap=0.0 if gap <= EQUAL else gap,
        )

    @property
    def _seconds(self) -> float:
        return sum(model.programme.seconds for model in self._models.values())

    def _better(self, one: Scored, other: Scored | None) -> Scored:
        if other is None or compare(self._problem, one.score, other.score) >= 0:
            return one
        return other

    def _stage(
        self, model: "_CountModel", first: Scored | None, left_s: float
    ) -> tuple[Scored | None, float]:
        """The best value of the model's objective; what it can be at most."""
        counts, bound = model.best(first.counts if first else None, left_s)
        found = first
        if counts is not None:
            scored = Scored(counts=counts, score=self._assigner.score(counts))
            found = scored if first is None else self._better(scored, first)
        return found, bound

    def _broken_ties(self, model: "_CountModel", found: Scored, left_s: float) -> Scored:
        score = found.score
        begun = self._seconds
        value = score.scale if model.scale else score.served_rps
        if model.scale and self._problem.enough_scale is not None:
            value = min(value, self._problem.enough_scale)
        model.hold(value * (1 - _HOLD))
        try:
            smaller = model.smallest(found.counts, left_s / 2)
            if smaller is not None:
                found = self._better(
                    found, Scored(counts=smaller, score=self._assigner.score(smaller))
                )
            left_s -= self._seconds - begun
            closer = model.closest(found.counts, left_s)
            if closer is not None:
                found = self._better(
                    found, Scored(counts=closer, score=self._assigner.score(closer))
                )
        finally:
            model.release()
        return found


class _CountModel:
    """One mixed-integer programme: the largest scale (``scale``), or the largest rate served.

    Columns: counts, groups per node (only for sizes that are no chain), busy replicas per option
    and type, the scale in units of ``scale_unit``, kept replicas. Rows: packing, capacity per
    option, demand per type, the value held, the size held, and kept <= count.
    """

    def __init__(self, problem: PlanProblem, options: tuple[int, ...], scale: bool) -> None:
        self.scale = scale
        self._problem = problem
        self._options = options
        self._packing = problem.packing
        self._unit = scale_unit(problem)
        self._have = problem.kept_counts
        self._active = [j for j, kind in enumerate(problem.types) if kind.arrival_rate_rps > 0]
        energy = problem.among_equals is AmongEquals.LEAST_ENERGY
        self._sizes = np.array(
            [
                problem.options[i].power_w if energy else problem.options[i].shape.device_count
                for i in options
            ],
            dtype=np.float64,
        )
        self._integer_sizes = not energy
        self._size_unit = float(self._sizes.max(initial=0.0)) or 1.0
        self._upper = np.array([self._packing.largest(i) for i in options], dtype=np.float64)
        columns, rows = self._build()
        self._width = len(columns)
        self._value_costs = np.array([column.cost for column in columns])
        self.programme = Programme(columns=columns, rows=rows)

    def limit(self, at_most: Mapping[int, int]) -> None:
        """Upper bounds of single counts, by option; the others as many as fit."""
        upper = self._upper.copy()
        for place, i in enumerate(self._options):
            if i in at_most:
                upper[place] = min(upper[place], at_most[i])
        self.programme.set_columns(0, np.zeros(len(upper)), upper)

    def relaxed(self) -> float:
        """The objective if replicas could be split: a bound."""
        return self.programme.relaxed_value() * self._objective_unit

    def best(self, first: Counts | None, left_s: float) -> tuple[Counts | None, float]:
        """Counts of the best value found, and the bound on the value."""
        outcome = self._solve(first, left_s)
        if outcome in {Outcome.OPTIMAL, Outcome.FEASIBLE}:
            return self._counts(), self.programme.bound * self._objective_unit
        return None, self.relaxed()

    def hold(self, value: float) -> None:
        """From now on the objective's value is at least this."""
        held = np.array([value / self._objective_unit])
        self.programme.set_rows(self._value_row, held, np.array([math.inf]))

    def smallest(self, first: Counts, left_s: float) -> Counts | None:
        """Counts with the least size at the value held; ``None`` if ``first`` is as small."""
        size = float(self._taken(first) @ self._sizes)
        self._set_costs(-self._sizes / self._size_unit, 0.0)
        # Half the bound is often the whole proof: sizes in devices are whole numbers.
        least = -self.programme.relaxed_value() * self._size_unit
        least = math.ceil(least - 1e-4) if self._integer_sizes else least * (1 + EQUAL)
        if not math.isfinite(least) or least >= size or left_s <= 0:
            return None
        outcome = self._solve(first, left_s)
        return self._counts() if outcome in {Outcome.OPTIMAL, Outcome.FEASIBLE} else None

    def closest(self, first: Counts, left_s: float) -> Counts | None:
        """Counts that keep most of the current plan at the value held and no more size.

        ``None`` where there is no current plan or nothing more to keep.
        """
        possible = sum(min(self._have[i], self._packing.largest(i)) for i in range(len(self._have)))
        kept = sum(min(have, count) for have, count in zip(self._have, first, strict=True))
        if kept >= possible or left_s <= 0:
            return None
        size = float(self._taken(first) @ self._sizes) / self._size_unit
        limit = np.array([size * (1 + _HOLD)])
        self.programme.set_rows(self._value_row + 1, np.array([-math.inf]), limit)
        self._set_costs(np.zeros(len(self._options)), 1.0)
        outcome = self._solve(first, left_s)
        return self._counts() if outcome in {Outcome.OPTIMAL, Outcome.FEASIBLE} else None

    def release(self) -> None:
        """The objective back to the value; nothing held."""
        free = np.array([-math.inf, -math.inf]), np.array([math.inf, math.inf])
        self.programme.set_rows(self._value_row, *free)
        self.programme.set_costs(self._value_costs)

    def _solve(self, first: Counts | None, left_s: float) -> Outcome:
        del first
        return self.programme.solve(time_limit_s=left_s)

    def _set_costs(self, counts: Vector, kept: float) -> None:
        costs = np.zeros(self._width)
        costs[: len(counts)] = counts
        costs[self._first_kept :] = kept
        self.programme.set_costs(costs)

    def _taken(self, counts: Counts) -> Vector:
        return np.array([counts[i] for i in self._options], dtype=np.float64)

    def _counts(self) -> Counts:
        counts = [0] * len(self._problem.options)
        for i, value in zip(self._options, self.programme.values, strict=False):
            counts[i] = round(value)
        return tuple(counts)

    @property
    def _objective_unit(self) -> float:
        return self._unit if self.scale else self._problem.demand_rps

    def _build(self) -> tuple[list[Column], list[tuple[float, float]]]:
        places = {i: place for place, i in enumerate(self._options)}
        rows: list[tuple[float, float]] = []
        counts: list[dict[int, float]] = [{} for _ in self._options]
        groups: list[dict[int, float]] = [{} for _ in self._packing.extra_columns]
        for number, row in enumerate(self._packing.rows):
            rows.append((-math.inf, row.upper))
            for i, coefficient in row.counts.items():
                if i in places:
                    counts[places[i]][number] = coefficient
            for group, coefficient in row.groups.items():
                groups[group][number] = coefficient
        first_option, first_type = len(rows), len(rows) + len(self._options)
        self._value_row = first_type + len(self._active)
        first_kept_row = self._value_row + 2
        unit = 1.0 if self.scale else 1.0 / min(1.0, self._unit)
        demand = (0.0, math.inf) if self.scale else (-math.inf, unit)
        rows.extend([(-math.inf, 0.0)] * len(self._options) + [demand] * len(self._active))
        rows.extend([(-math.inf, math.inf)] * 2)
        for place, entries in enumerate(counts):
            entries[first_option + place] = -1.0
            entries[self._value_row + 1] = float(self._sizes[place]) / self._size_unit
        columns = [
            Column(entries=entries, upper=float(upper), integer=True)
            for entries, upper in zip(counts, self._upper, strict=True)
        ]
        columns.extend(
            Column(entries=entries, upper=upper, integer=True)
            for entries, upper in zip(groups, self._packing.extra_columns, strict=True)
        )
        columns.extend(self._busy(first_option, first_type, unit))
        if self.scale:
            columns.append(self._scale_column(first_type))
        self._first_kept = len(columns)
        for i, have in enumerate(self._have):
            if have and i in places:
                rows.append((-math.inf, 0.0))
                kept_row = first_kept_row + len(columns) - self._first_kept
                counts[places[i]][kept_row] = -1.0
                columns.append(Column(entries={kept_row: 1.0}, upper=have))
        return columns, rows

    def _busy(self, first_option: int, first_type: int, unit: float) -> list[Column]:
        columns = []
        for place, i in enumerate(self._options):
            capacity = self._problem.options[i].capacity_rps
            for number, j in enumerate(self._active):
                if capacity[j] <= 0:
                    continue
                reach = capacity[j] / self._problem.types[j].arrival_rate_rps
                entries = {first_option + place: 1.0}
                cost = 0.0
                if self.scale:
                    entries[first_type + number] = reach / self._unit
                else:
                    cost = capacity[j] / self._problem.demand_rps
                    entries[first_type + number] = reach * unit
                    entries[self._value_row] = cost
                columns.append(Column(entries=entries, cost=cost))
        return columns

    def _scale_column(self, first_type: int) -> Column:
        enough = self._problem.enough_scale
        entries = {first_type + number: -1.0 for number in range(len(self._active))}
        entries[self._value_row] = 1.0
        upper = math.inf if enough is None else enough / self._unit
        return Column(entries=entries, cost=1.0, upper=upper)
