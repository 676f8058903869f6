"""From plan to plan on a live server: one switch at a time, by moving weights or by restarts.

The plan wished for last wins: one that is under way is taken back if it is not decided yet. Where
weights cannot be moved the control loop rolls the plan out, and the report says why.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from oserve.app.switching.drive import Drive, Report
from oserve.app.switching.programme import Programme, SwitchFacts, prepare_switch
from oserve.app.switching.record import FileJournal, Journal, journal_folder, prune
from oserve.app.switching.work import ClusterWork, Moving, WorkFacts
from oserve.config import Settings
from oserve.control.cluster import Cluster
from oserve.control.loop import ControlLoop
from oserve.control.rollout import settled
from oserve.core import Clock, DeploymentPlan, Endpoint, Observation, OServeError
from oserve.engines.mover import Mover
from oserve.switch.transaction import Phase

_log = logging.getLogger("oserve.switch")

_MOST_REPORTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitcherFacts:
    """What a switcher works on. ``model``: the name that engines serve under.

    ``movable``: what switches are made from, or why weights cannot be moved (see ``prices``).
    ``settle``: called in the event loop with the plan that is in force after a switch and the
    reason it is not the one wished for (empty if it is). ``published``: the control loop's next
    round, at once. ``journal``, ``mover`` and ``unix_s`` are for tests.
    """

    settings: Settings
    movable: SwitchFacts | str
    model: str
    cluster: Cluster
    loop: ControlLoop
    clock: Clock
    settle: Callable[[DeploymentPlan, str], None]
    publish: Callable[[], Awaitable[None]]
    journal: Callable[[Path], Journal] = FileJournal
    mover: Callable[[Mapping[str, Endpoint]], Moving] | None = None
    unix_s: Callable[[], float] = time.time


class Switcher:
    """Takes wishes; ``run_all`` carries them out, one after the other."""

    def __init__(self, facts: SwitcherFacts) -> None:
        self._facts = facts
        self._switch_facts = facts.movable if isinstance(facts.movable, SwitchFacts) else None
        self._unmovable = "" if isinstance(facts.movable, SwitchFacts) else facts.movable
        self._reports: deque[Report] = deque(maxlen=_MOST_REPORTS)
        self._wished: tuple[Report, DeploymentPlan] | None = None
        self._drive: Drive | None = None
        self._task: asyncio.Task[None] | None = None
        self._count = 0

    @property
    def active(self) -> bool:
        """Whether a switch by moving weights is wished for or under way."""
        return self._task is not None and not self._task.done()

    def want(self, plan: DeploymentPlan, by: str) -> Report:
        """Go to this plan; the report tells how it goes."""
        now_s = self._facts.unix_s()
        self._count += 1
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_s))
        report = Report(id=f"{stamp}-{self._count}", plan=plan.id, by=by, began_s=now_s)
        report.state = "waiting"
        self._reports.append(report)
        if self._wished is not None:
            self._end(self._wished[0], "superseded", f"plan {plan.id} was wished for instead")
        self._wished = (report, plan)
        if self._drive is not None:
            self._drive.cancel(f"plan {plan.id} is wished for instead")
        if not self.active:
            self._task = asyncio.ensure_future(self._run_all())
        return report

    def cancel(self, reason: str) -> bool:
        """Take back what is under way; False if nothing is."""
        if self._drive is None:
            return False
        self._drive.cancel(reason)
        return True

    async def close(self) -> None:
        """Break off; the journal tells the next server what holds."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- telling --------------------------------------------------------------------------------
    def foresee(self, plan: DeploymentPlan, observation: Observation) -> dict[str, Any]:
        """What a switch to this plan would do now."""
        try:
            programme = self._prepared(plan, observation)
        except OServeError as error:
            return {"method": "restart", "reason": error.message}
        running = {s.spec.id: s.running + s.waiting for s in observation.replicas}
        return {"method": "transfer", **programme.document(running)}

    def documents(self, observation: Observation | None) -> list[dict[str, Any]]:
        """All switches that are remembered, oldest first."""
        plan = self._facts.loop.plan
        for report in self._reports:
            if report.state == "rolling_out" and (
                report.plan != plan.id
                or (observation is not None and settled(plan, observation, frozenset()))
            ):
                over = report.plan == plan.id
                self._end(report, "done" if over else "superseded", report.reason)
        return [report.document() for report in self._reports]

    def _end(self, report: Report, state: str, reason: str) -> None:
        report.state, report.reason = state, reason
        report.ended_s = self._facts.unix_s()

    # -- doing ----------------------------------------------------------------------------------
    async def _run_all(self) -> None:
        while self._wished is not None:
            report, plan = self._wished
            self._wished = None
            try:
                await self._one(report, plan)
            except Exception as error:
                # Serving goes on with whatever plan is in force.
                _log.exception("switch %s", report.id)
                self._end(report, "failed", f"{type(error).__name__}: {error}")
                self._facts.loop.held = frozenset()
            finally:
                self._drive = None

    async def _one(self, report: Report, plan: DeploymentPlan) -> None:
        facts = self._facts
        observation = await facts.cluster.observe()
        try:
            programme = await asyncio.to_thread(self._prepared, plan, observation)
            journal = self._journal(report.id)
        except OServeError as error:
            _log.info("switch %s: restarts, since %s", report.id, error.message)
            report.method, report.state, report.reason = "restart", "rolling_out", error.message
            facts.loop.plan = plan
            await facts.publish()
            return
        report.state = "running"
        report.programme = programme.document(
            {s.spec.id: s.running + s.waiting for s in observation.replicas}
        )
        work = ClusterWork(self._work_facts(report, programme))
        self._drive = Drive(
            programme,
            report,
            work,
            journal,
            clock=facts.clock,
            unix_s=facts.unix_s,
            transfer_limit_s=facts.settings.switch.transfer_limit_s,
        )
        _log.info("switch %s: weights move from engine to engine", report.id)
        reached = await self._drive.run()
        self._learn(report, programme)
        if facts.loop.plan is not reached:
            facts.loop.plan = reached
        if self._wished is None:
            facts.settle(reached, report.reason)
        await facts.publish()
        _log.info("switch %s: %s %s", report.id, report.state, report.reason)
        prune(journal_folder(facts.settings))

    def _learn(self, report: Report, programme: Programme) -> None:
        """What the waves that came to their end took, for the next prediction."""
        assert self._switch_facts is not None
        moments = [*report.phases, (-1, "", report.ended_s or self._facts.unix_s())]
        for number, step in enumerate(programme.steps):
            took_s = {
                phase: next_s - at_s
                for (wave, phase, at_s), (_, _, next_s) in pairwise(moments)
                if wave == number
            }
            if Phase.DONE not in took_s:
                continue
            if step.wave.stop or step.wave.release:
                # Nobody knows how much of it was draining.
                del took_s[Phase.PREPARE]
            self._switch_facts.learned.observe(step.predicted, took_s)

    def _work_facts(self, report: Report, programme: Programme) -> WorkFacts:
        facts = self._facts
        assert self._switch_facts is not None

        def progress(size: int) -> None:
            report.moved_bytes = size

        def hold(names: frozenset[str]) -> None:
            facts.loop.held = names

        async def route(plan: DeploymentPlan) -> None:
            facts.loop.plan = plan
            await facts.publish()

        return WorkFacts(
            name=report.id,
            programme=programme,
            architecture=self._switch_facts.model.architecture,
            cluster=facts.cluster,
            clock=facts.clock,
            model=facts.model,
            hold=hold,
            route=route,
            progress=progress,
            mover=facts.mover or partial(_mover, facts.clock, facts.settings.switch.bytes_per_s),
            transfer_limit_s=facts.settings.switch.transfer_limit_s,
            max_perplexity_rise=facts.settings.switch.max_perplexity_rise,
        )

    def _prepared(self, plan: DeploymentPlan, observation: Observation) -> Programme:
        """Raises OServeError where it must go by restarts."""
        if self._switch_facts is None:
            raise _by_restarts(self._unmovable)
        current = self._facts.loop.plan
        if not settled(current, observation, frozenset()):
            raise _by_restarts("not all replicas of the present plan serve, or others do")
        programme = prepare_switch(self._switch_facts, current, plan)
        for step in programme.steps:
            if step.wave.start and step.predicted.transfer_s > 0 and not step.orders:
                raise _by_restarts("there is nobody to copy from")
        return programme

    def _journal(self, switch: str) -> Journal:
        path = journal_folder(self._facts.settings) / f"{switch}.jsonl"
        try:
            return self._facts.journal(path)
        except OSError as error:
            raise _by_restarts(f"its journal cannot be kept: {error.strerror}") from None


def _mover(clock: Clock, bytes_per_s: float, places: Mapping[str, Endpoint]) -> Mover:
    return Mover(places, clock, bytes_per_s=bytes_per_s)


def _by_restarts(reason: str) -> OServeError:
    return OServeError(reason, place="switch", remedy="it is rolled out by restarts")
