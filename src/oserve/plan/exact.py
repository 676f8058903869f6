"""The upper level solved to a proved optimum: a mixed-integer programme over counts of shapes.

If the devices of a node are identical, a deployment is the number of replicas of each shape, so the
two levels of the paper, section 3, become one programme:

    maximise s  subject to  sum over j of busy[i, j] <= count[i]                   (each option i)
                            sum over i of busy[i, j] * capacity[i, j] >= s * rate[j]  (each type j)
                            counts fit on the nodes                                   (packing)

with integer counts; if s < 1 the rate served is maximised instead. Then, with that value held, the
fewest devices or the least power, and at last the most replicas of the current plan.

A proof is only as good as its solver, and HiGHS has returned suboptimal solutions as optimal
(version 1.15.1, on these programmes, without presolve). Therefore every deployment found is scored
again, and each optimum is checked in a second way: after a solve with presolve, a solve without
presolve searches for a deployment that is better by 1e-4 (for at most a second; if that does not
suffice, the first proof stands alone).
"""

import math
from collections.abc import Mapping
from math import inf

import numpy as np

from oserve.plan.assign import Assigner, scale_unit
from oserve.plan.bounds import ScoredCounts
from oserve.plan.dominance import undominated
from oserve.plan.problem import AmongEquals, Maximise, PlanProblem, ReplicaCounts
from oserve.plan.programme import Column, LinearProgramme, SolveStatus, Vector
from oserve.plan.proof import Proved, achieved_value, judged
from oserve.plan.score import EQUAL, compare

# The tolerance of a value held from an earlier stage, within EQUAL so that it counts as equal.
_HOLD = EQUAL / 2
_TIE_SECONDS = 2.0
# The check of an optimum: its repetitions, its seconds, and the relative gain that counts.
_CONFIRMATIONS = 3
_CONFIRM_SECONDS = 1.0
_CONFIRM_MARGIN = 1e-4


class ExactSearch:
    """The programmes of one problem, with ``counts[i] <= at_most[i]`` where given.

    A solve ends when the value is within ``relative_gap`` of its bound, or after ``time_limit_s``
    of HiGHS's clock. Tie-breaks get a part of the remaining time; if it does not suffice, the
    solution before them stands.
    """

    def __init__(
        self,
        problem: PlanProblem,
        assigner: Assigner,
        *,
        time_limit_s: float = 60.0,
        at_most: Mapping[int, int] | None = None,
        relative_gap: float = EQUAL,
    ) -> None:
        self._relative_gap = relative_gap
        self._problem = problem
        self._assigner = assigner
        self._time_limit_s = time_limit_s
        self._limits = at_most or {}
        # An option with a limited count must not displace the options it dominates.
        self._options = undominated(problem, limited=frozenset(self._limits))
        self._models: dict[bool, _CountModel] = {}

    def _model(self, *, scale: bool) -> "_CountModel":
        """The programme for the scale or for the rate served, built on first use."""
        if scale not in self._models:
            self._models[scale] = _CountModel(
                self._problem, self._options, self._limits, scale=scale, gap=self._relative_gap
            )
        return self._models[scale]

    def solve(self, *, first: ScoredCounts | None = None, break_ties: bool = True) -> Proved:
        """The best deployment.

        ``first`` is a known deployment within the limits, the fallback if time runs out (default:
        the empty one).
        """
        if first is None:
            nothing = (0,) * len(self._problem.options)
            first = ScoredCounts(counts=nothing, score=self._assigner.score(nothing))
        deadline = self._seconds + self._time_limit_s
        _, by_scale = self.relaxed()
        found, bound = self._stage(self._model(scale=by_scale), first, deadline, confirm=break_ties)
        if by_scale and bound < 1 - EQUAL:
            by_scale = False
            found, bound = self._stage(
                self._model(scale=False), found, deadline, confirm=break_ties
            )
        elif by_scale and found.score.scale < 1 - EQUAL:
            # Out of time before s >= 1 was reached or excluded: maximise the rate served.
            found, _ = self._stage(self._model(scale=False), found, deadline, confirm=break_ties)
        if break_ties:
            until = min(deadline, self._seconds + _TIE_SECONDS)
            found = self._broken_ties(self._model(scale=by_scale), found, until)
        return judged(self._problem, found, bound, by_scale=by_scale)

    def relaxed(self) -> tuple[float, bool]:
        """The bound of the relaxation, and whether it is a scale rather than a rate served."""
        if self._problem.maximise is Maximise.CAPACITY:
            scale = self._model(scale=True).relaxed()
            if scale >= 1 - EQUAL:
                return scale, True
        return self._model(scale=False).relaxed(), False

    def judge(self, found: ScoredCounts) -> Proved:
        """The optimality gap of a deployment found by another search."""
        bound, by_scale = self.relaxed()
        return judged(self._problem, found, bound, by_scale=by_scale)

    @property
    def _seconds(self) -> float:
        return sum(model.programme.seconds for model in self._models.values())

    def _stage(
        self, model: "_CountModel", first: ScoredCounts, deadline: float, *, confirm: bool
    ) -> tuple[ScoredCounts, float]:
        """The best deployment by the model's objective, and the bound on its value."""
        counts, bound = model.best(deadline - self._seconds)
        found = self._better(first, counts)
        achieved = achieved_value(self._problem, found.score, by_scale=model.scale)
        # A value above its own bound is a solver error, which invalidates the bound.
        doubted = achieved > bound * (1 + EQUAL)
        for _ in range(_CONFIRMATIONS if confirm else 0):
            if achieved < bound * (1 - 2 * EQUAL):
                break
            left_s = min(deadline - self._seconds, _CONFIRM_SECONDS)
            outcome, counts = model.above(achieved * (1 + _CONFIRM_MARGIN), left_s)
            better = self._better(found, counts)
            if better is found:
                doubted = doubted and outcome is not SolveStatus.INFEASIBLE
                break
            found, doubted = better, True
            achieved = achieved_value(self._problem, found.score, by_scale=model.scale)
            bound = max(bound, achieved)
        return found, model.relaxed() if doubted else max(bound, achieved)

    def _better(self, one: ScoredCounts, counts: ReplicaCounts | None) -> ScoredCounts:
        if counts is None or counts == one.counts:
            return one
        other = ScoredCounts(counts=counts, score=self._assigner.score(counts))
        return other if compare(self._problem, other.score, one.score) > 0 else one

    def _broken_ties(
        self, model: "_CountModel", found: ScoredCounts, deadline: float
    ) -> ScoredCounts:
        model.hold(achieved_value(self._problem, found.score, by_scale=model.scale) * (1 - _HOLD))
        try:
            half = (deadline - self._seconds) / 2
            found = self._better(found, model.smallest(found.counts, half))
            found = self._better(found, model.closest(found.counts, deadline - self._seconds))
        finally:
            model.release()
        return found


class _CountModel:
    """One mixed-integer programme: the largest scale (``scale``), or the largest rate served.

    Columns: counts, groups per node (only for sizes that form no chain), busy replicas per option
    and type, the scale in units of ``scale_unit``, shapes used (if several are required), kept
    replicas. Rows: packing, capacity per option, demand per type, the held value, the held size,
    used <= count, shapes used, replicas per type (if several are required), and kept <= count.
    """

    def __init__(
        self,
        problem: PlanProblem,
        options: tuple[int, ...],
        at_most: Mapping[int, int],
        *,
        scale: bool,
        gap: float,
    ) -> None:
        self.scale = scale
        self._problem = problem
        self._options = options
        self._packing = problem.packing
        self._unit = scale_unit(problem)
        self._have = problem.kept_counts
        self._active = [j for j, kind in enumerate(problem.types) if kind.arrival_rate_rps > 0]
        energy = problem.among_equals is AmongEquals.LEAST_ENERGY
        # The sizes of all options: a deployment to compare with may use options outside the model.
        self._all_sizes = [
            option.power_w if energy else float(option.shape.device_count)
            for option in problem.options
        ]
        self._sizes = np.array([self._all_sizes[i] for i in options])
        self._integer_sizes = not energy
        self._size_unit = float(self._sizes.max(initial=0.0)) or 1.0
        self._upper = [min(self._packing.largest(i), at_most.get(i, inf)) for i in options]
        columns, rows = self._build()
        self._width = len(columns)
        self._value_costs = np.array([column.cost for column in columns])
        self.programme = LinearProgramme(columns=columns, rows=rows, relative_gap=gap)

    def relaxed(self) -> float:
        """The objective of the relaxation, which is a bound."""
        return self.programme.relaxed_value() * self._objective_unit

    def best(self, left_s: float) -> tuple[ReplicaCounts | None, float]:
        """The best counts found in time, if any, and the bound on the value."""
        counts = self._solved(left_s)
        if counts is None:
            return None, self.relaxed()
        return counts, self.programme.bound * self._objective_unit

    def above(self, value: float, left_s: float) -> tuple[SolveStatus, ReplicaCounts | None]:
        """Search without presolve for counts of at least this value; usually there are none."""
        if value >= self.relaxed() or left_s <= 0:
            return SolveStatus.INFEASIBLE, None
        self.hold(value)
        outcome = self.programme.solve(time_limit_s=left_s, presolve=False)
        counts = self._counts() if outcome in {SolveStatus.OPTIMAL, SolveStatus.FEASIBLE} else None
        self.release()
        return outcome, counts

    def hold(self, value: float) -> None:
        """Constrain the objective to at least this value."""
        held = np.array([value / self._objective_unit])
        self.programme.set_rows(self._value_row, held, np.array([inf]))

    def smallest(self, first: ReplicaCounts, left_s: float) -> ReplicaCounts | None:
        """The smallest counts at the held value; ``None`` if ``first`` is as small."""
        size = self._size(first)
        self._set_costs(-self._sizes / self._size_unit, 0.0)
        # The relaxed size, rounded up to whole devices, often proves it.
        least = -self.programme.relaxed_value() * self._size_unit
        if self._integer_sizes and math.isfinite(least):
            least = math.ceil(least - 1e-4)
        if least * (1 + EQUAL) >= size or left_s <= 0:
            return None
        return self._solved(left_s)

    def closest(self, first: ReplicaCounts, left_s: float) -> ReplicaCounts | None:
        """Counts that keep most of the current plan at the held value and size.

        ``None`` without a current plan, or if ``first`` keeps as much.
        """
        possible = sum(min(self._have[i], self._packing.largest(i)) for i in range(len(self._have)))
        kept = sum(min(have, count) for have, count in zip(self._have, first, strict=True))
        if kept >= possible or left_s <= 0:
            return None
        size = self._size(first) / self._size_unit
        limit = np.array([size * (1 + _HOLD)])
        self.programme.set_rows(self._value_row + 1, np.array([-inf]), limit)
        self._set_costs(np.zeros(len(self._options)), 1.0)
        return self._solved(left_s)

    def release(self) -> None:
        """Restore the objective and drop the constraints on value and size."""
        free = np.array([-inf, -inf]), np.array([inf, inf])
        self.programme.set_rows(self._value_row, *free)
        self.programme.set_costs(self._value_costs)

    def _solved(self, left_s: float) -> ReplicaCounts | None:
        outcome = self.programme.solve(time_limit_s=left_s)
        if outcome not in {SolveStatus.OPTIMAL, SolveStatus.FEASIBLE}:
            return None
        return self._counts()

    def _counts(self) -> ReplicaCounts:
        counts = [0] * len(self._problem.options)
        for i, value in zip(self._options, self.programme.values, strict=False):
            counts[i] = round(value)
        return tuple(counts)

    def _set_costs(self, counts: Vector, kept: float) -> None:
        costs = np.zeros(self._width)
        costs[: len(counts)] = counts
        costs[self._first_kept :] = kept
        self.programme.set_costs(costs)

    def _size(self, counts: ReplicaCounts) -> float:
        return sum(count * size for count, size in zip(counts, self._all_sizes, strict=True))

    @property
    def _objective_unit(self) -> float:
        return self._unit if self.scale else self._problem.demand_rps

    def _build(self) -> tuple[list[Column], list[tuple[float, float]]]:
        places = {i: place for place, i in enumerate(self._options)}
        rows: list[tuple[float, float]] = []
        counts: list[dict[int, float]] = [{} for _ in self._options]
        groups: list[dict[int, float]] = [{} for _ in self._packing.extra_columns]
        for number, row in enumerate(self._packing.rows):
            rows.append((-inf, row.upper))
            for i, coefficient in row.counts.items():
                if i in places:
                    counts[places[i]][number] = coefficient
            for group, coefficient in row.groups.items():
                groups[group][number] = coefficient
        first_option, first_type = len(rows), len(rows) + len(self._options)
        self._value_row = first_type + len(self._active)
        first_variety_row = self._value_row + 2
        varieties = self._varieties(counts, first_variety_row)
        first_replica_row = first_variety_row + (len(varieties) + 1 if varieties else 0)
        replica_rows = self._replica_rows(counts, first_replica_row)
        first_kept_row = first_replica_row + len(replica_rows)
        unit = 1.0 if self.scale else 1.0 / min(1.0, self._unit)
        demand = (0.0, inf) if self.scale else (-inf, unit)
        rows.extend([(-inf, 0.0)] * len(self._options) + [demand] * len(self._active))
        rows.extend([(-inf, inf)] * 2)
        if varieties:
            rows.extend([(-inf, 0.0)] * len(varieties) + [(float(self._problem.min_shapes), inf)])
        rows.extend(replica_rows)
        for place, entries in enumerate(counts):
            entries[first_option + place] = -1.0
            entries[self._value_row + 1] = float(self._sizes[place]) / self._size_unit
        columns = [
            Column(entries=entries, upper=upper, integer=True)
            for entries, upper in zip(counts, self._upper, strict=True)
        ]
        columns.extend(
            Column(entries=entries, upper=upper, integer=True)
            for entries, upper in zip(groups, self._packing.extra_columns, strict=True)
        )
        columns.extend(self._busy(first_option, first_type, unit))
        if self.scale:
            columns.append(self._scale_column(first_type))
        columns.extend(varieties)
        self._first_kept = len(columns)
        for i, have in enumerate(self._have):
            if have and i in places:
                rows.append((-inf, 0.0))
                kept_row = first_kept_row + len(columns) - self._first_kept
                counts[places[i]][kept_row] = -1.0
                columns.append(Column(entries={kept_row: 1.0}, upper=have))
        return columns, rows

    def _varieties(self, counts: list[dict[int, float]], first: int) -> list[Column]:
        """Columns for whether each shape is used; none if one shape is enough.

        A row from ``first`` on forces a shape to unused if its options count 0; the last row sums
        the used shapes.
        """
        if self._problem.min_shapes == 1:
            return []
        names: dict[str, list[int]] = {}
        for place, i in enumerate(self._options):
            names.setdefault(self._problem.options[i].shape.name, []).append(place)
        for row, group in enumerate(names.values(), first):
            for place in group:
                counts[place][row] = -1.0
        last = first + len(names)
        return [
            Column(entries={row: 1.0, last: 1.0}, upper=1.0, integer=True)
            for row in range(first, last)
        ]

    def _replica_rows(
        self, counts: list[dict[int, float]], first: int
    ) -> list[tuple[float, float]]:
        """A row for each type, from ``first`` on, that counts the replicas which can serve it."""
        least = self._problem.min_replicas
        if least == 1:
            return []
        for place, i in enumerate(self._options):
            for number, j in enumerate(self._active):
                if self._problem.options[i].capacity_rps[j] > 0:
                    counts[place][first + number] = 1.0
        return [(float(least), inf)] * len(self._active)

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
        upper = inf if enough is None else enough / self._unit
        return Column(entries=entries, cost=1.0, upper=upper)
