"""The running server: a cluster kept at a plan by the control loop, and a gateway in front.

Where there is a controller it watches what comes and replaces the plan; see ``steering``.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from oserve import __version__
from oserve.app.controller import ControllerService, advised
from oserve.app.deployment import ServerDeployment, check_engines
from oserve.app.fronts import Front, FrontFacts
from oserve.app.operator import RefusedError, allowed_plan
from oserve.app.switching.drive import Report
from oserve.app.switching.prices import SwitchPrices, switch_facts
from oserve.app.switching.record import journal_folder, recover
from oserve.app.switching.switcher import Switcher, SwitcherFacts
from oserve.config import api_keys, backend_keys
from oserve.control.decision import Trigger, Verdict
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy, given_up
from oserve.control.rollout import settled
from oserve.control.routing import routing_table
from oserve.control.status import explained, gauges, status_document, summary
from oserve.core import Action, DeploymentPlan, Observation, OServeError, ReplicaPhase, ReplicaState
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import LocalCluster
from oserve.engines.holding import HeldEngines, private_folder
from oserve.gateway.records import read_records
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.startup.lock import StateLock
from oserve.switch.learned import LearnedPhases
from oserve.switch.transaction import Task
from oserve.workload.output import KnownAtArrival, OutputEstimator

_log = logging.getLogger("oserve.control")

_STEER_S = 1.0
# Seconds of counts that a kill may cost.
_SAVE_S = 10.0
# For so long at most counting waits for a gateway process that does not report.
_WAIT_S = 60.0
# Answers that are learned from before the first request comes.
_LEARNED = 5000


class OServeServer:
    """A deployment in operation; ``changed`` gets a line whenever a replica's phase changes."""

    def __init__(
        self, deployment: ServerDeployment, *, changed: Callable[[str], None] = lambda _line: None
    ) -> None:
        settings = deployment.settings
        self._deployment = deployment
        self._changed = changed
        state_dir = Path(settings.state_dir)
        self._lock = StateLock(state_dir)
        run_dir = private_folder(state_dir)
        log_dir = Path(settings.engines.log_dir).resolve()
        keeper = HeldEngines(
            folder=run_dir,
            state_dir=state_dir,
            log_dir=log_dir,
            method=settings.engines.method(on_cpu=_on_cpu(deployment)),
            grace_s=settings.engines.orphan_grace_s,
        )
        self._keeper = keeper
        self._clock = LiveClock()
        control = settings.control
        self._policy = ReconcilePolicy(
            backoff_s=control.backoff_s,
            max_backoff_s=control.max_backoff_s,
            max_failures=control.max_failures,
            drain_limit_s=control.drain_limit_s,
        )
        self._ordered = settings.gateway.order.policy == "priority"
        self._cluster = LocalCluster(
            deployment.devices,
            model=settings.model,
            served_model_name=deployment.models[0],
            run_dir=run_dir,
            clock=self._clock,
            settings=settings.engines,
            api_keys=backend_keys(deployment.plan),
            sized=deployment.sized,
            keeper=keeper,
            on_change=self._wake,
        )
        self._loop = ControlLoop(
            self._cluster,
            self._clock,
            deployment.plan,
            policy=self._policy,
            interval_s=control.interval_s,
            observed=self._observed,
        )
        learned = LearnedPhases()
        movable = switch_facts(settings, deployment.devices, learned=learned)
        self._steering = (
            ControllerService(
                deployment, now_s=time.time(), legs=SwitchPrices(movable).legs, learned=learned
            )
            if deployment.question is not None
            else None
        )
        if self._steering is not None:
            self._loop.plan = self._steering.controller.plan
        left = recover(journal_folder(settings), time.time())
        if left is not None:
            _log.warning("switch %s was not over: %s", left.id, left.reason)
        self._switcher = Switcher(
            SwitcherFacts(
                settings=settings,
                movable=movable,
                model=deployment.models[0],
                cluster=self._cluster,
                loop=self._loop,
                clock=self._clock,
                settle=self._reached,
                publish=self._publish,
            )
        )
        self._front = Front(
            FrontFacts(
                settings=settings.gateway,
                models=deployment.models,
                keys=api_keys(settings.gateway),
                keeper=keeper,
                run_dir=run_dir,
                log_dir=log_dir,
                operate=self._operate,
                estimator=_learned(settings.gateway.records_file),
            )
        )
        self._seen: Observation | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._line = ""
        self.ready = asyncio.Event()
        self.failed: dict[str, str] = {}

    async def start(self) -> int:
        """Open the port (clients hear 503 until a replica is ready); returns its number.

        What a server that was killed has left running is taken up first.
        """
        await self._keeper.connect()
        kept, ended = await self._cluster.adopt()
        if kept or ended:
            _log.info("taken up: %s; ended: %s", ", ".join(kept) or "-", ", ".join(ended) or "-")
        await self._loop.step()
        return await self._front.listen()

    async def run(self) -> None:
        """Keep the cluster at the plan, and the plan good, until cancelled."""
        if self._steering is not None:
            self._spawn(self._steer(self._steering))
        while True:
            self._woken.clear()
            await self._loop.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._woken.wait(), self._deployment.settings.control.interval_s
                )

    async def close(self) -> None:
        """End: no new requests, running ones get their grace, then every process goes."""
        for task in self._tasks:
            task.cancel()
        if self._steering is not None:
            self._steering.close()
        await self._switcher.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._front.close()
            if self._steering is not None and self._seen is not None:
                now_s = time.time()
                self._steering.observe(now_s, self._front.batches(), self._seen)
                await self._steering.save(now_s)
        finally:
            await self._cluster.close()
            self._lock.release()

    # -- the controller -------------------------------------------------------------------------
    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _steer(self, steering: ControllerService) -> None:
        """Once a second: count, and decide where a decision is due and none is being made."""
        deciding: asyncio.Task[None] | None = None
        self._spawn(self._refine(steering))
        # Should it be killed before the first decision, the next one goes on with this plan.
        await steering.save(time.time())
        saved_s = self._clock.now()
        while True:
            await self._clock.sleep(_STEER_S)
            if self._clock.now() - saved_s >= _SAVE_S:
                saved_s = self._clock.now()
                await steering.save_seconds(time.time())
            trigger = self._counted(steering)
            if trigger is not None and (deciding is None or deciding.done()):
                deciding = asyncio.ensure_future(self._decide(steering, trigger))
                self._tasks.add(deciding)
                deciding.add_done_callback(self._tasks.discard)

    async def _refine(self, steering: ControllerService) -> None:
        try:
            await steering.refine()
        except Exception:
            _log.exception("capacities could not be simulated; the linear model's stay")

    def _counted(self, steering: ControllerService) -> Trigger | None:
        if self._seen is None:
            return None
        now_s = time.time()
        batches = self._front.batches()
        # What is told late must not look like a silence: time stands still until it is told.
        until_s = min(now_s, self._front.counted_until_s + _STEER_S)
        try:
            return steering.observe(max(until_s, now_s - _WAIT_S), batches, self._seen)
        except Exception:
            # Serving must not end because counting is wrong.
            _log.exception("a second could not be counted")
            return None

    async def _decide(self, steering: ControllerService, trigger: Trigger) -> None:
        try:
            await self._decided(steering, trigger)
        except Exception:
            # Serving must not end because deciding is wrong.
            _log.exception("a decision could not be made")

    async def _decided(
        self, steering: ControllerService, trigger: Trigger, given: DeploymentPlan | None = None
    ) -> dict[str, Any]:
        """Decide, and do it."""
        assert self._seen is not None
        plan = self._loop.plan
        lost = frozenset(self.failed)
        switching = self._switcher.active or not settled(plan, self._seen, lost)
        ready = [s.spec for s in self._seen.replicas if s.phase is ReplicaPhase.READY]
        steering.bar([spec for spec in plan.replicas if spec.id in lost])
        decision, weighed = await steering.decide(
            time.time(),
            trigger,
            given=given,
            present=ready if lost and not switching else (),
            switching=switching,
        )
        if decision.verdict is Verdict.SWITCH:
            report = self._replace_plan(steering.controller.plan, trigger.value)
            return {**advised(decision, weighed), "switch": report.id}
        return advised(decision, weighed)

    def _replace_plan(self, plan: DeploymentPlan, by: str) -> Report:
        _log.info("plan %s is to take the place of %s", plan.id, self._loop.plan.id)
        return self._switcher.want(plan, by)

    def _reached(self, plan: DeploymentPlan, reason: str) -> None:
        """A switch has ended, in this plan."""
        if reason:
            _log.error("plan %s stays in force: %s", plan.id, reason)
        if self._steering is not None:
            # A shape that cannot be started is not tried again and again.
            named = reason.removeprefix(f"{Task.START} ").partition(":")[0]
            wished = self._steering.controller.plan.replica(named)
            if reason.startswith(f"{Task.START} ") and wished is not None:
                self._steering.bar([wished])
            self._steering.reached(plan)
            self._spawn(self._steering.save(time.time()))

    async def _publish(self) -> None:
        """What changed is in force at once."""
        await self._loop.step()
        self._woken.set()

    async def _operate(self, path: str, body: bytes) -> tuple[int, bytes]:
        """An operator's call, from whichever gateway process."""
        try:
            given = self._given(body) if body.strip() else None
            if path == "/oserve/v1/switch":
                document = await self._switch(given)
            else:
                document = await self._weigh(given)
        except RefusedError as refused:
            return 409, msgspec.json.encode({"error": {"message": str(refused)}})
        except OServeError as error:
            return 400, msgspec.json.encode({"error": {"message": str(error)}})
        return 200, msgspec.json.encode(document)

    def _given(self, body: bytes) -> DeploymentPlan:
        devices = self._deployment.devices
        plan = allowed_plan(body, self._loop.plan, devices)
        check_engines(plan, devices, self._deployment.settings)
        return plan

    async def _switch(self, given: DeploymentPlan | None) -> dict[str, Any]:
        if given is None:
            raise RefusedError("a switch needs a plan")
        if self._steering is not None and self._seen is not None:
            return await self._decided(self._steering, Trigger.MANUAL, given)
        report = self._replace_plan(given, Trigger.MANUAL.value)
        line = f"switching to plan {given.id}"
        return {"switched": True, "line": line, "plan": "", "switch": report.id}

    async def _weigh(self, given: DeploymentPlan | None) -> dict[str, Any]:
        if self._seen is None or (self._steering is None and given is None):
            raise RefusedError("there is no controller here (control.mode is off)")
        found: dict[str, Any] = {"switched": False, "line": "no controller weighs it", "plan": ""}
        if self._steering is not None:
            found = await self._decided(self._steering, Trigger.QUESTION, given)
        if given is not None:
            found["foreseen"] = await asyncio.to_thread(self._switcher.foresee, given, self._seen)
        return found

    # -- what is observed -----------------------------------------------------------------------
    def _wake(self, _state: ReplicaState) -> None:
        """A replica changed: do not wait for the next round."""
        self._woken.set()

    def _observed(self, observation: Observation, actions: tuple[Action, ...]) -> None:
        plan = self._loop.plan
        self._seen = observation
        for action in actions:
            _log.info("%s", explained(action, observation))
        lost = given_up(plan, observation, self._policy)
        for name, failures in lost.items():
            if name not in self.failed:
                _log.error("replica %s given up: %s", name, failures.reason)
        self.failed = {name: failures.reason for name, failures in lost.items()}
        steering = self._steering
        routed = plan if steering is None else steering.routed(plan, observation, time.time())
        table = routing_table(
            routed,
            observation,
            ordered=self._ordered,
            expected=len(lost) < len(plan.replicas),
            costs=self._deployment.costs if steering is None else steering.costs,
        )
        document = status_document(
            plan,
            observation,
            self._policy,
            model=self._deployment.models[0],
            version=__version__,
            set_aside=self._front.set_aside,
        )
        document["control"] = {"mode": "off"} if steering is None else steering.document()
        switches = self._switcher.documents(observation)
        document["switch"] = switches[-1] if switches else None
        status = msgspec.Raw(msgspec.json.encode(document))
        self._front.publish(
            table,
            ClusterSnapshot(
                status=status,
                switches=msgspec.Raw(msgspec.json.encode(switches)),
                gauges=gauges(observation),
            ),
        )
        line = summary(observation.replicas)
        if line != self._line:
            self._line = line
            self._changed(line)
        phases = {state.spec.id: state.phase for state in observation.replicas}
        settled = all(
            phases.get(spec.id) is ReplicaPhase.READY or spec.id in lost for spec in plan.replicas
        )
        if settled:
            self.ready.set()


def _on_cpu(deployment: ServerDeployment) -> bool:
    return all(device.kind == "cpu" for device in deployment.devices)


def _learned(records_file: str) -> dict[str, Any] | None:
    """An estimator of answers that knows the last requests; ``None`` where there are none."""
    estimator = OutputEstimator()
    with contextlib.suppress(sqlite3.Error):
        for record in read_records(Path(records_file), last=_LEARNED):
            known = KnownAtArrival(prompt_tokens=record.prompt_tokens)
            estimator.learn(known, record.output_tokens)
    return estimator.state() if estimator.seen else None
