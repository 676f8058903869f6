"""Operators' calls over HTTP: switch to a plan, evaluate one, or say what nodes are for."""

import asyncio
from typing import Any

import msgspec

from oserve.app.decisions import DecisionLoop
from oserve.control.decision import Trigger
from oserve.control.loop import ControlLoop
from oserve.core import DeploymentPlan, OServeError
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall
from oserve.startup.cluster_view import ClusterView
from oserve.startup.deployment import ServerDeployment
from oserve.startup.node_operations import NodeOperations
from oserve.startup.plan_check import allowed_plan, check_engines, known_devices
from oserve.switching.switcher import Switcher

_SWITCH_PATH = "/oserve/v1/switch"
_NODES_PATH = "/oserve/v1/nodes"


class CallRefusedError(Exception):
    """This server refuses the call; the message gives the reason."""


class OperatorApi:
    """Answers operators' calls, whichever gateway process received them."""

    def __init__(
        self,
        deployment: ServerDeployment,
        *,
        loop: ControlLoop,
        switcher: Switcher,
        decisions: DecisionLoop | None,
        view: ClusterView,
        nodes: NodeOperations,
    ) -> None:
        self._nodes = nodes
        self._deployment = deployment
        self._loop = loop
        self._switcher = switcher
        self._decisions = decisions
        self._view = view

    async def answer(self, call: OperatorCall) -> OperatorAnswer:
        """Execute a call; errors become the answer."""
        try:
            if call.path == _NODES_PATH:
                return _answer(200, await self._nodes.answer(call.body, self._view.observation))
            given = self._given(call.body) if call.body.strip() else None
            if call.path == _SWITCH_PATH:
                document = await self._switch(given)
            else:
                document = await self._evaluate(given)
        except CallRefusedError as refused:
            return _answer(409, {"error": {"message": str(refused)}})
        except OServeError as error:
            return _answer(400, {"error": {"message": str(error)}})
        return _answer(200, document)

    def _given(self, body: bytes) -> DeploymentPlan:
        devices = known_devices(self._deployment.devices, self._view.observation)
        plan = allowed_plan(body, self._loop.plan, devices)
        check_engines(plan, devices, self._deployment.settings)
        return plan

    async def _switch(self, given: DeploymentPlan | None) -> dict[str, Any]:
        if given is None:
            raise CallRefusedError("a switch needs a plan")
        observation = self._view.observation
        if self._decisions is not None and observation is not None:
            return await self._decisions.decide(observation, Trigger.MANUAL, given)
        report = self._switcher.want(given, Trigger.MANUAL.value)
        line = f"switching to plan {given.id}"
        return {"switched": True, "line": line, "plan": "", "switch": report.id}

    async def _evaluate(self, given: DeploymentPlan | None) -> dict[str, Any]:
        observation = self._view.observation
        if observation is None or (self._decisions is None and given is None):
            raise CallRefusedError("there is no controller here (control.mode is off)")
        found: dict[str, Any] = {
            "switched": False,
            "line": "there is no controller to evaluate it",
            "plan": "",
        }
        if self._decisions is not None:
            found = await self._decisions.decide(observation, Trigger.QUESTION, given)
        if given is not None:
            found["foreseen"] = await asyncio.to_thread(self._switcher.foresee, given, observation)
        return found


def _answer(status: int, document: dict[str, Any]) -> OperatorAnswer:
    return OperatorAnswer(status=status, body=msgspec.json.encode(document))
