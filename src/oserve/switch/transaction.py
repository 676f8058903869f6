"""A wave of a switch as a transaction: events in, instructions out, without I/O.

    prepare -> transfer -> verify -> commit -> drain -> done
       \\__________\\_________\\-> abort -> rolled back

The old replicas serve until the commit, which is one change of the routing table to the absolute
set ``serves``. Until the commit is decided, every failure, deadline or cancellation rolls the wave
back. After it, nothing does: a task that fails is retried. Instructions follow from the state
alone, so a repeated instruction, a lost answer or a restart is harmless. The driver runs each task
at most once at a time, and answers again when asked again. ``journal`` makes a transaction
durable.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from oserve.switch.waves import WaveOrder


class TransactionPhase(StrEnum):
    """The phases of a transaction."""

    PREPARE = "prepare"
    TRANSFER = "transfer"
    VERIFY = "verify"
    COMMIT = "commit"
    DRAIN = "drain"
    DONE = "done"
    ABORT = "abort"
    ROLLED_BACK = "rolled_back"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self in {TransactionPhase.DONE, TransactionPhase.ROLLED_BACK}

    @property
    def may_abort(self) -> bool:
        """Whether the commit is not decided yet."""
        return self in {
            TransactionPhase.PREPARE,
            TransactionPhase.TRANSFER,
            TransactionPhase.VERIFY,
        }


class Task(StrEnum):
    """What the driver is asked to do, for one replica unless said otherwise.

    ``RELEASE``: drain, free the KV cache, keep the weights. ``STOP``: drain and stop. ``START``: a
    warmed standby engine that no request reaches. ``FILL``: its weights, by the wave's transfer
    plan. ``CHECK``: layout, checksums and one generation. ``ROUTE``: set the routing table to
    ``serves``; its replica is ``""``. ``RETIRE``: drain and stop. ``UNDO``: stop a standby engine.
    ``RESTORE``: serve as before, with its cache or restarted.
    """

    RELEASE = "release"
    STOP = "stop"
    START = "start"
    FILL = "fill"
    CHECK = "check"
    ROUTE = "route"
    RETIRE = "retire"
    UNDO = "undo"
    RESTORE = "restore"


DEADLINES_S: Mapping[TransactionPhase, float] = {
    TransactionPhase.PREPARE: 180.0,
    TransactionPhase.TRANSFER: 60.0,
    TransactionPhase.VERIFY: 60.0,
    TransactionPhase.COMMIT: 10.0,
    TransactionPhase.DRAIN: 600.0,
    TransactionPhase.ABORT: 120.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchTarget:
    """What a transaction is to reach, by replica id; see ``Wave``.

    ``serves``: all replicas in the routing table after the commit. Before the commit a task runs
    at most ``attempts`` times; each phase has a deadline in ``deadlines_s``.
    """

    id: str
    serves: tuple[str, ...]
    start: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    attempts: int = 3
    deadlines_s: Mapping[TransactionPhase, float] = field(default_factory=lambda: DEADLINES_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFinished:
    """A task is done for a replica (``""`` for ROUTE). Times are Unix seconds."""

    transaction: str
    task: Task
    replica: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailed:
    """A task failed; ``final``: a retry would not help."""

    transaction: str
    task: Task
    replica: str
    at_s: float
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """A request to roll back, which counts until the commit is decided."""

    transaction: str
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time passed."""

    transaction: str
    at_s: float


TransactionEvent = TaskFinished | TaskFailed | Cancelled | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A task to run now. ``late``: the phase is past its deadline, so do not wait for requests."""

    transaction: str
    task: Task
    replica: str
    attempt: int
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTask:
    """The task, and its replica, whose failure rolled a transaction back."""

    task: Task
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionState:
    """A transaction. ``step`` counts within the phase; ``done`` are replicas of that step.

    ``failures`` counts failures of the step by replica. ``reason`` says why the transaction was
    rolled back, or what failed last; ``cause`` is the task that did it, if one did.
    """

    target: SwitchTarget
    phase: TransactionPhase
    entered_s: float
    step: int = 0
    done: frozenset[str] = frozenset()
    failures: tuple[tuple[str, int], ...] = ()
    late: bool = False
    reason: str = ""
    cause: FailedTask | None = None


def begin(target: SwitchTarget, at_s: float) -> TransactionState:
    """Return a transaction at its start, at ``at_s`` Unix seconds."""
    return _settled(
        TransactionState(target=target, phase=TransactionPhase.PREPARE, entered_s=at_s), at_s
    )


def instructions(state: TransactionState) -> tuple[Instruction, ...]:
    """Return the tasks to run now, all at once and in any order."""
    work = _work(state)
    if work is None:
        return ()
    task, replicas = work
    failures = dict(state.failures)
    return tuple(
        Instruction(
            transaction=state.target.id,
            task=task,
            replica=replica,
            attempt=failures.get(replica, 0) + 1,
            late=state.late,
        )
        for replica in replicas
        if replica not in state.done
    )


def advance(state: TransactionState, event: TransactionEvent) -> TransactionState:
    """Return the state after an event; the very same state if the event changes nothing.

    Events of other transactions, of steps that are over and of other replicas change nothing.
    """
    if event.transaction != state.target.id or state.phase.ended:
        return state
    match event:
        case TaskFinished():
            return _finished(state, event)
        case TaskFailed():
            return _failed(state, event)
        case Cancelled():
            return _aborted(state, event.reason, event.at_s)
        case Ticked():
            return _ticked(state, event)


def transactions_of(
    switch: str, order: WaveOrder, old: tuple[str, ...]
) -> tuple[SwitchTarget, ...]:
    """Return a transaction for each wave, from one whole deployment to another.

    ``old``: ids of all replicas that serve before. If a transaction is rolled back, the switch ends
    in the deployment that the transaction before it reached.
    """
    targets = []
    serving = list(old)
    for number, wave in enumerate(order.waves):
        serving = [name for name in serving if name not in wave.leaving] + list(wave.start)
        targets.append(
            SwitchTarget(
                id=f"{switch}.{number}",
                serves=tuple(serving),
                start=wave.start,
                retire=tuple(dict.fromkeys((*wave.retire, *wave.release))),
                release=wave.release,
                stop=wave.stop,
            )
        )
    return tuple(targets)


def _steps(
    target: SwitchTarget, phase: TransactionPhase
) -> tuple[tuple[Task, tuple[str, ...]], ...]:
    """Return the steps of a phase, each a task and its replicas."""
    steps: dict[TransactionPhase, tuple[tuple[Task, tuple[str, ...]], ...]] = {
        TransactionPhase.PREPARE: (
            (Task.RELEASE, target.release),
            (Task.STOP, target.stop),
            (Task.START, target.start),
        ),
        TransactionPhase.TRANSFER: ((Task.FILL, target.start),),
        TransactionPhase.VERIFY: ((Task.CHECK, target.start),),
        TransactionPhase.COMMIT: ((Task.ROUTE, ("",)),),
        TransactionPhase.DRAIN: ((Task.RETIRE, target.retire),),
        # New engines stop first: old ones may need their memory.
        TransactionPhase.ABORT: (
            (Task.UNDO, target.start),
            (Task.RESTORE, (*target.release, *target.stop)),
        ),
    }
    return steps.get(phase, ())


_NEXT = {
    TransactionPhase.PREPARE: TransactionPhase.TRANSFER,
    TransactionPhase.TRANSFER: TransactionPhase.VERIFY,
    TransactionPhase.VERIFY: TransactionPhase.COMMIT,
    TransactionPhase.COMMIT: TransactionPhase.DRAIN,
    TransactionPhase.DRAIN: TransactionPhase.DONE,
    TransactionPhase.ABORT: TransactionPhase.ROLLED_BACK,
}


def _work(state: TransactionState) -> tuple[Task, tuple[str, ...]] | None:
    steps = _steps(state.target, state.phase)
    return steps[state.step] if state.step < len(steps) else None


def _settled(state: TransactionState, at_s: float) -> TransactionState:
    """Skip all steps and phases that have nothing left to do."""
    while not state.phase.ended:
        work = _work(state)
        if work is None:
            state = _entered(state, _NEXT[state.phase], at_s)
        elif state.done.issuperset(work[1]):
            state = replace(state, step=state.step + 1, done=frozenset(), failures=())
        else:
            break
    return state


def _entered(state: TransactionState, phase: TransactionPhase, at_s: float) -> TransactionState:
    return replace(
        state,
        phase=phase,
        entered_s=at_s,
        step=0,
        done=frozenset(),
        failures=(),
        late=False,
    )


def _asked(state: TransactionState, task: Task, replica: str) -> bool:
    work = _work(state)
    if work is None or work[0] is not task:
        return False
    return replica in work[1] and replica not in state.done


def _finished(state: TransactionState, event: TaskFinished) -> TransactionState:
    if not _asked(state, event.task, event.replica):
        return state
    return _settled(replace(state, done=state.done | {event.replica}), event.at_s)


def _failed(state: TransactionState, event: TaskFailed) -> TransactionState:
    if not _asked(state, event.task, event.replica):
        return state
    failures = dict(state.failures)
    failures[event.replica] = failures.get(event.replica, 0) + 1
    subject = f" {event.replica}" if event.replica else ""
    reason = f"{event.task}{subject}: {event.reason}"
    given_up = event.final or failures[event.replica] >= state.target.attempts
    if given_up and state.phase.may_abort:
        cause = FailedTask(task=event.task, replica=event.replica)
        return _aborted(state, reason, event.at_s, cause)
    # An aborted transaction keeps the reason of its abort, whatever else fails.
    told = state.reason if state.phase is TransactionPhase.ABORT else reason
    return replace(state, failures=tuple(sorted(failures.items())), reason=told)


def _aborted(
    state: TransactionState, reason: str, at_s: float, cause: FailedTask | None = None
) -> TransactionState:
    if not state.phase.may_abort:
        return state
    aborted = replace(_entered(state, TransactionPhase.ABORT, at_s), reason=reason, cause=cause)
    return _settled(aborted, at_s)


def _ticked(state: TransactionState, event: Ticked) -> TransactionState:
    spent_s = event.at_s - state.entered_s
    limit_s = state.target.deadlines_s[state.phase]
    if spent_s <= limit_s or state.late:
        return state
    if state.phase.may_abort:
        return _aborted(state, f"{state.phase} took longer than {limit_s:g} s", event.at_s)
    return replace(state, late=True)
