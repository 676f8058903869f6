"""The lower level: given the replicas, the rate of each workload type on each of them.

The linear programme of the paper, section 3, over ``busy[i, j]``, the number of replicas of option
``i`` that type ``j`` keeps busy (rate = busy * capacity; identical replicas are aggregated, which
loses nothing):

    sum over j of busy[i, j] <= count[i]
    sum over i of busy[i, j] * capacity[i, j]  <=  arrival rate of j

Three programmes run in sequence. The first maximises the scale ``s`` of the demand that fits; 1 / s
is the least peak utilisation that serves the demand, and the duals price the types. If s < 1, the
second maximises the rate served. The third fixes the served rates and the peak utilisation and
minimises the sum of rate times predicted latency.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oserve.plan.problem import PlanProblem, ReplicaCounts
from oserve.plan.programme import Column, LinearProgramme, SolveStatus, Vector
from oserve.plan.score import PlanScore

# Slack of values fixed from an earlier solve, and the relative size below which a rate is noise.
_SLACK = 1e-7
_FITS = 1 - 1e-9

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The assignment of rates to replicas of one deployment.

    Indices are those of ``options`` and ``types``. ``served_rps[i][j]`` is the rate of type ``j``
    that all replicas of option ``i`` serve together; ``shares[i][j]`` the fraction of type ``j``
    routed to them. Each type's shares sum to 1; a type without traffic goes where it would be
    cheapest. ``utilisation[i]`` is that of each replica of the option. Options in ``saturated`` are
    at peak utilisation, those in ``slack`` below it. ``price[j]`` is the growth of the peak
    utilisation per further request per second of type ``j`` (infinite if no replica can serve it).
    ``worth[i]`` is the gain from one more replica of option ``i``, in scale if all demand is
    served, else in rate served: exact for a small change, an upper bound for any.
    """

    counts: ReplicaCounts
    served_rps: tuple[tuple[float, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    utilisation: tuple[float, ...]
    saturated: tuple[int, ...]
    slack: tuple[int, ...]
    price: tuple[float, ...]
    worth: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearBound:
    """A linear bound on the score: scale (or rate served) <= constant + worth @ counts."""

    constant: float
    worth: Vector


class Assigner:
    """Solves the lower level for successive deployments of one problem."""

    def __init__(self, problem: PlanProblem) -> None:
        self._problem = problem
        self._rates = np.array([kind.arrival_rate_rps for kind in problem.types])
        self._capacity = np.array([option.capacity_rps for option in problem.options])
        latency = np.array([option.latency_s for option in problem.options])
        self._latency = np.where(self._capacity > 0, latency, 0.0)
        self._sizes = np.array([option.shape.device_count for option in problem.options])
        self._power = np.array([option.power_w for option in problem.options])
        self._have = np.array(problem.kept_counts)
        self._active = np.flatnonzero(self._rates > 0)
        self.demand_rps = problem.demand_rps
        self.scale_unit = scale_unit(problem)
        # The multiple of each type's demand that one fully busy replica serves.
        self._reach = self._capacity[:, self._active] / self._rates[self._active]
        self._pairs = [
            (i, a) for i, row in enumerate(self._reach) for a, reach in enumerate(row) if reach > 0
        ]
        self._rows_of = np.array([i for i, _ in self._pairs], dtype=np.intp)
        self._types_of = np.array([a for _, a in self._pairs], dtype=np.intp)
        self._scale_lp = self._scale_programme()
        self._served_lp = self._served_programme(latency=False)
        self._latency_lp = self._served_programme(latency=True)

    def score(self, counts: Sequence[int]) -> PlanScore:
        """The score of these counts, from one or two small linear programmes."""
        return self._scored(np.asarray(counts, dtype=np.float64))[0]

    def score_and_bound(self, counts: Sequence[int]) -> tuple[PlanScore, LinearBound, bool]:
        """The score, a bound from its duals that holds for every deployment, and what it bounds.

        The last value is True for a bound on the scale, False for one on the rate served.
        """
        amounts = np.asarray(counts, dtype=np.float64)
        score, overloaded = self._scored(amounts)
        if overloaded:
            return score, self._served_bound(), False
        return score, self._scale_bound(), True

    def assign(self, counts: Sequence[int]) -> Assignment:
        """The complete assignment for these counts."""
        amounts = np.asarray(counts, dtype=np.float64)
        score, overloaded = self._scored(amounts)
        price = self._prices(amounts, score.scale)
        served = np.zeros_like(self._reach)
        if overloaded:
            bound = self._served_bound()
            busy = self._matrix(self._served_lp.values)
            room, targets = amounts, np.sum(busy * self._reach, axis=0)
        else:
            bound = self._scale_bound()
            busy = self._matrix(self._scale_lp.values) / max(score.scale, 1.0)
            room, targets = amounts / score.scale, np.ones(len(self._active))
            # A type that is not a bottleneck may exceed the scale.
            busy /= np.maximum(np.sum(busy * self._reach, axis=0), 1.0)
        quick = self._least_latency(room, targets)
        busy = busy if quick is None else quick
        served[:, :] = busy * self._reach * self._rates[self._active]
        rates = np.zeros_like(self._capacity)
        rates[:, self._active] = np.where(served > _SLACK * self._rates[self._active], served, 0.0)
        return self._finished(amounts, rates, price, bound)

    def _finished(
        self, amounts: Vector, rates: Matrix, price: Vector, bound: LinearBound
    ) -> Assignment:
        with np.errstate(divide="ignore", invalid="ignore"):
            busy = np.where(self._capacity > 0, rates / self._capacity, 0.0).sum(axis=1)
            utilisation = np.where(amounts > 0, busy / np.maximum(amounts, 1.0), 0.0)
        peak = float(utilisation.max(initial=0.0))
        placed = [int(i) for i in np.flatnonzero(amounts > 0)]
        at_peak = [i for i in placed if utilisation[i] >= peak * (1 - 1e-5)]
        shares = self._shares(amounts, rates, utilisation, bound)
        return Assignment(
            counts=tuple(int(amount) for amount in amounts),
            served_rps=_tuples(rates),
            shares=_tuples(shares),
            utilisation=tuple(utilisation.tolist()),
            saturated=tuple(at_peak),
            slack=tuple(i for i in placed if i not in at_peak),
            price=tuple(price.tolist()),
            worth=tuple(bound.worth.tolist()),
        )

    def _shares(
        self, amounts: Vector, rates: Matrix, utilisation: Vector, bound: LinearBound
    ) -> Matrix:
        totals = rates.sum(axis=0)
        shares = np.zeros_like(rates)
        placed = np.flatnonzero(amounts > 0)
        for j, total in enumerate(totals):
            if total > 0:
                shares[:, j] = rates[:, j] / total
                continue
            if not len(placed):
                continue
            able = [i for i in placed if self._capacity[i, j] > 0]
            # Cheapest: the least worth of capacity per request, then the least utilisation, then
            # the lowest latency. If no replica serves the type within the SLOs, the largest ones.
            best = (
                min(
                    able,
                    key=lambda i: (
                        bound.worth[i] / self._capacity[i, j],
                        utilisation[i],
                        self._latency[i, j],
                    ),
                )
                if able
                else max(placed, key=lambda i: self._sizes[i])
            )
            shares[best, j] = 1.0
        return shares

    def _scored(self, amounts: Vector) -> tuple[PlanScore, bool]:
        """The score, and whether the demand exceeds the capacity."""
        self._set_room(self._scale_lp, amounts)
        outcome = self._scale_lp.solve()
        scale = self._scale_lp.value * self.scale_unit if outcome is SolveStatus.OPTIMAL else 0.0
        overloaded = scale < _FITS
        served = self.demand_rps
        if overloaded:
            self._set_room(self._served_lp, amounts)
            outcome = self._served_lp.solve()
            share = self._served_lp.value if outcome is SolveStatus.OPTIMAL else 0.0
            served = min(share, 1.0) * self.demand_rps
        score = PlanScore(
            served_rps=max(served, 0.0),
            scale=max(scale, 0.0),
            device_count=int(amounts @ self._sizes),
            power_w=float(amounts @ self._power),
            kept=int(np.minimum(amounts, self._have).sum()),
        )
        return score, overloaded

    def _scale_bound(self) -> LinearBound:
        """Any prices that sum to 1 over the demand bound the scale; the duals bound it tightly."""
        prices = self._scale_lp.prices[len(self._capacity) :]
        total = prices.sum()
        prices = prices / total if total > 0 else np.full(len(prices), 1 / len(prices))
        return LinearBound(constant=0.0, worth=(self._reach * prices).max(axis=1))

    def _served_bound(self) -> LinearBound:
        rates = self._rates[self._active]
        prices = np.clip(self._served_prices(), 0.0, 1.0)
        gains = self._reach * rates * (1 - prices)
        return LinearBound(constant=float(prices @ rates), worth=gains.max(axis=1))

    def _served_prices(self) -> Vector:
        # The rows are multiples of each type's demand, the objective a share of the total demand.
        rates = self._rates[self._active]
        duals = self._served_lp.prices[len(self._capacity) :]
        prices: Vector = duals * self.demand_rps * self._row_unit / rates
        return prices

    def _prices(self, amounts: Vector, scale: float) -> Vector:
        """The price of each type; a type that cannot be served does not affect the others."""
        able: NDArray[np.bool_] = np.where(amounts[:, np.newaxis] > 0, self._capacity, 0.0) > 0
        servable: NDArray[np.bool_] = np.asarray(np.sum(able, axis=0) > 0)
        price = np.full(len(self._rates), math.inf)
        if not servable[self._active].any():
            return price
        options = len(self._capacity)
        if scale <= 1e-9 * self.scale_unit:
            lower = np.where(servable[self._active], 0.0, -math.inf)
            self._scale_lp.set_rows(options, lower, np.full(len(lower), math.inf))
            self._scale_lp.solve()
            scale = self._scale_lp.value * self.scale_unit
            self._scale_lp.set_rows(options, np.zeros(len(lower)), np.full(len(lower), math.inf))
        duals = self._scale_lp.prices[options:]
        duals = duals / max(duals.sum(), 1e-300)
        worth = (self._reach * duals).max(axis=1) / scale
        price[self._active] = duals / (scale * self._rates[self._active])
        for j in np.flatnonzero(self._rates <= 0):
            costs = [worth[i] / self._capacity[i, j] for i in np.flatnonzero(able[:, j])]
            price[j] = min(costs, default=math.inf)
        price[~servable] = math.inf
        return price

    def _least_latency(self, room: Vector, targets: Vector) -> Matrix | None:
        lower = np.full(len(room), -math.inf)
        self._latency_lp.set_rows(0, lower, room * (1 + _SLACK))
        wished = targets * self._row_unit
        self._latency_lp.set_rows(len(room), wished * (1 - _SLACK), wished)
        if self._latency_lp.solve() is not SolveStatus.OPTIMAL:
            return None
        return self._matrix(self._latency_lp.values)

    def _set_room(self, programme: LinearProgramme, amounts: Vector) -> None:
        programme.set_rows(0, np.full(len(amounts), -math.inf), amounts)

    def _matrix(self, values: Vector) -> Matrix:
        busy: Matrix = np.zeros_like(self._reach)
        busy[self._rows_of, self._types_of] = np.maximum(values[: len(self._pairs)], 0.0)
        return busy

    @property
    def _row_unit(self) -> float:
        """The unit that keeps coefficients near 1 if the demand far exceeds the cluster."""
        return 1.0 / min(1.0, self.scale_unit)

    def _scale_programme(self) -> LinearProgramme:
        options, active = self._reach.shape
        columns = [
            Column(entries={i: 1.0, options + a: self._reach[i, a] / self.scale_unit})
            for i, a in self._pairs
        ]
        columns.append(Column(entries={options + a: -1.0 for a in range(active)}, cost=1.0))
        rows = [(-math.inf, 0.0)] * options + [(0.0, math.inf)] * active
        return LinearProgramme(columns=columns, rows=rows)

    def _served_programme(self, *, latency: bool) -> LinearProgramme:
        options, active = self._reach.shape
        unit = self._row_unit
        slowest = max(float(self._latency.max(initial=0.0)), 1e-300)
        columns = []
        for i, a in self._pairs:
            j = self._active[a]
            gain = self._capacity[i, j] / self.demand_rps
            cost = -gain * self._latency[i, j] / slowest if latency else gain
            columns.append(
                Column(entries={i: 1.0, options + a: self._reach[i, a] * unit}, cost=cost)
            )
        rows = [(-math.inf, 0.0)] * options + [(-math.inf, unit)] * active
        return LinearProgramme(columns=columns, rows=rows)


def scale_unit(problem: PlanProblem) -> float:
    """A rough upper bound on the scale, used to bring coefficients close to 1.

    The least over the types, each alone on all devices at the best capacity per device; positive.
    """
    bounds = []
    for j, kind in enumerate(problem.types):
        if kind.arrival_rate_rps > 0:
            best = max(o.capacity_rps[j] / o.shape.device_count for o in problem.options)
            bounds.append(best * len(problem.devices) / kind.arrival_rate_rps)
    return max(min(bounds), 1e-12)


def _tuples(matrix: Matrix) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
