"""The controller of a live server: its inputs, its thread, its saved state.

The slow part of a decision runs in a thread. Between decisions the controller solves the routing
shares again from present rates, since changing them costs nothing.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from oserve.config.policies import control_policy, follow_policy
from oserve.control.decision import Decision, Trigger
from oserve.control.evaluation import CandidateScore
from oserve.control.following import FollowScore
from oserve.control.planner import Legs, PlannerFacts
from oserve.control.planning import planner_facts, planner_for
from oserve.control.runtime import ControllerRuntime
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, Observation, ReplicaShape, ReplicaSpec
from oserve.evaluate.switch_scorer import model_of
from oserve.evaluate.switch_simulation import ScoringProcess, SwitchSimulation, simulated_facts
from oserve.perf import TokenCosts
from oserve.plan.planning import PlanRequest
from oserve.startup.controller_memory import ControllerMemory, Remembered
from oserve.startup.deployment import ServerDeployment
from oserve.startup.ladders import Ladders
from oserve.switch.learned import LearnedPhases

_log = logging.getLogger("oserve.control")

_DECISIONS_SHOWN = 10


class ControllerService:
    """Feeds a controller and asks it for decisions; ``now_s`` is Unix time throughout.

    ``request`` is what the controller plans from. ``legs`` predicts the durations of switches
    without restarts, ``learned`` has the durations of their phases so far.
    """

    def __init__(
        self,
        deployment: ServerDeployment,
        request: PlanRequest,
        *,
        now_s: float,
        legs: Legs | None = None,
        learned: LearnedPhases | None = None,
    ) -> None:
        settings = deployment.settings
        self._deployment = deployment
        self._source = request.source.origin
        self.starts = StartTimes(settings.control.start_s)
        self.planner = planner_for(request, self.starts, legs)
        self._speeds = SpeedEstimator(request.source)
        self._speeds.speeds = deployment.speeds
        self.planner.correct(deployment.speeds)
        self._legs = legs
        self._scoring = (
            ScoringProcess(model_of(request, min_gain=settings.control.min_gain))
            if settings.control.simulate
            else None
        )
        names = [kind.name for kind in request.demand.types]
        follow = follow_policy(settings, names)
        self._runtime = ControllerRuntime(
            deployment.plan,
            policy=replace(control_policy(settings, deployment.mode), follow=follow),
            planner=self.planner,
            starts=self.starts,
            shares_interval_s=settings.control.shares_interval_s,
            scorer=None if self._scoring is None else SwitchSimulation(self._scoring, self.planner),
            speeds=self._speeds,
        )
        self.controller = self._runtime.controller
        self.ladders = None if follow is None else Ladders(self._runtime, request, follow)
        parts = Remembered(
            controller=self.controller,
            planner=self.planner,
            starts=self.starts,
            speeds=self._speeds,
            phases=learned or LearnedPhases(),
        )
        self._memory = ControllerMemory(deployment, request, parts, now_s=now_s)
        self._memory.recall(_DECISIONS_SHOWN)
        self._lock = asyncio.Lock()
        self._refining = asyncio.Lock()
        self._refined = False

    async def refine(self) -> None:
        """Replace the model's capacities by simulated ones; takes seconds once, in a thread.

        Until then the controller makes no decision by itself.
        """
        async with self._refining:
            if self._scoring is None or self._refined:
                return
            began_s = time.monotonic()
            facts = await asyncio.to_thread(simulated_facts, self.planner.facts, self._scoring)
            self.planner.learn(facts)
            self._refined = True
        _log.info(
            "the controller uses simulated capacities of %d shapes (%.1f s)",
            len(facts.table),
            time.monotonic() - began_s,
        )

    async def renew(self, deployment: ServerDeployment) -> None:
        """Plan from now on for a deployment that has more nodes, or knows its network better."""
        request = deployment.plan_request
        if request is None:
            return
        # No decision waits for a simulation that is under way.
        facts = await asyncio.to_thread(self._known_better, request)
        # A refinement that is under way would put back the facts from before.
        async with self._refining, self._lock:
            self._runtime.renew(facts)
            self._memory.renew(deployment, request)
            self._refined = False
        await self.refine()

    def _known_better(self, request: PlanRequest) -> PlannerFacts:
        if self._scoring is not None:
            least = self._deployment.settings.control.min_gain
            self._scoring.renew(model_of(request, min_gain=least))
        if self.ladders is not None:
            self.ladders.renew(request)
        self._speeds.compare_with(request.source)
        return planner_facts(request, self.starts, self._legs)

    # -- each second ----------------------------------------------------------------------------
    def observe(
        self, now_s: float, batches: Sequence[Batch], observation: Observation, queued: int = 0
    ) -> Trigger | None:
        """Add what was counted; returns why a decision is due, if one is."""
        return self._runtime.observe(now_s, batches, observation, queued)

    def routed(
        self, plan: DeploymentPlan, observation: Observation, now_s: float
    ) -> DeploymentPlan:
        """The plan with routing shares for the replicas that serve and the requests that come."""
        return self._runtime.routed(plan, observation, now_s)

    # -- decisions ------------------------------------------------------------------------------
    async def decide(
        self,
        now_s: float,
        trigger: Trigger,
        *,
        given: DeploymentPlan | None = None,
        present: Sequence[ReplicaSpec] = (),
        switching: bool = False,
    ) -> tuple[Decision, CandidateScore | FollowScore | None]:
        """Evaluate candidates in a thread, decide, and save the decision. One at a time."""
        of_nodes = trigger is Trigger.NODE
        # The linear model's capacities must do if nodes are lost before they were simulated.
        if given is None and self.ladders is None and not of_nodes:
            await self.refine()
        async with self._lock:
            question = self.controller.decision_input(
                now_s, given=given, present=present, of_nodes=of_nodes
            )
            weighed = await asyncio.to_thread(self._runtime.evaluate, question)
            decision = self.controller.decide(
                question, weighed, now_s=now_s, trigger=trigger, switching=switching
            )
            _log.info("%s", decision.line)
            await self.save(now_s, (decision,))
            return decision, weighed

    def reached(self, plan: DeploymentPlan) -> None:
        """Record that a switch ended in this plan, which may differ from the decided one."""
        self.controller.reached(self._runtime.typed(plan))

    def bar(self, failed: Sequence[ReplicaSpec]) -> None:
        """Exclude the shapes of replicas that could not be started, while this server runs."""
        self.planner.barred |= {spec.shape for spec in failed}

    # -- memory ---------------------------------------------------------------------------------
    async def save(self, now_s: float, decisions: Sequence[Decision] = ()) -> None:
        """See ``ControllerMemory.save``."""
        await self._memory.save(now_s, decisions)

    async def save_seconds(self, now_s: float) -> None:
        """See ``ControllerMemory.save_seconds``."""
        await self._memory.save_seconds(now_s)

    def close(self) -> None:
        """End the worker processes of simulations."""
        for process in (self._scoring, self.ladders):
            if process is not None:
                process.close()

    # -- reporting ------------------------------------------------------------------------------
    def costs(self, shape: ReplicaShape, device_kind: str) -> TokenCosts:
        """The cost of a token for the router, at the observed speeds of replicas."""
        return self._deployment.costs(shape, device_kind).at(
            self.planner.speeds.of(replace(shape, device_kind=device_kind))
        )

    def document(self) -> dict[str, Any]:
        """The part of the status document about the controller."""
        policy = self.controller.policy
        decisions = list(self.controller.decisions)[-_DECISIONS_SHOWN:]
        return {
            "mode": policy.mode.value,
            "decision_interval_s": policy.interval_s,
            "ladder": None if self.ladders is None else self.ladders.document(),
            "forecast": msgspec.to_builtins(self.controller.monitor.forecast()),
            "gauges": self.controller.monitor.collector.gauges,
            "speeds": {"source": self._source, "seen": self._speeds.state()},
            "decisions": [{**msgspec.to_builtins(d), "line": d.line} for d in decisions],
        }
