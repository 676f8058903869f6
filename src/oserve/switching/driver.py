"""Drives a switch: each wave is a transaction, its instructions run as tasks.

The journal holds every change before it is acted on. If it cannot be written, a wave whose commit
is not decided is rolled back, and a wave that is committed goes on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from oserve.core import Clock, DeploymentPlan
from oserve.switch.journal import EndLine, JournalLine, SwitchLine, opened, recorded
from oserve.switch.programme import ProgrammeStep, SwitchProgramme
from oserve.switch.transaction import (
    DEADLINES_S,
    Cancelled,
    FailedTask,
    Instruction,
    SwitchTarget,
    Task,
    TaskFailed,
    TaskFinished,
    Ticked,
    TransactionEvent,
    TransactionPhase,
    TransactionState,
    instructions,
    transactions_of,
)
from oserve.switching.journal import Journal
from oserve.switching.report import SwitchReport, SwitchStatus
from oserve.switching.tasks import TaskFailedError

_log = logging.getLogger("oserve.switch")

_RETRY_S = 0.2
# A deadline is checked slightly late, so that rounding cannot make it appear early.
_AFTER_S = 0.01


class TaskRunner(Protocol):
    """Runs the tasks of one wave. ``run`` raises TaskFailedError.

    ``returned``: why the plan before the wave is in force again after the commit, or "".
    """

    @property
    def returned(self) -> str: ...

    async def run(self, task: Task, replica: str, *, late: bool) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """``tasks`` makes the runner of a wave, given the bytes that earlier waves moved.

    ``plan_text`` formats a plan as a plan file. ``transfer_limit_s``: the lower bound on the
    deadline of a transfer.
    """

    programme: SwitchProgramme
    report: SwitchReport
    tasks: Callable[[ProgrammeStep, int], TaskRunner]
    journal: Journal
    clock: Clock
    unix_s: Callable[[], float]
    plan_text: Callable[[DeploymentPlan], str]
    transfer_limit_s: float = DEADLINES_S[TransactionPhase.TRANSFER]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchOutcome:
    """``plan`` is in force after a switch; ``reason``: why it is not the requested one.

    ``cause``: the task whose failure rolled the switch back, if any.
    """

    plan: DeploymentPlan
    reason: str = ""
    cause: FailedTask | None = None


class SwitchDriver:
    """Drives one switch."""

    def __init__(self, facts: DriverFacts) -> None:
        self._facts = facts
        self._cancelled = ""
        self._wave: _WaveDriver | None = None

    @property
    def programme(self) -> SwitchProgramme:
        """The switch that this drives."""
        return self._facts.programme

    def cancel(self, reason: str) -> None:
        """Roll the present wave back unless its commit is decided; begin no further wave."""
        self._cancelled = self._cancelled or reason
        if self._wave is not None:
            self._wave.cancel(self._cancelled)

    async def run(self) -> SwitchOutcome:
        """Drive all waves, or up to the first that is rolled back."""
        facts, report = self._facts, self._facts.report
        programme = facts.programme
        report.waves = len(programme.steps)
        report.total_bytes = sum(step.moved_bytes for step in programme.steps)
        journal = _GuardedJournal(facts.journal)
        outcome = SwitchOutcome(plan=programme.before)
        try:
            journal.start(self._first_line())
            outcome = await self._waves(journal)
        except OSError as error:
            outcome = replace(outcome, reason=_unwritable(error))
        done = not outcome.reason
        if done and not programme.steps:
            # The replicas are the same; only shares and names differ.
            outcome = replace(outcome, plan=programme.target)
        status = SwitchStatus.DONE if done else SwitchStatus.ROLLED_BACK
        report.ended(status, outcome.reason, facts.unix_s())
        journal.close(EndLine(at_s=facts.unix_s(), state=status.value, reason=outcome.reason))
        return outcome

    def _first_line(self) -> SwitchLine:
        programme, text = self._facts.programme, self._facts.plan_text
        return SwitchLine(
            id=self._facts.report.id,
            at_s=self._facts.unix_s(),
            before=text(programme.before),
            plans=tuple(text(step.plan) for step in programme.steps),
        )

    async def _waves(self, journal: "_GuardedJournal") -> SwitchOutcome:
        facts, programme = self._facts, self._facts.programme
        plan = programme.before
        moved = 0
        old = tuple(spec.id for spec in programme.before.replicas)
        targets = transactions_of(facts.report.id, programme.order, old)
        for step, target in zip(programme.steps, targets, strict=True):
            if self._cancelled:
                return SwitchOutcome(plan=plan, reason=self._cancelled)
            facts.report.wave = step.number
            self._wave = wave = _WaveDriver(facts, step, target, journal)
            try:
                state = await wave.run(moved)
            except OSError as error:
                return SwitchOutcome(plan=plan, reason=_unwritable(error))
            finally:
                self._wave = None
            if state.phase is TransactionPhase.ROLLED_BACK:
                return SwitchOutcome(plan=plan, reason=state.reason, cause=state.cause)
            if wave.returned:
                return SwitchOutcome(plan=plan, reason=wave.returned)
            plan = step.plan
            moved += step.moved_bytes
        return SwitchOutcome(plan=plan)


class _GuardedJournal:
    """A journal that accepts no further line of a wave after a failed write."""

    def __init__(self, inner: Journal) -> None:
        self._inner = inner
        self._error: OSError | None = None

    def start(self, line: JournalLine) -> None:
        """Write the line that begins a switch or a wave. Raises OSError if it must not begin."""
        if self._error is not None:
            raise self._error
        self._inner.write(line)

    def write(self, line: JournalLine) -> str:
        """Write a line; returns why the write failed, or "". Later calls return ""."""
        if self._error is not None:
            return ""
        try:
            self._inner.write(line)
        except OSError as error:
            self._error = error
            return _unwritable(error)
        return ""

    def close(self, end: EndLine) -> None:
        """Write the last line if possible."""
        with contextlib.suppress(OSError):
            self._inner.write(end)
        self._inner.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _RunningTask:
    """A running task; ``late``: past its deadline, it does not wait for requests."""

    task: asyncio.Task[None]
    late: bool


class _WaveDriver:
    """Drives the transaction of one wave."""

    def __init__(
        self,
        facts: DriverFacts,
        step: ProgrammeStep,
        target: SwitchTarget,
        journal: _GuardedJournal,
    ) -> None:
        self._facts = facts
        self._step = step
        limits = {**DEADLINES_S, TransactionPhase.TRANSFER: step.limit_s(facts.transfer_limit_s)}
        self._target = replace(target, deadlines_s=limits)
        self._journal = journal
        self._events: asyncio.Queue[TransactionEvent] = asyncio.Queue()
        self._running: dict[tuple[Task, str], _RunningTask] = {}
        self._written = 0
        self.returned = ""

    def cancel(self, reason: str) -> None:
        self._events.put_nowait(
            Cancelled(transaction=self._target.id, at_s=self._facts.unix_s(), reason=reason)
        )

    async def run(self, moved_before: int) -> TransactionState:
        """Return the state in which the transaction ends. Raises OSError if it cannot begin."""
        state, first = opened(self._target, self._facts.unix_s(), wave=self._step.number)
        self._note(state)
        self._journal.start(first)
        self._written = 1
        tasks = self._facts.tasks(self._step, moved_before)
        try:
            while not state.phase.ended:
                self._start_tasks(tasks, state)
                event = await self._next(state)
                before = state
                state = self._advance(state, event)
                if state.phase is not before.phase or state.step != before.step:
                    await self._cancel_tasks(state)
                if state.phase is not before.phase:
                    self._note(state)
        finally:
            await self._cancel_tasks(None)
            self.returned = tasks.returned
            await tasks.close()
        return state

    def _advance(self, state: TransactionState, event: TransactionEvent) -> TransactionState:
        """Return the state after an event, once the journal holds the event."""
        if isinstance(event, TaskFailed):
            _log.warning(
                "switch %s: %s %s: %s", event.transaction, event.task, event.replica, event.reason
            )
        after, line = recorded(state, event, self._written, wave=self._step.number)
        if line is None:
            return after
        problem = self._journal.write(line)
        self._written += 1
        if problem and state.phase.may_abort:
            # A change is decided only once the journal holds it; a restart would undo it otherwise.
            cancelled = Cancelled(
                transaction=event.transaction, at_s=self._facts.unix_s(), reason=problem
            )
            after, _ = recorded(state, cancelled, self._written, wave=self._step.number)
        return after

    def _note(self, state: TransactionState) -> None:
        self._facts.report.entered(self._step.number, state.phase, self._facts.unix_s())
        _log.info(
            "switch %s: %s%s",
            state.target.id,
            state.phase,
            f" ({state.reason})" if state.phase is TransactionPhase.ABORT else "",
        )

    async def _next(self, state: TransactionState) -> TransactionEvent:
        """Wait for an event, or for the deadline of the phase."""
        if state.late:
            return await self._events.get()
        deadline_s = state.entered_s + state.target.deadlines_s[state.phase]
        left_s = max(0.0, deadline_s - self._facts.unix_s()) + _AFTER_S
        heard = asyncio.ensure_future(self._events.get())
        deadline = asyncio.ensure_future(self._facts.clock.sleep(left_s))
        try:
            await asyncio.wait({heard, deadline}, return_when=asyncio.FIRST_COMPLETED)
            if heard.done():
                return heard.result()
            return Ticked(transaction=state.target.id, at_s=self._facts.unix_s())
        finally:
            heard.cancel()
            deadline.cancel()

    # -- tasks ----------------------------------------------------------------------------------
    def _start_tasks(self, tasks: TaskRunner, state: TransactionState) -> None:
        """Start the requested tasks that do not run; past the deadline, restart them."""
        for instruction in instructions(state):
            key = instruction.task, instruction.replica
            running = self._running.get(key)
            if running is not None and (running.late or not instruction.late):
                continue
            if running is not None:
                running.task.cancel()
            self._running[key] = _RunningTask(
                task=asyncio.create_task(self._run_task(tasks, instruction)), late=instruction.late
            )

    async def _run_task(self, tasks: TaskRunner, instruction: Instruction) -> None:
        """Run a task and queue its outcome as an event."""
        task, replica = instruction.task, instruction.replica
        failed: TaskFailedError | None = None
        try:
            await tasks.run(task, replica, late=instruction.late)
        except TaskFailedError as error:
            failed = error
        except Exception as error:  # an unforeseen fault must not leave the switch incomplete
            _log.exception("switch %s: %s %s", instruction.transaction, task, replica)
            failed = TaskFailedError(f"{type(error).__name__}: {error}", final=True)
        if failed is not None:
            await self._facts.clock.sleep(_RETRY_S)
        running = self._running.get((task, replica))
        if running is not None and running.task is asyncio.current_task():
            del self._running[task, replica]
        self._events.put_nowait(self._ended(instruction, failed))

    def _ended(self, instruction: Instruction, failed: TaskFailedError | None) -> TransactionEvent:
        at_s = self._facts.unix_s()
        if failed is None:
            return TaskFinished(
                transaction=instruction.transaction,
                task=instruction.task,
                replica=instruction.replica,
                at_s=at_s,
            )
        return TaskFailed(
            transaction=instruction.transaction,
            task=instruction.task,
            replica=instruction.replica,
            at_s=at_s,
            reason=str(failed),
            final=failed.final,
        )

    async def _cancel_tasks(self, state: TransactionState | None) -> None:
        """Cancel the tasks that are no longer requested."""
        requested = () if state is None else instructions(state)
        wanted = {(instruction.task, instruction.replica) for instruction in requested}
        ended = [self._running.pop(key).task for key in list(self._running) if key not in wanted]
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.gather(*ended, return_exceptions=True)


def _unwritable(error: OSError) -> str:
    return f"the journal cannot be written: {error.strerror or error}"
