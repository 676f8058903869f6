"""What the simulator knows of switches, for the controller of a live server.

The linear model ranks deployments within some per cent, which is what most switches would gain;
some that it recommends lose (see docs/results.md). So capacities are simulated once, after the
start, and each switch is simulated before it is made: the expected rates with the new replicas and
with those there are. What happens while it is made is the price that the controller reckons with.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from oserve.app.capacities import Lengths, arrivals, simulated_table
from oserve.app.planning import Question as PlanningQuestion
from oserve.app.simulated import Levers, Serving, Simulator, met
from oserve.app.verify import SERVED_AS, common_slo
from oserve.control.appraisal import Question, Rates, Weighed
from oserve.control.helm import Judged
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.core import DeploymentPlan, OServeError, ReplicaSpec
from oserve.perf import ShapePerformance
from oserve.traces import Slo

HOPELESS = 0.1
"""Of what comes: where no plan serves more of it in time, a backlog hides which is better."""

_MOST_SIMULATED_S = 900.0
_MOST_REQUESTS = 50_000
# What has not ended so long after the last request came is not counted on.
_LATEST_S = 60.0


class Opinion:
    """Of a planning question's model, devices, types and limits; slow, so ask it in a thread."""

    def __init__(self, question: PlanningQuestion, *, levers: Levers = SERVED_AS) -> None:
        self._question = question
        self._simulator = Simulator(question.source)
        self._levers = levers
        self._slo = common_slo(question.limits)
        self._lengths = [
            Lengths(
                prompt_tokens=_whole(question.demand.centres[kind.name][0]),
                output_tokens=_whole(question.demand.centres[kind.name][1]),
            )
            for kind in question.demand.types
        ]

    def table(self, rows: Sequence[ShapePerformance]) -> tuple[ShapePerformance, ...]:
        """The promising rows with simulated capacities; as they are where there are no limits."""
        if self._slo == Slo():
            return tuple(rows)
        question = self._question
        return simulated_table(
            self._simulator,
            rows,
            self._lengths,
            devices=question.devices,
            classes=question.demand.classes,
            levers=self._levers,
            slo=self._slo,
            seed=question.seed,
        )

    def refined(self, facts: PlannerFacts) -> PlannerFacts:
        """With simulated capacities, also for shapes that a person chooses."""
        table = self.table(facts.table)

        def row_of(spec: ReplicaSpec) -> ShapePerformance | None:
            row = facts.row_of(spec)
            return None if row is None else self.table([row])[0]

        return replace(facts, table=table, row_of=row_of)

    def scorer(self, planner: TablePlanner) -> "Scored":
        """What a switch is worth, with shares as this planner makes them."""
        return Scored(self, planner)

    def good_rps(
        self, plan: DeploymentPlan, rates_rps: Rates, seconds: float, *, waiting: int = 0
    ) -> float:
        """Requests within the limits, per second, of Poisson arrivals for so long.

        ``waiting`` requests are there already, are served like the others and do not count.
        """
        return self.good(plan, rates_rps, seconds, waiting=waiting)[0]

    def good(
        self,
        plan: DeploymentPlan,
        rates_rps: Rates,
        seconds: float,
        *,
        waiting: int = 0,
        then: tuple[Rates, float] = ((), 0.0),
    ) -> tuple[float, float]:
        """``good_rps``, and how many are within the limits of those that come ``then``."""
        seconds = min(seconds, _MOST_SIMULATED_S, _MOST_REQUESTS / max(sum(rates_rps), 1e-9))
        waiting = min(waiting, _MOST_REQUESTS)
        traffic = arrivals(
            self._lengths, rates_rps, seconds, seed=self._question.seed, waiting=waiting, then=then
        )
        if not len(traffic):
            return 0.0, 0.0
        # Without limits what counts is what is done in time.
        latest_s = 0.0 if self._slo == Slo() else _LATEST_S
        serving = Serving(plan=plan, levers=self._levers)
        results = self._simulator.run(serving, traffic, latest_s=latest_s)
        good, after = met(results, self._slo), traffic.arrival_s >= seconds
        return float(good[~after][waiting:].sum()) / seconds, float(good[after].sum())


class Scored:
    """A second opinion on a switch: see ``control.helm.Scorer``."""

    def __init__(self, opinion: Opinion, planner: TablePlanner) -> None:
        self._opinion = opinion
        self._planner = planner

    def __call__(self, question: Question, found: Weighed) -> Judged:
        """Both plans at the rates that are expected next, and at those of before after them.

        Where a backlog makes all late either way, what counts is what comes after it.
        """
        rates = question.steps[0].expected
        try:
            kept, moved, after = self._both(question, found, question.waiting)
            if question.waiting and max(kept, moved) <= HOPELESS * sum(rates):
                kept, moved, after = self._both(question, found, 0)
        except OServeError:
            # What cannot be simulated is judged by the model alone.
            return Judged(
                current_rps=found.current_rps, candidate_rps=found.candidate_rps, worth=found.worth
            )
        left_s = max(0.0, found.lasts_s - found.cost.seconds)
        worth = (moved - kept) * left_s + after - found.cost.requests
        return Judged(current_rps=kept, candidate_rps=moved, worth=worth)

    def _both(self, question: Question, found: Weighed, waiting: int) -> tuple[float, float, float]:
        """Requests/s in time with the plan kept and with the other, and how many more after."""
        rates, seconds = question.steps[0].expected, found.lasts_s
        then = question.before, question.back_s
        (kept, kept_after), (moved, moved_after) = (
            self._opinion.good(
                self._shared(plan, rates), rates, seconds, waiting=waiting, then=then
            )
            for plan in (question.current, found.plan)
        )
        return kept, moved, moved_after - kept_after

    def _shared(self, plan: DeploymentPlan, rates: Rates) -> DeploymentPlan:
        """With the routing shares that it would have at these rates."""
        return self._planner.with_shares(plan, self._planner.shares(plan.replicas, rates))


def _whole(tokens: float) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array([max(1, round(tokens))], dtype=np.int64)
