"""The running server: a control loop that keeps the cluster at a plan, and a gateway in front.

With a controller, the plan adapts to the traffic; see ``decisions``.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from oserve.app.assembly import engine_cluster, plan_switcher
from oserve.app.controller import ControllerService
from oserve.app.decisions import DecisionLoop
from oserve.app.operator import OperatorApi
from oserve.app.publisher import StatusPublisher
from oserve.config.policies import reconcile_policy
from oserve.control.decision import Mode
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import given_up
from oserve.control.status import explained
from oserve.core import Action, Observation, ReplicaPhase
from oserve.engines.clock import LiveClock
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall
from oserve.startup.call_audit import CallAudit
from oserve.startup.cluster_view import ClusterView
from oserve.startup.deployment import ServerDeployment
from oserve.startup.engine_keeper import engine_keeper
from oserve.startup.folders import server_folders
from oserve.startup.gateways import NodeGatewayKeepers, gateway_supervisor
from oserve.startup.growth import ClusterGrowth, movable_weights
from oserve.startup.lock import StateLock
from oserve.startup.node_fleet import NodeFleet
from oserve.startup.node_operations import NodeOperations
from oserve.startup.switch_facts import recovered_switch
from oserve.startup.tuning import background_tuning
from oserve.switch.learned import LearnedPhases
from oserve.switching.driver import SwitchOutcome
from oserve.switching.prices import SwitchPrices

_log = logging.getLogger("oserve.control")


class OServeServer:
    """A deployment in operation; ``changed`` gets a line whenever a replica's phase changes.

    Raises OServeError if another server uses the same state folder.
    """

    def __init__(
        self,
        deployment: ServerDeployment,
        *,
        fleet: NodeFleet | None = None,
        changed: Callable[[str], None] = lambda _line: None,
    ) -> None:
        settings = deployment.settings
        folders = server_folders(settings)
        self._lock = StateLock(folders.state)
        self._interval_s = settings.control.interval_s
        self._policy = reconcile_policy(settings)
        self._clock = LiveClock()
        self._woken = asyncio.Event()
        self._view = ClusterView()
        self.ready = asyncio.Event()
        self._keeper = engine_keeper(deployment, folders)
        self._fleet, self._deployment = fleet, deployment
        self._cluster = engine_cluster(
            deployment,
            folders,
            self._keeper,
            self._clock,
            lambda _state: self._woken.set(),
            remote=() if fleet is None else fleet.held(),
        )
        self._learned = LearnedPhases()
        movable = movable_weights(deployment, fleet, self._learned)
        self._prices = SwitchPrices(movable)
        controller = _controller(deployment, self._prices, self._learned)
        self._loop = ControlLoop(
            self._cluster,
            self._clock,
            deployment.plan if controller is None else controller.controller.plan,
            policy=self._policy,
            interval_s=self._interval_s,
            observed=self._observed,
        )
        auto = controller is not None and deployment.mode is Mode.AUTO
        documents = dict if fleet is None else fleet.documents
        self._nodes = NodeOperations(folders.state, self._loop, replaces=auto, documents=documents)
        self._switcher = plan_switcher(
            deployment,
            movable,
            self._cluster,
            self._loop,
            self._clock,
            settle=self._switch_ended,
            publish=self._publish,
        )
        self._gateway = gateway_supervisor(
            deployment, folders, self._keeper, self._operate, self._clock
        )
        self._gateway_nodes = NodeGatewayKeepers(fleet, self._gateway)
        self._decisions: DecisionLoop | None = None
        if controller is not None:
            self._decisions = DecisionLoop(
                controller,
                gateway=self._gateway,
                loop=self._loop,
                switcher=self._switcher,
                view=self._view,
                clock=self._clock,
                nodes=self._nodes,
            )
        self._tasks: list[asyncio.Task[None]] = []
        self._acted: tuple[Action, ...] = ()
        self._listening = False
        self._tuning = background_tuning(deployment, self._clock)
        self._speeds = lambda: (
            deployment.speeds if controller is None else controller.planner.speeds
        )
        self._publisher = StatusPublisher(
            deployment, self._gateway, controller, self._tuning, self._policy, changed, documents
        )
        self._operator = OperatorApi(
            deployment,
            loop=self._loop,
            switcher=self._switcher,
            decisions=self._decisions,
            view=self._view,
            nodes=self._nodes,
            audit=CallAudit(folders.state),
        )

    @property
    def failed(self) -> dict[str, str]:
        """Replicas of the plan that were given up, with the reason."""
        return dict(self._view.lost)

    async def start(self) -> int:
        """Open the port and return it; clients get status 503 until a replica is ready.

        Takes over the processes that a killed server left running. Raises OServeError if they, or
        the nodes, are another server's.
        """
        await self._keeper.connect()
        if self._fleet is not None:
            growth = ClusterGrowth(self._deployment, self._fleet, self._clock, self._renewed)
            self._tasks.append(asyncio.ensure_future(growth.run()))
            self._fleet.attach(self._cluster, growth.notice, busy=lambda: self._switcher.active)
        kept, ended = await self._cluster.adopt()
        if kept or ended:
            _log.info("adopted: %s; ended: %s", ", ".join(kept) or "-", ", ".join(ended) or "-")
        if self._fleet is not None:
            self._fleet.check_free()
        await self._loop.step()
        port = await self._gateway.listen()
        self._listening = True
        return port

    async def run(self) -> None:
        """Run the control loop and the controller until cancelled."""
        if self._decisions is not None:
            self._tasks.append(asyncio.ensure_future(self._decisions.run()))
        tuning = self._tuning.run(lambda: self._loop.plan, self._speeds)
        self._tasks.append(asyncio.ensure_future(tuning))
        while True:
            self._woken.clear()
            await self._loop.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._interval_s)

    async def close(self) -> None:
        """End: refuse new requests, drain within the grace period, then end every process."""
        for task in self._tasks:
            task.cancel()
        self._tuning.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._decisions is not None:
            await self._decisions.close()
        await self._switcher.close()
        try:
            await self._gateway.close()
            if self._decisions is not None:
                await self._decisions.save_last()
        finally:
            await self._cluster.close()
            if self._fleet is not None:
                await self._fleet.close(end_nodes=True)
            self._lock.release()

    # -- callbacks ------------------------------------------------------------------------------
    async def _operate(self, call: OperatorCall) -> OperatorAnswer:
        return await self._operator.answer(call)

    async def _publish(self) -> None:
        """Put a changed plan into force at once."""
        await self._loop.step()
        self._woken.set()

    async def _renewed(self, deployment: ServerDeployment) -> None:
        """Switch and plan for more nodes, or by links that are known better."""
        movable = movable_weights(deployment, self._fleet, self._learned)
        self._switcher.use(movable)
        self._prices.use(movable)
        if self._decisions is not None:
            await self._decisions.controller.renew(deployment)

    def _switch_ended(self, outcome: SwitchOutcome) -> None:
        if outcome.reason:
            _log.error("plan %s stays in force: %s", outcome.plan.id, outcome.reason)
        if self._decisions is not None:
            self._decisions.switch_ended(outcome)

    def _observed(self, observation: Observation, actions: tuple[Action, ...]) -> None:
        plan = self._loop.plan
        runnable = self._loop.nodes.runnable(plan, observation)
        for action in actions:
            # An engine that ends is told to in every round until it has.
            if action not in self._acted:
                _log.info("%s", explained(action, observation))
        self._acted = actions
        lost = {
            name: failures.reason
            for name, failures in given_up(runnable, observation, self._policy).items()
        }
        for name in lost.keys() - self._view.lost.keys():
            _log.error("replica %s given up: %s", name, lost[name])
        self._view.observation, self._view.lost = observation, lost
        self._switcher.observe(observation)
        self._nodes.observe(observation)
        if self._listening:
            self._gateway_nodes.follow(observation.node_states)
        switches = self._switcher.documents()
        self._publisher.publish(plan, observation, lost, switches, time.time())
        phases = {state.spec.id: state.phase for state in observation.replicas}
        if all(
            phases.get(spec.id) is ReplicaPhase.READY or spec.id in lost
            for spec in runnable.replicas
        ):
            self.ready.set()


def _controller(
    deployment: ServerDeployment, prices: SwitchPrices, learned: LearnedPhases
) -> ControllerService | None:
    """The controller, if the mode needs one; it gets the unfinished switch of a killed server."""
    now_s = time.time()
    left = recovered_switch(deployment.settings, now_s)
    if left is not None:
        _log.warning("switch %s did not end: %s", left.id, left.reason)
    if deployment.plan_request is None:
        return None
    return ControllerService(
        deployment,
        deployment.plan_request,
        now_s=now_s,
        legs=prices.legs,
        learned=learned,
    )
