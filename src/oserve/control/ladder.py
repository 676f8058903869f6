"""The ladder: what each deployment does at each load, and which one the objective chooses.

Pure data and arithmetic. Deployments are simulated beforehand at fixed loads
(``evaluate.ladder``); between these loads scores are interpolated, so that a decision takes
milliseconds. A load is a multiple of the ladder's reference rates, in which requests of different
types count by their work:

    load(rates) = sum over types of rate * work / sum over types of reference rate * work

At one load, the deployments that hold the SLO of every type compete by the objective. Of a type
whose SLO no deployment holds, the best attainment that one reaches is required. Where no deployment
holds, the one with the largest attainment wins.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from oserve.control.load_facts import LoadRates
from oserve.core import Objective, ReplicaShape, ReplicaSpec

Shapes = tuple[tuple[ReplicaShape, int], ...]
"""Distinct shapes with their counts, ordered by their representation."""

MISSED = 10.0
"""A request outside its SLO costs as much as so many requests at the best latency."""

P99_GUARD = 1.1
"""P99 E2E may exceed the least of all deployments that hold by this factor."""

# Simulated attainments differ by as much without a cause.
_SAME_ATTAINMENT = 0.01
# Of scores this near, the deployment that is nearest to the present plan wins.
_SAME_SCORE = 1.01
# The same for capacities.
_SAME_CAPACITY = 1.02


def shapes_of(replicas: Sequence[ReplicaSpec]) -> Shapes:
    """The shapes of replicas with their counts."""
    return counted(Counter(spec.shape for spec in replicas))


def counted(counts: Counter[ReplicaShape]) -> Shapes:
    """The same counts as ``Shapes``."""
    found = [(shape, count) for shape, count in counts.items() if count]
    return tuple(sorted(found, key=lambda item: repr(item[0])))


def device_count(shapes: Shapes) -> int:
    """The devices that these replicas hold."""
    return sum(shape.device_count * count for shape, count in shapes)


def in_words(shapes: Shapes) -> str:
    """For example ``2 x tp8-bf16-2048``."""
    return " + ".join(f"{count} x {shape.name}" for shape, count in shapes) or "no replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadScore:
    """One deployment at one load; ``type_...`` have an entry for each workload type.

    Attainments are shares of all requests; latencies, in seconds, are of completed requests.
    ``joules`` are per request, of the devices that the deployment holds.
    """

    load: float
    attainment: float
    type_attainment: tuple[float, ...]
    type_e2e_s: tuple[float, ...]
    p50_e2e_s: float
    p99_e2e_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    joules: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderDeployment:
    """A deployment and its scores, at rising loads.

    Beyond its last score it serves no more requests in time than at that score.
    """

    shapes: Shapes
    scores: tuple[LoadScore, ...]

    def at(self, load: float) -> LoadScore:
        """The score at a load, by linear interpolation."""
        scores = self.scores
        if load <= scores[0].load:
            return replace(scores[0], load=load)
        if load >= scores[-1].load:
            return _overloaded(scores[-1], load)
        index = next(i for i, item in enumerate(scores) if item.load >= load)
        return _between(scores[index - 1], scores[index], load)


def part_of(whole: LadderDeployment, shapes: Shapes) -> LadderDeployment:
    """Some replicas of a deployment, which carry their part of its load."""
    part = device_count(shapes) / device_count(whole.shapes)
    scores = tuple(replace(score, load=part * score.load) for score in whole.scores)
    return LadderDeployment(shapes=shapes, scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a deployment is chosen for: the objective of each workload type, by position.

    ``attainment``: the share of requests, of each type and of all, that must meet the SLO.
    """

    objectives: tuple[Objective, ...]
    attainment: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The deployment that the objective chooses at one load.

    ``index`` into the ladder's deployments. ``holds``: whether it holds the SLO at that load.
    ``cost``: the objective at the expected load; 1.0 is the best that any deployment reaches there.
    """

    index: int
    holds: bool
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Scores of deployments of one cluster for one mix of workload types.

    ``rates``: the reference, requests/s by type; ``work``: of a request of each type, in any unit;
    ``loads``: the levels that were simulated.
    """

    names: tuple[str, ...]
    rates: LoadRates
    work: tuple[float, ...]
    loads: tuple[float, ...]
    deployments: tuple[LadderDeployment, ...]

    # -- loads ----------------------------------------------------------------------------------
    def load(self, rates: LoadRates) -> float:
        """The load of these rates."""
        return _work(rates, self.work) / _work(self.rates, self.work)

    def loads_by_type(self, rates: LoadRates) -> tuple[float, ...]:
        """The load of each type alone."""
        whole = _work(self.rates, self.work)
        return tuple(rate * work / whole for rate, work in zip(rates, self.work, strict=True))

    def stay_s(self, index: int, load: float) -> float:
        """The mean seconds that a request stays in a deployment."""
        score = self.deployments[index].at(load)
        total = math.fsum(
            rate * e2e_s for rate, e2e_s in zip(self.rates, score.type_e2e_s, strict=True)
        )
        return total / self.reference_rps

    def distance(self, rates: LoadRates) -> float:
        """How far these rates differ in mix: the work that belongs to other types, 0 to 1."""
        total, mine = _work(rates, self.work), _work(self.rates, self.work)
        if total <= 0:
            return 0.0
        return 0.5 * sum(
            abs(rate * work / total - own * work / mine)
            for rate, own, work in zip(rates, self.rates, self.work, strict=True)
        )

    @property
    def reference_rps(self) -> float:
        """Requests/s at load 1."""
        return math.fsum(self.rates)

    # -- deployments ----------------------------------------------------------------------------
    def find(self, shapes: Shapes) -> int | None:
        """The index of a deployment; ``None`` if it was not simulated."""
        for index, item in enumerate(self.deployments):
            if item.shapes == shapes:
                return index
        return None

    def including(self, shapes: Shapes) -> Self:
        """The ladder with this deployment, if it is a part of another one.

        It is taken to carry its part of that one's load: after an idle time, or where replicas
        are lost, it is in force before it was simulated.
        """
        if not shapes or self.find(shapes) is not None:
            return self
        mine = dict(shapes)
        wider = [
            item
            for item in self.deployments
            if all(dict(item.shapes).get(shape, 0) >= count for shape, count in mine.items())
        ]
        if not wider:
            return self
        whole = min(wider, key=lambda item: device_count(item.shapes))
        return replace(self, deployments=(*self.deployments, part_of(whole, shapes)))

    def without(self, barred: Collection[ReplicaShape], kept: Shapes) -> Self:
        """The ladder without deployments that have a barred shape, except for ``kept``."""
        if not barred:
            return self
        able = [
            item
            for item in self.deployments
            if item.shapes == kept or not any(shape in barred for shape, _ in item.shapes)
        ]
        return replace(self, deployments=tuple(able))

    def scores(self, load: float) -> "LoadScores":
        """All deployments at one load."""
        return LoadScores(self, load)

    def capacity(self, index: int, goal: Goal) -> float:
        """The largest load up to which a deployment holds the overall attainment; 0 for none."""
        held = 0.0
        before: LoadScore | None = None
        for score in self.deployments[index].scores:
            if score.attainment >= goal.attainment:
                held, before = score.load, score
                continue
            if before is not None:
                fall = before.attainment - score.attainment
                part = (before.attainment - goal.attainment) / fall if fall > 0 else 0.0
                held = before.load + part * (score.load - before.load)
            break
        return held

    def choose(self, goal: Goal, *, required: float, expected: float, near: Shapes = ()) -> Rung:
        """The deployment for an expected load, of those that hold the required load.

        Among equals the one nearest to ``near`` wins, then one that carries most, then one of few
        shapes.
        """
        held = self.scores(required)
        holding = held.holding(goal)
        if not holding:
            best = max(range(len(self.deployments)), key=lambda i: (held.attainment[i], -i))
            equal = np.flatnonzero(
                held.attainment >= held.attainment[best] - _SAME_ATTAINMENT
            ).tolist()
            chosen = self._nearest(equal, near, held.attainment * -1.0, goal)
            return Rung(index=chosen, holds=False, cost=self.scores(expected).cost(chosen, goal))
        at = self.scores(expected)
        allowed = at.guarded(holding, goal)
        costs = self._objectives(at, goal)
        least = min(costs[index] for index in allowed)
        equal = [index for index in allowed if costs[index] <= _SAME_SCORE * least]
        chosen = self._nearest(equal, near, costs, goal)
        return Rung(index=chosen, holds=True, cost=float(costs[chosen]))

    def _objectives(self, at: "LoadScores", goal: Goal) -> NDArray[np.float64]:
        """The objective of each; where all types ask for capacity, the largest one over its own."""
        each = range(len(self.deployments))
        if all(item is Objective.CAPACITY for item in goal.objectives):
            able = np.array([max(self.capacity(index, goal), 1e-9) for index in each])
            costs: NDArray[np.float64] = able.max() / able
            return costs
        return np.array([at.objective(index, goal) for index in each])

    def _nearest(
        self, equal: Sequence[int], near: Shapes, costs: NDArray[np.float64], goal: Goal
    ) -> int:
        """The deployment with most devices in common with ``near``; see ``choose``.

        One that carries more at the same cost spares a later switch.
        """
        common = {i: _common_devices(self.deployments[i].shapes, near) for i in equal}
        nearest = [i for i in equal if common[i] == max(common.values())]
        capacity = {i: self.capacity(i, goal) for i in nearest}
        most = max(capacity.values())
        return min(
            (i for i in nearest if capacity[i] * _SAME_CAPACITY >= most),
            key=lambda i: (len(self.deployments[i].shapes), costs[i], i),
        )


class LoadScores:
    """All deployments of a ladder at one load."""

    def __init__(self, ladder: Ladder, load: float) -> None:
        self._shares = tuple(rate / ladder.reference_rps for rate in ladder.rates)
        self.scores = tuple(item.at(load) for item in ladder.deployments)
        self.attainment = np.array([score.attainment for score in self.scores])
        self._type_attainment = np.array([score.type_attainment for score in self.scores])
        self._type_e2e_s = np.array([score.type_e2e_s for score in self.scores])
        self._joules = np.array([score.joules for score in self.scores])

    def holding(self, goal: Goal) -> list[int]:
        """The deployments that hold the SLO of every type as far as any of them can."""
        whole = self.attainment >= goal.attainment
        if not whole.any():
            return []
        within = self._type_attainment[whole]
        needed = np.minimum(goal.attainment, within.max(axis=0) - _SAME_ATTAINMENT)
        fits = whole & (self._type_attainment >= needed).all(axis=1)
        # Each type may have another deployment that serves it best.
        found = fits if fits.any() else whole
        return [int(index) for index in np.flatnonzero(found)]

    def guarded(self, holding: Sequence[int], goal: Goal) -> list[int]:
        """Those within the guard on P99 E2E, where latency is an objective."""
        if Objective.LATENCY not in goal.objectives:
            return list(holding)
        most_s = P99_GUARD * min(self.scores[index].p99_e2e_s for index in holding)
        return [index for index in holding if self.scores[index].p99_e2e_s <= most_s]

    def objective(self, index: int, goal: Goal) -> float:
        """The mean over requests of latency or energy, relative to the best of any deployment.

        Types whose objective is capacity count as 1.
        """
        least_s = self._type_e2e_s.min(axis=0)
        energy = float(self._joules[index] / max(self._joules.min(), 1e-9))
        total = 0.0
        for kind, objective in enumerate(goal.objectives):
            worth = 1.0
            if objective is Objective.LATENCY:
                worth = float(self._type_e2e_s[index, kind] / max(least_s[kind], 1e-9))
            elif objective is Objective.ENERGY:
                worth = energy
            total += self._shares[kind] * worth
        return total

    def cost(self, index: int, goal: Goal) -> float:
        """The objective, of a request; ``MISSED`` for those outside the SLO beyond the allowed."""
        missing = max(0.0, goal.attainment - float(self.attainment[index]))
        return (1.0 - missing) * self.objective(index, goal) + MISSED * missing


def _work(rates: LoadRates, work: Sequence[float]) -> float:
    return math.fsum(rate * each for rate, each in zip(rates, work, strict=True))


def _common_devices(one: Shapes, other: Shapes) -> int:
    have = dict(other)
    return sum(min(count, have.get(shape, 0)) * shape.device_count for shape, count in one)


def _overloaded(score: LoadScore, load: float) -> LoadScore:
    part = score.load / load
    return replace(
        score,
        load=load,
        attainment=part * score.attainment,
        type_attainment=tuple(part * item for item in score.type_attainment),
    )


def _between(low: LoadScore, high: LoadScore, load: float) -> LoadScore:
    part = (load - low.load) / (high.load - low.load)

    def mixed(a: float, b: float) -> float:
        return a + part * (b - a)

    def each(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
        return tuple(mixed(x, y) for x, y in zip(a, b, strict=True))

    return LoadScore(
        load=load,
        attainment=mixed(low.attainment, high.attainment),
        type_attainment=each(low.type_attainment, high.type_attainment),
        type_e2e_s=each(low.type_e2e_s, high.type_e2e_s),
        p50_e2e_s=mixed(low.p50_e2e_s, high.p50_e2e_s),
        p99_e2e_s=mixed(low.p99_e2e_s, high.p99_e2e_s),
        p50_ttft_s=mixed(low.p50_ttft_s, high.p50_ttft_s),
        p99_ttft_s=mixed(low.p99_ttft_s, high.p99_ttft_s),
        joules=mixed(low.joules, high.joules),
    )
