"""The controller at work on a live server: what it is fed, where it thinks, what it remembers.

The slow part of a decision runs in a thread. Between decisions the routing shares are solved again
from present rates, since they cost nothing to change.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from oserve.app.deployment import ServerDeployment
from oserve.config import plan_yaml
from oserve.config.policies import policy_of
from oserve.control.decision import Decision, Trigger, Verdict
from oserve.control.evaluation import Weighed
from oserve.control.memory import recall, remembered, same_types
from oserve.control.planner import Legs
from oserve.control.planning import planner_for
from oserve.control.runtime import ControllerRuntime
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import (
    DeploymentPlan,
    Observation,
    ReplicaShape,
    ReplicaSpec,
)
from oserve.evaluate.switch_simulation import Opinion
from oserve.perf import TokenCosts
from oserve.perf.corrected import Speeds
from oserve.startup.store import StateStore, StateUpdate
from oserve.switch.learned import LearnedPhases

_log = logging.getLogger("oserve.control")

_DECISIONS_SHOWN = 10
_AS_MEASURED = Speeds()


class ControllerService:
    """Feeds and asks a controller; ``now_s`` is Unix time throughout.

    ``legs`` tells the way of switches that need no restarts, ``learned`` how long these took.
    """

    def __init__(
        self,
        deployment: ServerDeployment,
        *,
        now_s: float,
        legs: Legs | None = None,
        learned: LearnedPhases | None = None,
    ) -> None:
        assert deployment.question is not None
        settings = deployment.settings
        self._deployment = deployment
        self.starts = StartTimes(settings.control.start_s)
        self._learned = learned or LearnedPhases()
        self.planner = planner_for(deployment.question, self.starts, legs)
        self._store = StateStore(deployment.state_file)
        self._watch = SpeedEstimator(deployment.question.source)
        self._watch.speeds = deployment.speeds
        self.planner.correct(deployment.speeds)
        self._opinion = (
            Opinion(deployment.question, aside=True) if settings.control.simulate else None
        )
        self._helm = ControllerRuntime(
            deployment.plan,
            policy=policy_of(settings, deployment.mode),
            planner=self.planner,
            starts=self.starts,
            shares_interval_s=settings.control.shares_interval_s,
            scorer=None if self._opinion is None else self._opinion.scorer(self.planner),
            watch=self._watch,
        )
        self.controller = self._helm.controller
        self._recall()
        self._plan_saved = ""
        self._saved_s = int(now_s)
        self._lock = asyncio.Lock()
        self._refining = asyncio.Lock()
        self._refined = False

    def _recall(self) -> None:
        memory = self._store.memory("controller")
        centres = self.planner.facts.centres
        if isinstance(memory, dict) and recall(self.controller, memory, centres):
            _log.info("the controller goes on with what it remembers")
            if same_types(memory, self.controller.names, centres):
                self._recall_seconds()
        self.controller.decisions.extend(self._store.decisions(_DECISIONS_SHOWN))
        starts = self._store.memory("starts")
        if isinstance(starts, dict):
            self.starts.restore(starts)
        learned = self._store.memory("switches")
        if isinstance(learned, dict):
            self._learned.restore(learned)

    def _recall_seconds(self) -> None:
        """What was counted since the last decision."""
        collector = self.controller.watch.collector
        for second, row in self._store.seconds(after_s=collector.newest_s):
            collector.add(Batch(names=self.controller.names, arrivals={second: row}))
            collector.tick(second)

    async def refine(self) -> None:
        """Go by simulated capacities from now on; takes seconds the first time, in a thread.

        No decision of its own is made before.
        """
        async with self._refining:
            if self._opinion is None or self._refined:
                return
            began_s = time.monotonic()
            facts = await asyncio.to_thread(self._opinion.refined, self.planner.facts)
            self.planner.learn(facts)
            self._refined = True
        _log.info(
            "the controller goes by simulated capacities of %d shapes (%.1f s)",
            len(facts.table),
            time.monotonic() - began_s,
        )

    # -- each second ----------------------------------------------------------------------------
    def observe(
        self, now_s: float, batches: Sequence[Batch], observation: Observation, queued: int = 0
    ) -> Trigger | None:
        """What was counted; tells whether a decision is due."""
        return self._helm.observe(now_s, batches, observation, queued)

    def routed(
        self, plan: DeploymentPlan, observation: Observation, now_s: float
    ) -> DeploymentPlan:
        """The plan with the routing shares for what serves now and what comes now."""
        return self._helm.routed(plan, observation, now_s)

    # -- decisions ------------------------------------------------------------------------------
    async def decide(
        self,
        now_s: float,
        trigger: Trigger,
        *,
        given: DeploymentPlan | None = None,
        present: Sequence[ReplicaSpec] = (),
        switching: bool = False,
    ) -> tuple[Decision, Weighed | None]:
        """Ask, weigh in a thread, judge, write down. One at a time."""
        if given is None:
            await self.refine()
        async with self._lock:
            question = self.controller.ask(now_s, given=given, present=present)
            weighed = await asyncio.to_thread(self._helm.weighed, question)
            decision = self.controller.judge(
                question, weighed, now_s=now_s, trigger=trigger, switching=switching
            )
            _log.info("%s", decision.line)
            await self.save(now_s, (decision,))
            return decision, weighed

    def reached(self, plan: DeploymentPlan) -> None:
        """A switch ended in this plan, which may not be the one that was decided on."""
        self.controller.reached(self._helm.typed(plan))

    def bar(self, lost: Sequence[ReplicaSpec]) -> None:
        """Shapes that could not be started are not planned again while this server runs."""
        self.planner.barred |= {spec.shape for spec in lost}

    # -- memory ---------------------------------------------------------------------------------
    async def save(self, now_s: float, decisions: Sequence[Decision] = ()) -> None:
        """Write everything down, in one transaction, beside the event loop."""
        controller = self.controller
        plan = plan_yaml(controller.plan)
        facts = self.planner.facts
        memory = {
            "controller": remembered(controller, facts.centres),
            "plan": {
                "fingerprint": self._deployment.fingerprint,
                "given": self._deployment.given,
                "plan": plan,
            },
            "starts": self.starts.state(),
            "switches": self._learned.state(),
            "speeds": {"source": self._source, "seen": self._watch.state()},
            "context": context_of(self._deployment),
        }
        end_s = int(now_s) - 1
        save = StateUpdate(
            memory={},
            decisions=decisions,
            plan=(now_s, plan) if plan != self._plan_saved else None,
            seconds=controller.watch.collector.rows(self._saved_s, end_s),
        )
        self._plan_saved = plan
        self._saved_s = end_s + 1
        await asyncio.to_thread(self._write, save, memory)

    async def save_seconds(self, now_s: float) -> None:
        """Write down only what was counted since the last save: a few numbers."""
        end_s = int(now_s) - 1
        rows = self.controller.watch.collector.rows(self._saved_s, end_s)
        self._saved_s = end_s + 1
        await asyncio.to_thread(self._store.save, StateUpdate(memory={}, seconds=rows))

    def _write(self, save: StateUpdate, memory: dict[str, Any]) -> None:
        encoded = {name: msgspec.json.encode(value) for name, value in memory.items()}
        self._store.save(replace(save, memory=encoded))

    def close(self) -> None:
        """End what computes beside."""
        if self._opinion is not None:
            self._opinion.close()

    @property
    def _source(self) -> str:
        """What speeds are multiples of."""
        assert self._deployment.question is not None
        return self._deployment.question.source.origin

    def costs(self, shape: ReplicaShape, device_kind: str) -> TokenCosts:
        """What a token costs the router, at the speed that was seen."""
        return self._deployment.costs(shape, device_kind).at(
            self.planner.speeds.of(replace(shape, device_kind=device_kind))
        )

    # -- telling --------------------------------------------------------------------------------
    def document(self) -> dict[str, Any]:
        """For the status document."""
        policy = self.controller.policy
        decisions = list(self.controller.decisions)[-_DECISIONS_SHOWN:]
        return {
            "mode": policy.mode.value,
            "decision_interval_s": policy.interval_s,
            "forecast": msgspec.to_builtins(self.controller.watch.forecast()),
            "gauges": self.controller.watch.collector.gauges,
            "speeds": {"source": self._source, "seen": self._watch.state()},
            "decisions": [{**msgspec.to_builtins(d), "line": d.line} for d in decisions],
        }


def context_of(deployment: ServerDeployment) -> dict[str, Any]:
    """What a replay must know of the server that was observed."""
    question = deployment.question
    assert question is not None
    return {
        "settings": msgspec.to_builtins(deployment.settings),
        "devices": msgspec.to_builtins(deployment.devices),
        "demand": msgspec.to_builtins(question.demand),
        "shapes": msgspec.to_builtins(question.shapes),
    }


def advised(decision: Decision, weighed: Weighed | None) -> dict[str, Any]:
    """For an operator: the decision, and the plan that was weighed as a file."""
    plan = "" if weighed is None else plan_yaml(weighed.plan, head=decision.line)
    return {
        "decision": msgspec.to_builtins(decision),
        "line": decision.line,
        "switched": decision.verdict is Verdict.SWITCH,
        "plan": plan,
    }
