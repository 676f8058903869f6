"""The paper's upper level: a search guided by the flow (paper, section 3).

It starts from the best homogeneous deployment. In each round the lower level gives the worth of
every replica. The search pools the devices of a replica of little worth per device with those of a
saturated replica and with unused devices, enumerates the configurations of the pool, and keeps the
best. It ends after a number of rounds without improvement. As a heuristic it can end in a local
optimum.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from oserve.plan.assign import Assigner, Assignment
from oserve.plan.bounds import Bounds, CountMatrix, ScoredCounts
from oserve.plan.dominance import undominated
from oserve.plan.homogeneous import homogeneous_deployments
from oserve.plan.packing import Packing
from oserve.plan.problem import PlanProblem, ReplicaCounts

IDLE_ROUNDS = 20
MOST_ROUNDS = 1000
MOST_CONFIGURATIONS = 3000


def guided_search(
    problem: PlanProblem,
    assigner: Assigner,
    *,
    seed: int = 0,
    idle_rounds: int = IDLE_ROUNDS,
    start: ScoredCounts | None = None,
) -> ScoredCounts:
    """Search a good deployment by exchanging devices between slack and saturated replicas.

    Ends after ``idle_rounds`` rounds without improvement. ``seed`` varies the pools after the
    greedy one; ``start`` defaults to the best homogeneous deployment.
    """
    best = start or homogeneous_deployments(problem, assigner)[0]
    search = _Exchange(problem, assigner, random.Random(seed))
    idle = 0
    for _ in range(MOST_ROUNDS):
        found = search.improved(best, idle)
        idle = idle + 1 if found is best else 0
        best = found
        if idle >= idle_rounds:
            break
    return best


class _Exchange:
    """Pools and their configurations, for one problem."""

    def __init__(self, problem: PlanProblem, assigner: Assigner, rng: random.Random) -> None:
        self._problem = problem
        self._assigner = assigner
        self._rng = rng
        self._packing: Packing = problem.packing
        self._options = undominated(problem)
        self._bounds = Bounds(problem, assigner)
        self._devices = Counter(device.kind for device in problem.devices)
        self._tried: set[tuple[ReplicaCounts, tuple[int, ...]]] = set()

    def improved(self, best: ScoredCounts, idle: int) -> ScoredCounts:
        """One round: the better of ``best`` and the best reconfiguration of one of its pools."""
        assignment = self._assigner.assign(best.counts)
        pool = self._pool(best.counts, assignment, idle)
        if (best.counts, pool) in self._tried:
            return best
        self._tried.add((best.counts, pool))
        configurations = self._configurations(best.counts, pool, assignment)
        return self._bounds.best_of(configurations, best) or best

    def _pool(self, counts: ReplicaCounts, assignment: Assignment, idle: int) -> tuple[int, ...]:
        """The options of the pooled replicas: the one of least worth and a saturated one."""
        replicas = [i for i, count in enumerate(counts) for _ in range(count)]
        worth = assignment.worth

        def density(i: int) -> float:
            return worth[i] / self._problem.options[i].shape.device_count

        # Slack replicas first: their marginal worth is below that of saturated ones.
        slack = set(assignment.slack)
        by_worth = sorted(replicas, key=lambda i: (i not in slack, density(i)))
        if not by_worth:
            return ()
        if idle == 0:
            poor = by_worth[0]
            rich = max(by_worth, key=lambda i: (i in assignment.saturated, density(i)))
            rest = list(by_worth)
            rest.remove(poor)
            return (poor, rich) if rich in rest else (poor,)
        # Diversification: the longer without improvement, the larger the pool.
        size = min(len(by_worth), self._rng.choice([2, 2, 3] if idle < 8 else [2, 3, 3, 4]))
        poor = self._rng.randrange(max(1, (len(by_worth) + 1) // 2))
        others = [place for place in range(len(by_worth)) if place != poor]
        chosen = [poor, *self._rng.sample(others, size - 1)]
        return tuple(sorted(by_worth[place] for place in chosen))

    def _configurations(
        self, counts: ReplicaCounts, pool: Sequence[int], assignment: Assignment
    ) -> CountMatrix:
        """Configurations of the pooled and unused devices, most promising options first."""
        base = list(counts)
        for i in pool:
            base[i] -= 1
        free = Counter(self._devices)
        for i, count in enumerate(base):
            free[self._packing.kinds[i]] -= count * self._problem.options[i].shape.device_count
        order = sorted(self._options, key=lambda i: -assignment.worth[i] / self._size(i))
        found: list[ReplicaCounts] = []
        self._extend(base, order, free, found)
        return np.array(found, dtype=np.int64).reshape(-1, len(counts))

    def _extend(
        self,
        counts: list[int],
        order: Sequence[int],
        free: Counter[str],
        found: list[ReplicaCounts],
    ) -> None:
        """Enumerate depth first over the options, up to MOST_CONFIGURATIONS."""
        if len(found) >= MOST_CONFIGURATIONS:
            return
        if not order:
            found.append(tuple(counts))
            return
        option, rest = order[0], order[1:]
        kind, size = self._packing.kinds[option], self._size(option)
        fitting = 0
        while (fitting + 1) * size <= free[kind]:
            counts[option] += 1
            if not self._packing.fits(counts):
                counts[option] -= 1
                break
            fitting += 1
        # The largest count of an option first.
        free[kind] -= fitting * size
        for number in range(fitting, -1, -1):
            self._extend(counts, rest, free, found)
            if number:
                counts[option] -= 1
                free[kind] += size

    def _size(self, option: int) -> int:
        return self._problem.options[option].shape.device_count
