"""Carries a switch out: each wave a transaction, its instructions as tasks, its events journalled.

What is asked of the cluster goes through the door; weights are moved by ``work``. A journal that
cannot be written undoes what is not decided, and does not stop what is.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from oserve.core import Clock, DeploymentPlan
from oserve.switch.journal import Record, opened, recorded
from oserve.switch.programme import ProgrammeStep, SwitchProgramme
from oserve.switch.transaction import (
    DEADLINES_S,
    Cancelled,
    Event,
    Failed,
    Finished,
    Instruction,
    Phase,
    SwitchTarget,
    Task,
    Ticked,
    TransactionState,
    instructions,
    transactions_of,
)
from oserve.switching.journal import Journal, end_record, first_record

_log = logging.getLogger("oserve.switch")

_TICK_S = 0.25
_RETRY_S = 0.2


class TaskFailedError(Exception):
    """A task was not done; ``final``: trying again would not help."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Work(Protocol):
    """Does the tasks of one wave; raises TaskFailedError. See ``switch.transaction.Task``.

    ``begin`` and ``over`` come before the first and after the last of a wave.
    """

    def begin(self, step: ProgrammeStep) -> None: ...

    async def do(self, task: Task, replica: str, *, late: bool) -> None: ...

    async def over(self) -> None: ...


@dataclass(kw_only=True)
class SwitchReport:
    """How a switch stands; times are Unix seconds."""

    id: str
    plan: str
    by: str
    began_s: float
    method: str = "transfer"
    state: str = "running"
    reason: str = ""
    wave: int = 0
    waves: int = 0
    phase: str = ""
    moved_bytes: int = 0
    total_bytes: int = 0
    ended_s: float | None = None
    phases: list[tuple[int, str, float]] = field(default_factory=list)
    programme: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "id": self.id,
            "plan_id": self.plan,
            "by": self.by,
            "method": self.method,
            "state": self.state,
            "reason": self.reason,
            "phase": self.phase,
            "wave": self.wave,
            "waves": self.waves,
            "moved_bytes": self.moved_bytes,
            "total_bytes": self.total_bytes,
            "began_s": self.began_s,
            "ended_s": self.ended_s,
            "phases": [
                {"wave": wave, "phase": phase, "at_s": at_s} for wave, phase, at_s in self.phases
            ],
            "programme": self.programme,
        }


class Drive:
    """One switch. ``run`` returns the plan that is in force at its end."""

    def __init__(
        self,
        programme: SwitchProgramme,
        report: SwitchReport,
        work: Work,
        journal: Journal,
        *,
        clock: Clock,
        unix_s: Callable[[], float],
        plan_text: Callable[[DeploymentPlan], str],
        transfer_limit_s: float = DEADLINES_S[Phase.TRANSFER],
    ) -> None:
        self._programme = programme
        self.report = report
        self._work = work
        self._journal = journal
        self._journalling = True
        self._clock = clock
        self._unix_s = unix_s
        self._plan_text = plan_text
        self._transfer_limit_s = transfer_limit_s
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._running: dict[tuple[Task, str], asyncio.Task[None]] = {}
        self._cancelled = ""
        self._told = False

    def cancel(self, reason: str) -> None:
        """Undo it, if the commit of the present wave is not decided; no further wave is begun."""
        self._cancelled = self._cancelled or reason

    async def run(self) -> DeploymentPlan:
        """All waves, or up to the first that is rolled back."""
        programme, report = self._programme, self.report
        plan = programme.before
        report.waves = len(programme.steps)
        report.total_bytes = sum(_bytes(step) for step in programme.steps)
        try:
            plans = tuple(step.plan for step in programme.steps)
            self._journal.write(
                first_record(report.id, self._unix_s(), plan, plans, self._plan_text)
            )
            before = tuple(spec.id for spec in programme.before.replicas)
            for number, target in enumerate(transactions_of(report.id, programme.order, before)):
                if self._cancelled:
                    report.reason = self._cancelled
                    break
                report.wave = number
                state = await self._wave(number, target)
                if state.phase is Phase.ROLLED_BACK:
                    report.reason = state.reason
                    break
                plan = programme.steps[number].plan
        except OSError as error:
            report.reason = f"the journal cannot be written: {error.strerror}"
        done = not report.reason
        if done and not programme.steps:
            # The same replicas: only shares and names differ.
            plan = programme.target
        report.state = "done" if done else "rolled_back"
        report.ended_s = self._unix_s()
        with contextlib.suppress(OSError):
            self._journal.write(end_record(report.ended_s, report.state, report.reason))
        self._journal.close()
        return plan

    async def _wave(self, number: int, target: SwitchTarget) -> TransactionState:
        step = self._programme.steps[number]
        limits = {**DEADLINES_S, Phase.TRANSFER: step.limit_s(self._transfer_limit_s)}
        target = _with_limits(target, limits)
        state, first = opened(target, self._unix_s())
        self._note(number, state)
        self._journal.write({"wave": number, **first})
        self._work.begin(step)
        count = 1
        try:
            while not state.phase.ended:
                self._ask(state)
                event = await self._next(target.id)
                before = state
                state, count = self._advance(number, state, event, count)
                if state.phase is not before.phase or state.step != before.step:
                    await self._stop_tasks(state)
                if state.phase is not before.phase:
                    self._note(number, state)
        finally:
            await self._stop_tasks(None)
            await self._work.over()
        return state

    def _advance(
        self, number: int, state: TransactionState, event: Event, count: int
    ) -> tuple[TransactionState, int]:
        """The state after an event, on disk."""
        if isinstance(event, Failed):
            _log.warning(
                "switch %s: %s %s: %s", event.transaction, event.task, event.replica, event.reason
            )
        after, record = recorded(state, event, count)
        if record is None:
            return after, count
        problem = self._write({"wave": number, **record})
        if problem and state.phase.may_abort:
            # What the journal does not hold was not decided: a restart would take it back.
            cancelled = Cancelled(
                transaction=event.transaction, at_s=self._unix_s(), reason=problem
            )
            after, _ = recorded(state, cancelled, count)
        return after, count + 1

    def _write(self, record: Record) -> str:
        """Why it could not be written; empty if it was. After a failure nothing more is."""
        if not self._journalling:
            return ""
        try:
            self._journal.write(record)
        except OSError as error:
            self._journalling = False
            return f"the journal cannot be written: {error.strerror or error}"
        return ""

    def _note(self, number: int, state: TransactionState) -> None:
        self.report.phase = state.phase.value
        self.report.phases.append((number, state.phase.value, self._unix_s()))
        _log.info(
            "switch %s: %s%s",
            state.target.id,
            state.phase,
            f" ({state.reason})" if state.phase is Phase.ABORT else "",
        )

    async def _next(self, transaction: str) -> Event:
        """What happens next; time passes at the latest after a tick."""
        if self._cancelled and not self._told:
            self._told = True
            return Cancelled(transaction=transaction, at_s=self._unix_s(), reason=self._cancelled)
        heard = asyncio.ensure_future(self._events.get())
        tick = asyncio.ensure_future(self._clock.sleep(_TICK_S))
        try:
            await asyncio.wait({heard, tick}, return_when=asyncio.FIRST_COMPLETED)
            if heard.done():
                return heard.result()
            return Ticked(transaction=transaction, at_s=self._unix_s())
        finally:
            heard.cancel()
            tick.cancel()

    # -- tasks ----------------------------------------------------------------------------------
    def _ask(self, state: TransactionState) -> None:
        """Start what is to be done and is not being done."""
        for instruction in instructions(state):
            key = instruction.task, instruction.replica
            running = self._running.get(key)
            if running is not None and not instruction.late:
                continue
            if running is not None and running.get_name() == "late":
                continue
            if running is not None:
                running.cancel()
            self._running[key] = asyncio.create_task(
                self._do(instruction), name="late" if instruction.late else "task"
            )

    async def _do(self, instruction: Instruction) -> None:
        task, replica = instruction.task, instruction.replica
        own = asyncio.current_task()
        event: Event
        try:
            await self._work.do(task, replica, late=instruction.late)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, TaskFailedError):
                _log.exception("switch %s", instruction.transaction)
            await self._clock.sleep(_RETRY_S)
            event = Failed(
                transaction=instruction.transaction,
                task=task,
                replica=replica,
                at_s=self._unix_s(),
                reason=str(error) or type(error).__name__,
                final=isinstance(error, TaskFailedError) and error.final,
            )
        else:
            event = Finished(
                transaction=instruction.transaction,
                task=task,
                replica=replica,
                at_s=self._unix_s(),
            )
        if self._running.get((task, replica)) is own:
            del self._running[task, replica]
        self._events.put_nowait(event)

    async def _stop_tasks(self, state: TransactionState | None) -> None:
        """End those that are not asked for any more."""
        asked = () if state is None else instructions(state)
        wanted = {(instruction.task, instruction.replica) for instruction in asked}
        ended = [self._running.pop(key) for key in list(self._running) if key not in wanted]
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.gather(*ended, return_exceptions=True)


def _with_limits(target: SwitchTarget, limits: Mapping[Phase, float]) -> SwitchTarget:
    return SwitchTarget(
        id=target.id,
        serves=target.serves,
        start=target.start,
        retire=target.retire,
        release=target.release,
        stop=target.stop,
        attempts=target.attempts,
        deadlines_s=limits,
    )


def _bytes(step: ProgrammeStep) -> int:
    return step.transfer.traffic.moved_bytes + step.transfer.traffic.local_bytes
