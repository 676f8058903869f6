"""The state of the controller that survives restarts of a server."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from oserve.config import plan_yaml
from oserve.control.controller import Controller
from oserve.control.decision import Decision
from oserve.control.memory import recall, remembered, same_types
from oserve.control.planner import TablePlanner
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.plan.planning import PlanRequest
from oserve.startup.deployment import ServerDeployment
from oserve.startup.saved_state import ReplayContext, SavedPlan, SavedSpeeds
from oserve.startup.store import StateStore, StateUpdate
from oserve.switch.learned import LearnedPhases

_log = logging.getLogger("oserve.control")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The parts of a running controller whose state is saved."""

    controller: Controller
    planner: TablePlanner
    starts: StartTimes
    speeds: SpeedEstimator
    phases: LearnedPhases


class ControllerMemory:
    """Saves and restores a controller; all times are Unix seconds.

    ``request`` is what the controller plans from. Raises OServeError if the state file cannot be
    opened.
    """

    def __init__(
        self, deployment: ServerDeployment, request: PlanRequest, parts: Remembered, *, now_s: float
    ) -> None:
        self._deployment = deployment
        self._request = request
        self._parts = parts
        self._store = StateStore(deployment.state_file)
        self._plan_saved = ""
        self._saved_s = int(now_s)

    def renew(self, deployment: ServerDeployment, request: PlanRequest) -> None:
        """Save what belongs to a deployment on more nodes from now on."""
        self._deployment, self._request = deployment, request

    def recall(self, decisions: int) -> None:
        """Restore what fits this deployment, and at most so many past ``decisions``."""
        parts = self._parts
        centres = parts.planner.facts.centres
        memory = self._store.saved("controller", dict[str, Any])
        if memory is not None and recall(parts.controller, memory, centres):
            _log.info("the controller continues with the state of the last server")
            if same_types(memory, parts.controller.names, centres):
                self._recall_seconds()
        parts.controller.decisions.extend(self._store.decisions(decisions))
        starts = self._store.saved("starts", dict[str, float])
        if starts is not None:
            parts.starts.restore(starts)
        phases = self._store.saved("switches", dict[str, Any])
        if phases is not None:
            parts.phases.restore(phases)

    def _recall_seconds(self) -> None:
        """Add the seconds that were counted after the last decision."""
        controller = self._parts.controller
        collector = controller.monitor.collector
        for second, row in self._store.seconds(after_s=collector.newest_s):
            collector.add(Batch(names=controller.names, arrivals={second: row}))
            collector.tick(second)

    async def save(self, now_s: float, decisions: Sequence[Decision] = ()) -> None:
        """Write the whole state in one transaction, in a thread."""
        plan = plan_yaml(self._parts.controller.plan)
        memory = self._state(plan)
        update = StateUpdate(
            memory={},
            decisions=decisions,
            plan=(now_s, plan) if plan != self._plan_saved else None,
            seconds=self._seconds(now_s),
        )
        self._plan_saved = plan
        await asyncio.to_thread(self._write, update, memory)

    async def save_seconds(self, now_s: float) -> None:
        """Write only what was counted since the last save: a few numbers."""
        update = StateUpdate(memory={}, seconds=self._seconds(now_s))
        await asyncio.to_thread(self._store.save, update)

    def _seconds(self, now_s: float) -> list[tuple[int, list[float]]]:
        """The counts since the last save; they count as saved from now on."""
        end_s = int(now_s) - 1
        rows = self._parts.controller.monitor.collector.rows(self._saved_s, end_s)
        self._saved_s = end_s + 1
        return rows

    def _state(self, plan: str) -> dict[str, object]:
        parts = self._parts
        return {
            "controller": remembered(parts.controller, parts.planner.facts.centres),
            "plan": SavedPlan(
                fingerprint=self._deployment.fingerprint, given=self._deployment.given, plan=plan
            ),
            "starts": parts.starts.state(),
            "switches": parts.phases.state(),
            "speeds": SavedSpeeds(source=self._request.source.origin, seen=parts.speeds.state()),
            "context": ReplayContext(
                settings=msgspec.to_builtins(self._deployment.settings),
                devices=self._deployment.devices,
                demand=self._request.demand,
                shapes=self._request.shapes,
                network=self._deployment.network,
            ),
        }

    def _write(self, update: StateUpdate, memory: dict[str, object]) -> None:
        encoded = {name: msgspec.json.encode(value) for name, value in memory.items()}
        self._store.save(replace(update, memory=encoded))
