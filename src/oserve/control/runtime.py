"""A controller with all that it steers by: planner, start times, and the routing shares in between.

What the live server and the simulated one have in common; both feed it once a second and carry out
what it decides. Pure: time comes in with each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.controller import Controller
from oserve.control.decision import Mode, Trigger
from oserve.control.evaluation import Question, Weighed, appraised
from oserve.control.planner import TablePlanner
from oserve.control.policy import ControlPolicy
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, Observation, PlannedType, ReplicaPhase, ReplicaSpec
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.experts import Combination
from oserve.forecast.forecaster import Forecaster
from oserve.forecast.simple import periods_of
from oserve.workload import classify


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedScore:
    """A switch as simulated: requests/s within limits with the plan kept and with the other.

    ``worth``: requests that the switch brings after its cost. ``pays_after_s``: see ``Weighed``.
    """

    current_rps: float
    candidate_rps: float
    worth: float
    pays_after_s: float = 0.0


# Candidates of a decision on which there is a second opinion, by what the model gives them.
_MOST_JUDGED = 5

Scorer = Callable[[Question, Weighed], SimulatedScore]
"""A second opinion on a switch. What it says counts, not what the model of the planner says."""


def controller_for(plan: DeploymentPlan, names: Sequence[str], policy: ControlPolicy) -> Controller:
    """A controller that has seen nothing yet."""
    interval_s = float(policy.interval_s)
    return Controller(
        plan,
        policy=policy,
        forecaster=Forecaster(
            Combination(len(names), periods_of(interval_s)), names, interval_s=interval_s
        ),
        detector=ChangeDetector(names),
    )


class ControllerRuntime:
    """``shares_interval_s``: how long routing shares stay; ``plan`` is what serves at first.

    ``scorer`` judges what the planner proposes: its model's errors are as large as most gains.
    ``watch`` sees how fast replicas are, which the planner then goes by.
    """

    def __init__(
        self,
        plan: DeploymentPlan,
        *,
        policy: ControlPolicy,
        planner: TablePlanner,
        starts: StartTimes,
        shares_interval_s: float,
        scorer: Scorer | None = None,
        watch: SpeedEstimator | None = None,
    ) -> None:
        self.watch = watch
        self.planner = planner
        self.starts = starts
        names = [kind.name for kind in planner.facts.types]
        self.controller = controller_for(self.typed(plan), names, policy)
        self._shares_interval_s = shares_interval_s
        self._scorer = scorer
        self._shares_s = 0.0
        self._shared: tuple[frozenset[ReplicaSpec], DeploymentPlan] | None = None

    def observe(
        self, now_s: float, batches: Sequence[Batch], observation: Observation, queued: int = 0
    ) -> Trigger | None:
        """Once a second: what was counted and is seen; tells whether a decision is due."""
        states = observation.replicas
        gauges = {
            "running": float(sum(state.running for state in states)),
            "waiting": float(sum(state.waiting for state in states)),
            "kv_cache_usage": max((state.kv_cache_usage for state in states), default=0.0),
            "queued": float(queued),
        }
        self.starts.observe(observation)
        speeds = None if self.watch is None else self.watch.observe(observation)
        if speeds is not None:
            self.planner.correct(speeds)
            # Shares follow at once.
            self._shared = None
        return self.controller.watch.observe(now_s, batches, gauges)

    def routed(
        self, plan: DeploymentPlan, observation: Observation, now_s: float
    ) -> DeploymentPlan:
        """The plan with the routing shares for what serves now and what comes now."""
        ready = frozenset(s.spec for s in observation.replicas if s.phase is ReplicaPhase.READY)
        rates = self.controller.watch.now_rps()
        if self.controller.policy.mode is not Mode.AUTO or not ready:
            return plan
        if sum(rates) <= 0 and ready == set(plan.replicas) and plan.types:
            return plan
        fresh = now_s - self._shares_s < self._shares_interval_s
        if self._shared is not None and self._shared[0] == ready and fresh:
            return replace(self._shared[1], id=plan.id)
        serving = sorted(ready, key=lambda spec: spec.id)
        shares = self.planner.shares(serving, rates)
        routed = self.planner.with_shares(replace(plan, replicas=tuple(serving)), shares)
        self._shares_s = now_s
        self._shared = (ready, routed)
        return routed

    def weighed(self, question: Question) -> Weighed | None:
        """The best candidate with its numbers: the slow part of a decision."""
        question = replace(question, speeds=self.planner.speeds)
        found = appraised(question, self.planner)
        by_itself = question.given is None and not question.shrink_to
        if self._scorer is not None and by_itself:
            found = self._all_judged(question, found[:_MOST_JUDGED])
        best = max(found, key=lambda item: item.worth, default=None)
        return None if best is None else replace(best, plan=self.typed(best.plan))

    def _all_judged(self, question: Question, found: Sequence[Weighed]) -> list[Weighed]:
        """All of them, or the first few where the current plan serves what no other can better."""
        enough_rps = sum(question.steps[0].expected) / (1.0 + self.controller.policy.min_gain)
        judged = []
        for item in found:
            judged.append(self._judged(question, item))
            if judged[-1] is not item and judged[-1].current_rps >= enough_rps:
                break
        return judged

    def _judged(self, question: Question, found: Weighed) -> Weighed:
        """With the second opinion in the place of the model's numbers."""
        if self._scorer is None or set(found.plan.replicas) == set(question.current.replicas):
            return found
        judged = self._scorer(question, replace(found, plan=self.typed(found.plan)))
        return replace(
            found,
            current_rps=judged.current_rps,
            candidate_rps=judged.candidate_rps,
            current_now_rps=judged.current_rps,
            candidate_now_rps=judged.candidate_rps,
            gain=judged.worth + found.cost.requests,
            pays_after_s=judged.pays_after_s,
        )

    def typed(self, plan: DeploymentPlan) -> DeploymentPlan:
        """The plan with the types that are counted here; each has the shares of its class."""
        facts = self.planner.facts
        names = [kind.name for kind in facts.types]
        centres = [(kind.prompt_tokens, kind.output_tokens) for kind in plan.types]
        same = [kind.name for kind in plan.types] == names
        if same and np.allclose(centres, facts.centres, rtol=1e-3):
            return plan
        return replace(
            plan,
            types=tuple(
                PlannedType(
                    name=name,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    shares=plan.routing_shares.get(
                        classify(round(prompt), plan.workload_types).name, {}
                    ),
                )
                for name, (prompt, output) in zip(names, facts.centres, strict=True)
            ),
        )
