"""What the simulator knows of switches, for the controller of a live server.

The linear model ranks deployments within some per cent, which is what most switches would gain;
some that it recommends lose (see docs/results.md). So capacities are simulated once, after the
start, and each switch is simulated before it is made: the expected rates with the new replicas and
with those there are. What happens while it is made is the price that the controller reckons with.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from oserve.control.evaluation import Question, Rates, Weighed, pays_after_s
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.runtime import SimulatedScore
from oserve.core import DeploymentPlan, OServeError, ReplicaSpec
from oserve.evaluate.capacities import Lengths, simulated_table
from oserve.evaluate.simulator import Levers, Mask, Serving, Simulator, Traffic, met
from oserve.evaluate.verification import SERVED_AS, common_slo
from oserve.evaluate.worker_process import Aside
from oserve.evaluate.workload import Prospect, prospect
from oserve.perf import ShapePerformance
from oserve.perf.corrected import Speeds, corrected
from oserve.plan.planning import PlanRequest
from oserve.traces import Slo

HOPELESS = 0.1
"""Of what comes: where no plan serves more of it in time, a backlog hides which is better."""

_AS_MEASURED = Speeds()
# What has not ended so long after the last request came is not counted on.
_LATEST_S = 60.0


class Opinion:
    """Of a planning question's model, devices, types and limits; slow, so ask it in a thread.

    ``aside``: it simulates in a process of its own.
    """

    def __init__(
        self, question: PlanRequest, *, levers: Levers = SERVED_AS, aside: bool = False
    ) -> None:
        self._question = question
        self._aside = Aside(partial(Opinion, question, levers=levers)) if aside else None
        # Tables are made for what was measured: whoever uses them scales them (control.planner).
        self._as_measured = self._simulator = Simulator(question.source)
        self._speeds = _AS_MEASURED
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
        if self._aside is not None:
            return tuple(self._aside.call("table", tuple(rows)))
        question = self._question
        return simulated_table(
            self._as_measured,
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

    def good(self, plan: DeploymentPlan, traffic: Traffic, speeds: Speeds = _AS_MEASURED) -> Mask:
        """Which requests are served within the limits by replicas of these speeds."""
        if self._aside is not None:
            found: Mask = self._aside.call("good", plan, traffic, speeds)
            return found
        if speeds != self._speeds:
            self._speeds, self._simulator = (
                speeds,
                Simulator(corrected(self._question.source, speeds)),
            )
        # Without limits what counts is what is done in time.
        latest_s = 0.0 if self._slo == Slo() else _LATEST_S
        serving = Serving(plan=plan, levers=self._levers)
        return met(self._simulator.run(serving, traffic, latest_s=latest_s), self._slo)

    def close(self) -> None:
        """End the process beside, if there is one."""
        if self._aside is not None:
            self._aside.close()

    def prospect(self, question: Question, lasts_s: float) -> Prospect:
        """See ``evaluate.workload``."""
        return prospect(question, lasts_s, self._lengths, seed=self._question.seed)


class Scored:
    """A second opinion on a switch: see ``control.helm.Scorer``."""

    def __init__(self, opinion: Opinion, planner: TablePlanner) -> None:
        self._opinion = opinion
        self._planner = planner

    def __call__(self, question: Question, found: Weighed) -> SimulatedScore:
        """Both plans on the same prospect.

        Where a backlog makes all late either way, what counts is what comes after it.
        """
        try:
            kept, moved, after = self._both(question, found)
            if question.past and max(kept, moved) <= HOPELESS * sum(question.steps[0].expected):
                kept, moved, after = self._both(replace(question, past=()), found)
        except OServeError:
            # What cannot be simulated is judged by the model alone.
            return SimulatedScore(
                current_rps=found.current_rps, candidate_rps=found.candidate_rps, worth=found.worth
            )
        left_s = max(0.0, found.lasts_s - found.cost.seconds)
        return SimulatedScore(
            current_rps=kept,
            candidate_rps=moved,
            worth=(moved - kept) * left_s + after - found.cost.requests,
            pays_after_s=pays_after_s(moved - kept, found.cost, max(0.0, -after)),
        )

    def _both(self, question: Question, found: Weighed) -> tuple[float, float, float]:
        """Requests/s in time with the plan kept and with the other, and how many more later."""
        ahead = self._opinion.prospect(question, found.lasts_s)
        if not len(ahead.traffic):
            return 0.0, 0.0, 0.0
        rates = question.steps[0].expected
        kept, moved = (
            self._opinion.good(self._shared(plan, rates), ahead.traffic, question.speeds)
            for plan in (question.current, found.plan)
        )
        later = int((moved & ahead.later).sum()) - int((kept & ahead.later).sum())
        kept_rps, moved_rps = (
            float((good & ahead.expected).sum()) / ahead.lasting_s for good in (kept, moved)
        )
        return kept_rps, moved_rps, float(later)

    def _shared(self, plan: DeploymentPlan, rates: Rates) -> DeploymentPlan:
        """With the routing shares that it would have at these rates."""
        return self._planner.with_shares(plan, self._planner.shares(plan.replicas, rates))


def _whole(tokens: float) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array([max(1, round(tokens))], dtype=np.int64)
