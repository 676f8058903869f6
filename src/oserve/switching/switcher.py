"""Switches from plan to plan: one at a time, by moving weights or by restarts.

The last requested plan wins: a running switch is rolled back unless its commit is decided. If
weights cannot be moved, the control loop rolls the plan out, and the report gives the reason.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from oserve.control.cluster import Cluster
from oserve.control.loop import ControlLoop
from oserve.control.rollout import settled
from oserve.core import Clock, DeploymentPlan, Observation, OServeError
from oserve.switch.preview import between_nodes_line, programme_document
from oserve.switch.programme import ProgrammeStep, SwitchFacts, SwitchProgramme, prepare_switch
from oserve.switch.transaction import TransactionPhase
from oserve.switching.driver import DriverFacts, SwitchDriver, SwitchOutcome
from oserve.switching.journal import FileJournal, Journal, prune
from oserve.switching.report import SwitchMethod, SwitchReport, SwitchStatus
from oserve.switching.tasks import WaveTaskFacts, WaveTasks
from oserve.switching.weights import WaveWeights

_log = logging.getLogger("oserve.switch")

_MOST_REPORTS = 20
_T = TypeVar("_T")


class Compute(Protocol):
    """Runs a computation: in a thread on a server, at once on a virtual clock."""

    async def __call__(self, work: Callable[[], _T], /) -> _T: ...


async def at_once(work: Callable[[], _T], /) -> _T:
    """Run a computation in the event loop; on a virtual clock it takes no time."""
    return work()


async def in_thread(work: Callable[[], _T], /) -> _T:
    """Run a computation in a thread."""
    return await asyncio.to_thread(work)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitcherFacts:
    """The dependencies of a switcher. ``folder``: of the journals.

    ``movable``: the facts for preparing switches, or why weights cannot be moved. ``settle`` gets
    the outcome of each switch, in the event loop. ``publish`` starts the next round of the control
    loop. ``weights`` makes the ``WaveWeights`` of a switch from its id. ``plan_text`` formats a
    plan as a plan file. ``transfer_limit_s``: the lower bound on the deadline of a transfer. A
    switch polls the cluster every ``poll_s``.
    """

    folder: Path
    movable: SwitchFacts | str
    cluster: Cluster
    loop: ControlLoop
    clock: Clock
    settle: Callable[[SwitchOutcome], None]
    publish: Callable[[], Awaitable[None]]
    weights: Callable[[str, SwitchProgramme], WaveWeights]
    plan_text: Callable[[DeploymentPlan], str]
    unix_s: Callable[[], float]
    transfer_limit_s: float
    journal: Callable[[Path], Journal] = FileJournal
    compute: Compute = in_thread
    poll_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _SwitchRequest:
    """A requested plan, to replace the one in force."""

    report: SwitchReport
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreparedSwitch:
    """A switch that is ready to run."""

    programme: SwitchProgramme
    weights: WaveWeights
    journal: Journal


class Switcher:
    """Accepts requested plans and executes their switches one after another."""

    def __init__(self, facts: SwitcherFacts) -> None:
        self._facts = facts
        self._movable = facts.movable
        self._reports: deque[SwitchReport] = deque(maxlen=_MOST_REPORTS)
        self._request: _SwitchRequest | None = None
        self._driver: SwitchDriver | None = None
        self._task: asyncio.Task[None] | None = None
        self._count = 0

    @property
    def active(self) -> bool:
        """Whether a switch by moving weights is requested or running."""
        return self._task is not None and not self._task.done()

    @property
    def programme(self) -> SwitchProgramme | None:
        """The running switch."""
        return None if self._driver is None else self._driver.programme

    def use(self, movable: SwitchFacts | str) -> None:
        """Prepare switches from other facts from now on; one that runs goes on as it is."""
        self._movable = movable

    def want(self, plan: DeploymentPlan, by: str) -> SwitchReport:
        """Request a switch to this plan; the returned report follows its progress."""
        now_s = self._facts.unix_s()
        self._count += 1
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_s))
        report = SwitchReport(id=f"{stamp}-{self._count}", plan=plan.id, by=by, began_s=now_s)
        self._reports.append(report)
        if self._request is not None:
            reason = f"plan {plan.id} was requested instead"
            self._request.report.ended(SwitchStatus.SUPERSEDED, reason, now_s)
        self._request = _SwitchRequest(report=report, plan=plan)
        if self._driver is not None:
            self._driver.cancel(f"plan {plan.id} was requested instead")
        if not self.active:
            self._task = asyncio.ensure_future(self._run_all())
        return report

    def cancel(self, reason: str) -> bool:
        """Roll back the running switch; False if there is none."""
        if self._driver is None:
            return False
        self._driver.cancel(reason)
        return True

    async def close(self) -> None:
        """Stop at once; the journal determines the plan of the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- documents ------------------------------------------------------------------------------
    def foresee(self, plan: DeploymentPlan, observation: Observation) -> dict[str, Any]:
        """The preview of a switch to this plan, as JSON values."""
        try:
            programme = self._programme(plan, observation)
        except OServeError as error:
            return {"method": SwitchMethod.RESTART.value, "reason": error.message}
        document = programme_document(programme, _running(observation))
        return {"method": SwitchMethod.TRANSFER.value, **document}

    def observe(self, observation: Observation) -> None:
        """Close the reports of roll-outs that are complete or superseded."""
        plan = self._facts.loop.plan
        for report in self._reports:
            if report.state is not SwitchStatus.ROLLING_OUT:
                continue
            if report.plan != plan.id:
                report.ended(SwitchStatus.SUPERSEDED, report.reason, self._facts.unix_s())
            elif settled(
                self._facts.loop.nodes.runnable(plan, observation), observation, frozenset()
            ):
                report.ended(SwitchStatus.DONE, report.reason, self._facts.unix_s())

    def documents(self) -> list[dict[str, Any]]:
        """The reports of recent switches as JSON values, oldest first."""
        return [report.document() for report in self._reports]

    # -- execution ------------------------------------------------------------------------------
    async def _run_all(self) -> None:
        while self._request is not None:
            request, self._request = self._request, None
            try:
                await self._run(request.report, request.plan)
            except Exception as error:  # an unforeseen fault: serving continues as before
                _log.exception("switch %s", request.report.id)
                reason = f"{type(error).__name__}: {error}"
                request.report.ended(SwitchStatus.FAILED, reason, self._facts.unix_s())
                self._facts.loop.held = frozenset()
            finally:
                self._driver = None

    async def _run(self, report: SwitchReport, plan: DeploymentPlan) -> None:
        facts = self._facts
        observation = await facts.loop.look()
        try:
            prepared = await facts.compute(lambda: self._prepared(report.id, plan, observation))
        except OServeError as error:
            await self._roll_out(report, plan, error.message)
            return
        report.state = SwitchStatus.RUNNING
        report.programme = programme_document(prepared.programme, _running(observation))
        self._driver = SwitchDriver(self._driver_facts(report, prepared))
        between = between_nodes_line(report.programme)
        _log.info(
            "switch %s: weights move from engine to engine%s",
            report.id,
            f"; {between}" if between else "",
        )
        outcome = await self._driver.run()
        self._learn(report, prepared.programme)
        if facts.loop.plan is not outcome.plan:
            facts.loop.plan = outcome.plan
        if self._request is None:
            facts.settle(outcome)
        await facts.publish()
        _log.info("switch %s: %s %s", report.id, report.state, report.reason)
        prune(facts.folder)

    async def _roll_out(self, report: SwitchReport, plan: DeploymentPlan, reason: str) -> None:
        """Leave the plan to the control loop."""
        _log.info("switch %s: by restarts, since %s", report.id, reason)
        report.method, report.state = SwitchMethod.RESTART, SwitchStatus.ROLLING_OUT
        report.reason = reason
        self._facts.loop.plan = plan
        await self._facts.publish()

    def _learn(self, report: SwitchReport, programme: SwitchProgramme) -> None:
        """Learn the durations of phases from completed waves."""
        movable = self._movable
        if isinstance(movable, str):
            return
        for step in programme.steps:
            took_s = report.durations_s(step.number)
            if TransactionPhase.DONE not in took_s:
                continue
            if step.wave.stop or step.wave.release:
                # The part of it that was draining is unknown.
                took_s.pop(TransactionPhase.PREPARE, None)
            movable.learned.observe(step.predicted, took_s)

    def _driver_facts(self, report: SwitchReport, prepared: _PreparedSwitch) -> DriverFacts:
        facts = self._facts

        def tasks(step: ProgrammeStep, moved_before: int) -> WaveTasks:
            return WaveTasks(self._task_facts(report, prepared), step, moved_before)

        return DriverFacts(
            programme=prepared.programme,
            report=report,
            tasks=tasks,
            journal=prepared.journal,
            clock=facts.clock,
            unix_s=facts.unix_s,
            plan_text=facts.plan_text,
            transfer_limit_s=facts.transfer_limit_s,
        )

    def _task_facts(self, report: SwitchReport, prepared: _PreparedSwitch) -> WaveTaskFacts:
        facts = self._facts

        def progress(size: int) -> None:
            report.moved_bytes = size

        def hold(names: frozenset[str]) -> None:
            facts.loop.held = names

        async def route(plan: DeploymentPlan) -> None:
            facts.loop.plan = plan
            await facts.publish()

        return WaveTaskFacts(
            programme=prepared.programme,
            cluster=facts.cluster,
            clock=facts.clock,
            weights=prepared.weights,
            hold=hold,
            route=route,
            progress=progress,
            poll_s=facts.poll_s,
        )

    def _prepared(
        self, switch: str, plan: DeploymentPlan, observation: Observation
    ) -> _PreparedSwitch:
        """Raises OServeError where replicas must restart."""
        programme = self._programme(plan, observation)
        weights = self._facts.weights(switch, programme)
        path = self._facts.folder / f"{switch}.jsonl"
        try:
            journal = self._facts.journal(path)
        except OSError as error:
            raise _by_restarts(f"its journal cannot be written: {error.strerror}") from None
        return _PreparedSwitch(programme=programme, weights=weights, journal=journal)

    def _programme(self, plan: DeploymentPlan, observation: Observation) -> SwitchProgramme:
        """Raises OServeError where replicas must restart."""
        movable = self._movable
        if isinstance(movable, str):
            raise _by_restarts(movable)
        loop = self._facts.loop
        # Replicas on lost nodes are no part of what serves.
        current = loop.nodes.runnable(loop.plan, observation)
        if not settled(current, observation, frozenset()):
            raise _by_restarts("the serving replicas are not those of the present plan")
        return prepare_switch(movable, current, plan)


def _running(observation: Observation) -> dict[str, int]:
    """Return the requests on each replica."""
    return {state.spec.id: state.running + state.waiting for state in observation.replicas}


def _by_restarts(reason: str) -> OServeError:
    return OServeError(reason, place="switch", remedy="the control loop rolls it out by restarts")
