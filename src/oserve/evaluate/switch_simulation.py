"""The switch simulation of a controller: simulated capacities and scores for its runtime.

The linear model ranks deployments with errors of some per cent, which is about what most switches
gain; some that it recommends lose (see docs/results.md). So capacities are simulated once, after
the start, and each switch is simulated before the controller decides on it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from oserve.control.evaluation import (
    CandidateScore,
    DecisionInput,
    SimulatedScore,
    TypeRates,
)
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.core import DeploymentPlan, OServeError, ReplicaSpec
from oserve.evaluate.switch_scorer import EvaluationModel, SwitchCase, SwitchScorer
from oserve.evaluate.transition import RoutedLeg
from oserve.evaluate.worker_process import WorkerProcess
from oserve.perf import ShapePerformance


class Scoring(Protocol):
    """The interface of a scorer: a ``SwitchScorer``, or one in another process."""

    def capacities(self, rows: Sequence[ShapePerformance]) -> tuple[ShapePerformance, ...]:
        """See ``SwitchScorer``."""
        ...

    def score(self, case: SwitchCase) -> SimulatedScore:
        """See ``SwitchScorer``."""
        ...


class ScoringProcess:
    """A ``SwitchScorer`` in a worker process. Calls block; make them in a thread."""

    def __init__(self, model: EvaluationModel) -> None:
        self._worker = WorkerProcess(partial(SwitchScorer, model))

    def capacities(self, rows: Sequence[ShapePerformance]) -> tuple[ShapePerformance, ...]:
        """See ``SwitchScorer``."""
        return self._worker.call(SwitchScorer.capacities, tuple(rows))

    def score(self, case: SwitchCase) -> SimulatedScore:
        """See ``SwitchScorer``."""
        return self._worker.call(SwitchScorer.score, case)

    def renew(self, model: EvaluationModel) -> None:
        """Score by another model from now on; waits for a call under way."""
        self._worker.renew(partial(SwitchScorer, model))

    def close(self) -> None:
        """End the worker process."""
        self._worker.close()


def simulated_facts(facts: PlannerFacts, scoring: Scoring) -> PlannerFacts:
    """The facts with simulated capacities, also for shapes that an operator chooses later."""
    table = scoring.capacities(facts.table)

    def row_of(spec: ReplicaSpec) -> ShapePerformance | None:
        row = facts.row_of(spec)
        return None if row is None else scoring.capacities([row])[0]

    return replace(facts, table=table, row_of=row_of)


class SwitchSimulation:
    """A ``control.runtime.Scorer``; ``planner`` has routing shares and the legs of switches."""

    def __init__(self, scoring: Scoring, planner: TablePlanner) -> None:
        self._scoring = scoring
        self._planner = planner

    def __call__(self, inputs: DecisionInput, found: CandidateScore) -> SimulatedScore:
        """Score a switch by simulation; what cannot be simulated keeps the linear model's score."""
        try:
            return self._scoring.score(self.case(inputs, found.plan, found.lasts_s))
        except OServeError:
            return SimulatedScore(
                current_rps=found.current_rps,
                candidate_rps=found.candidate_rps,
                net_gain=found.net_gain,
                pays_after_s=found.pays_after_s,
            )

    def case(self, inputs: DecisionInput, candidate: DeploymentPlan, lasts_s: float) -> SwitchCase:
        """The switch from the current plan to a candidate and back, with routing for the rates."""
        old, new = inputs.current.replicas, candidate.replicas
        rates = inputs.expected_rps
        legs, there = self._routed(inputs.current, old, new, rates)
        back, _ = self._routed(candidate, there, old, inputs.before) if inputs.before else ((), ())
        return SwitchCase(
            inputs=inputs,
            current=self._shared(inputs.current, old, rates),
            candidate=self._shared(candidate, new, rates),
            legs=legs,
            back=back,
            lasts_s=lasts_s,
        )

    def _routed(
        self,
        plan: DeploymentPlan,
        old: Sequence[ReplicaSpec],
        new: Sequence[ReplicaSpec],
        rates_rps: TypeRates,
    ) -> tuple[tuple[RoutedLeg, ...], tuple[ReplicaSpec, ...]]:
        """The legs from one set of replicas to another, and the replicas that are there then."""
        legs = []
        there = list(old)
        for leg in self._planner.legs(old, new):
            left = [spec for spec in there if spec not in leg.leaving]
            there = [*(spec for spec in left if spec not in leg.retired), *leg.started]
            during, after = (self._shared(plan, specs, rates_rps) for specs in (left, there))
            legs.append(RoutedLeg(leg=leg, during=during, after=after))
        return tuple(legs), tuple(there)

    def _shared(
        self, plan: DeploymentPlan, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates
    ) -> DeploymentPlan:
        """A plan of these replicas, with the routing shares that they get at these rates."""
        if not replicas:
            return replace(plan, replicas=(), routing_shares={})
        shares = self._planner.shares(replicas, rates_rps)
        return self._planner.with_shares(replace(plan, replicas=tuple(replicas)), shares)
