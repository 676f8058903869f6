"""The decision loop of a live server: count each second, decide when due, start switches."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from oserve.app.controller import ControllerService
from oserve.control.decision import DecisionVerdict, Trigger
from oserve.control.loop import ControlLoop
from oserve.control.rollout import settled
from oserve.core import Clock, DeploymentPlan, Observation, ReplicaPhase
from oserve.gateway.process.supervisor import GatewaySupervisor
from oserve.startup.advice import advised
from oserve.startup.cluster_view import ClusterView
from oserve.startup.node_operations import NodeOperations
from oserve.switch.transaction import Task
from oserve.switching.driver import SwitchOutcome
from oserve.switching.switcher import Switcher

_log = logging.getLogger("oserve.control")

_INTERVAL_S = 1.0
# Seconds of counts that are lost if the server is killed.
_SAVE_S = 10.0
# Counting waits at most this long for a gateway process that does not report.
_WAIT_S = 60.0


class DecisionLoop:
    """Runs one controller. Its errors are logged: serving continues with the plan in force."""

    def __init__(
        self,
        controller: ControllerService,
        *,
        gateway: GatewaySupervisor,
        loop: ControlLoop,
        switcher: Switcher,
        view: ClusterView,
        clock: Clock,
        unix_s: Callable[[], float] = time.time,
        nodes: NodeOperations | None = None,
    ) -> None:
        self.controller = controller
        self.nodes = nodes
        self._unix_s = unix_s
        self._gateway = gateway
        self._loop = loop
        self._switcher = switcher
        self._view = view
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Each second: count, and decide if a decision is due and none is being made."""
        controller = self.controller
        deciding: asyncio.Task[None] | None = None
        self._spawn(self._refine())
        # If the server is killed before its first decision, the next one starts with this plan.
        await controller.save(self._unix_s())
        saved_s = self._clock.now()
        while True:
            await self._clock.sleep(_INTERVAL_S)
            if self._clock.now() - saved_s >= _SAVE_S:
                saved_s = self._clock.now()
                await controller.save_seconds(self._unix_s())
            trigger = self._count()
            if controller.ladders is not None:
                controller.ladders.prepare(self._unix_s())
            idle = deciding is None or deciding.done()
            if trigger is Trigger.NODE and self._switcher.active:
                # The switch ends first, the sooner if it needs a lost node.
                trigger = None
            if trigger is None and idle and not self._switcher.active:
                self._evacuate()
            if trigger is not None and idle:
                deciding = self._spawn(self._try_decide(trigger))

    @property
    def busy(self) -> bool:
        """Whether a decision is being made or saved."""
        return bool(self._tasks)

    async def close(self) -> None:
        """End its tasks and the simulation."""
        for task in self._tasks:
            task.cancel()
        self.controller.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def save_last(self) -> None:
        """Count the arrivals since the last second, and save everything."""
        observation = self._view.observation
        if observation is not None:
            now_s = self._unix_s()
            self.controller.observe(now_s, self._gateway.batches(), observation)
            await self.controller.save(now_s)

    def switch_ended(self, outcome: SwitchOutcome) -> None:
        """Continue from the plan in force, without shapes that failed to start."""
        cause = outcome.cause
        if cause is not None and cause.task is Task.START:
            failed = self.controller.controller.plan.replica(cause.replica)
            self.controller.bar([] if failed is None else [failed])
        self.controller.reached(outcome.plan)
        self._spawn(self.controller.save(self._unix_s()))

    async def decide(
        self, observation: Observation, trigger: Trigger, given: DeploymentPlan | None = None
    ) -> dict[str, Any]:
        """Decide and act on it; returns the decision for an operator.

        ``given`` is the plan that an operator proposes.
        """
        plan = self._loop.nodes.runnable(self._loop.plan, observation)
        lost = frozenset(self._view.lost)
        of_nodes = trigger is Trigger.NODE
        # What is left must be planned for at once, also while replicas start.
        switching = self._switcher.active or not (of_nodes or settled(plan, observation, lost))
        ready = [s.spec for s in observation.replicas if s.phase is ReplicaPhase.READY]
        self.controller.bar([spec for spec in plan.replicas if spec.id in lost])
        decision, weighed = await self.controller.decide(
            self._unix_s(),
            trigger,
            given=given,
            present=ready if lost and not switching else (),
            switching=switching,
        )
        answer = advised(decision, weighed)
        if decision.verdict is DecisionVerdict.SWITCH:
            wanted = self.controller.controller.plan
            _log.info("switching from plan %s to plan %s", self._loop.plan.id, wanted.id)
            answer["switch"] = self._switcher.want(wanted, trigger.value).id
        return answer

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _refine(self) -> None:
        try:
            await self.controller.refine()
        # After any fault of the simulation the linear model's capacities stay in use.
        except Exception:
            _log.exception("the simulation of capacities failed; those of the linear model stay")

    def _count(self) -> Trigger | None:
        observation = self._view.observation
        if observation is None:
            return None
        now_s = self._unix_s()
        batches = self._gateway.batches()
        # Late counts must not look like an idle time, so the clock waits for them.
        until_s = min(now_s, self._gateway.counted_until_s + _INTERVAL_S)
        try:
            return self.controller.observe(max(until_s, now_s - _WAIT_S), batches, observation)
        # An unforeseen fault in counting must not end serving.
        except Exception:
            _log.exception("counting a second failed")
            return None

    async def _try_decide(self, trigger: Trigger) -> None:
        observation = self._view.observation
        if observation is None:
            return
        try:
            await self.decide(observation, trigger)
        # An unforeseen fault in a decision must not end serving.
        except Exception:
            _log.exception("a decision failed")
            if trigger is Trigger.NODE:
                self.controller.controller.accept_nodes()

    def _evacuate(self) -> None:
        """Empty draining nodes once a decision has replaced what it could."""
        observation = self._view.observation
        if self.nodes is not None and observation is not None:
            self.nodes.evacuate(observation)
