"""A wave of a switch as a transaction: events in, instructions out, both plain data.

    prepare -> transfer -> verify -> commit -> drain -> done
       \\__________\\_________\\-> abort -> rolled back

The old replicas serve until the commit, which is one change of the routing table to the absolute
set ``serves``. Until it is decided, every failure, deadline or wish leads back; from then on
nothing does: what fails is asked for again. Instructions follow from the state alone, so that
asking twice, losing an answer or restarting is harmless; the shell must do each at most once at a
time and answer again when asked again. It knows replica ids, not engines; ``journal`` makes it
durable.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from oserve.switch.waves import WaveOrder


class Phase(StrEnum):
    """Where a transaction stands."""

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
        """Nothing more will happen."""
        return self in {Phase.DONE, Phase.ROLLED_BACK}

    @property
    def may_abort(self) -> bool:
        """The commit has not been decided."""
        return self in {Phase.PREPARE, Phase.TRANSFER, Phase.VERIFY}


class Task(StrEnum):
    """What a shell is asked to do, for one replica unless said otherwise.

    ``RELEASE``: drain, give up the KV cache, keep the weights. ``STOP``: drain and end. ``START``:
    a standby engine, warmed, not routed to. ``FILL``: its weights, by the wave's transfer plan.
    ``CHECK``: layout, checksums and one generation. ``ROUTE``: the routing table, to ``serves``.
    ``RETIRE``: drain and end. ``UNDO``: end a standby engine. ``RESTORE``: serve as before, with
    its cache, or started anew.
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


DEADLINES_S: Mapping[Phase, float] = {
    Phase.PREPARE: 180.0,
    Phase.TRANSFER: 60.0,
    Phase.VERIFY: 60.0,
    Phase.COMMIT: 10.0,
    Phase.DRAIN: 600.0,
    Phase.ABORT: 120.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchTarget:
    """What a transaction is to reach, in absolute words: replica ids, see ``Wave``.

    ``serves``: all replicas in the routing table after the commit. A task that fails is asked for
    ``attempts`` times; a phase may take ``deadlines_s`` seconds.
    """

    id: str
    serves: tuple[str, ...]
    start: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    attempts: int = 3
    deadlines_s: Mapping[Phase, float] = field(default_factory=lambda: DEADLINES_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A task was done for a replica (``""`` for ROUTE). Times are Unix seconds."""

    transaction: str
    task: Task
    replica: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A task was not done; ``final``: trying again would not help."""

    transaction: str
    task: Task
    replica: str
    at_s: float
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Somebody wishes it undone; heard until the commit is decided."""

    transaction: str
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time passed."""

    transaction: str
    at_s: float


Event = Finished | Failed | Cancelled | Ticked


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """Do this now. ``late``: the phase has outlived its deadline, so do it without waiting."""

    transaction: str
    task: Task
    replica: str
    attempt: int
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionState:
    """All of a transaction. ``step`` counts within the phase; ``done`` are replicas of that step.

    ``failures`` counts those of the step by replica; ``reason`` says why it was aborted, or what
    failed last.
    """

    target: SwitchTarget
    phase: Phase
    entered_s: float
    step: int = 0
    done: frozenset[str] = frozenset()
    failures: tuple[tuple[str, int], ...] = ()
    late: bool = False
    reason: str = ""


def begin(target: SwitchTarget, at_s: float) -> TransactionState:
    """A transaction at its start, at ``at_s`` Unix seconds."""
    return _settled(TransactionState(target=target, phase=Phase.PREPARE, entered_s=at_s), at_s)


def instructions(state: TransactionState) -> tuple[Instruction, ...]:
    """What must be done now: all of it at once, in any order."""
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


def advance(state: TransactionState, event: Event) -> TransactionState:
    """The state after an event; the very same state if the event says nothing new.

    Events of other transactions, of steps that are over and of replicas not asked about are such.
    """
    if event.transaction != state.target.id or state.phase.ended:
        return state
    match event:
        case Finished():
            return _finished(state, event)
        case Failed():
            return _failed(state, event)
        case Cancelled():
            return _aborted(state, event.reason, event.at_s)
        case Ticked():
            return _ticked(state, event)


def transactions_of(
    switch: str, order: WaveOrder, old: tuple[str, ...]
) -> tuple[SwitchTarget, ...]:
    """One transaction per wave, each from a whole deployment to a whole one.

    ``old``: ids of all replicas that serve before. If one is rolled back, the switch ends in the
    deployment that the one before it reached.
    """
    targets = []
    serving = list(old)
    for number, wave in enumerate(order.waves):
        leaving = {*wave.retire, *wave.release, *wave.stop}
        serving = [name for name in serving if name not in leaving] + list(wave.start)
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


def _steps(target: SwitchTarget, phase: Phase) -> tuple[tuple[Task, tuple[str, ...]], ...]:
    """The steps of a phase, each a task and the replicas it is for."""
    steps: dict[Phase, tuple[tuple[Task, tuple[str, ...]], ...]] = {
        Phase.PREPARE: (
            (Task.RELEASE, target.release),
            (Task.STOP, target.stop),
            (Task.START, target.start),
        ),
        Phase.TRANSFER: ((Task.FILL, target.start),),
        Phase.VERIFY: ((Task.CHECK, target.start),),
        Phase.COMMIT: ((Task.ROUTE, ("",)),),
        Phase.DRAIN: ((Task.RETIRE, target.retire),),
        # The new engines go first: the old ones may need their room.
        Phase.ABORT: (
            (Task.UNDO, target.start),
            (Task.RESTORE, (*target.release, *target.stop)),
        ),
    }
    return steps.get(phase, ())


_NEXT = {
    Phase.PREPARE: Phase.TRANSFER,
    Phase.TRANSFER: Phase.VERIFY,
    Phase.VERIFY: Phase.COMMIT,
    Phase.COMMIT: Phase.DRAIN,
    Phase.DRAIN: Phase.DONE,
    Phase.ABORT: Phase.ROLLED_BACK,
}


def _work(state: TransactionState) -> tuple[Task, tuple[str, ...]] | None:
    steps = _steps(state.target, state.phase)
    return steps[state.step] if state.step < len(steps) else None


def _settled(state: TransactionState, at_s: float) -> TransactionState:
    """Past all steps and phases that have nothing left to do."""
    while not state.phase.ended:
        work = _work(state)
        if work is None:
            state = _entered(state, _NEXT[state.phase], at_s)
        elif state.done.issuperset(work[1]):
            state = replace(state, step=state.step + 1, done=frozenset(), failures=())
        else:
            break
    return state


def _entered(state: TransactionState, phase: Phase, at_s: float) -> TransactionState:
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


def _finished(state: TransactionState, event: Finished) -> TransactionState:
    if not _asked(state, event.task, event.replica):
        return state
    return _settled(replace(state, done=state.done | {event.replica}), event.at_s)


def _failed(state: TransactionState, event: Failed) -> TransactionState:
    if not _asked(state, event.task, event.replica):
        return state
    failures = dict(state.failures)
    failures[event.replica] = failures.get(event.replica, 0) + 1
    subject = f" {event.replica}" if event.replica else ""
    reason = f"{event.task}{subject}: {event.reason}"
    given_up = event.final or failures[event.replica] >= state.target.attempts
    if given_up and state.phase.may_abort:
        return _aborted(state, reason, event.at_s)
    # An aborted transaction goes on telling why it was, not what else went wrong.
    told = state.reason if state.phase is Phase.ABORT else reason
    return replace(state, failures=tuple(sorted(failures.items())), reason=told)


def _aborted(state: TransactionState, reason: str, at_s: float) -> TransactionState:
    if not state.phase.may_abort:
        return state
    return _settled(replace(_entered(state, Phase.ABORT, at_s), reason=reason), at_s)


def _ticked(state: TransactionState, event: Ticked) -> TransactionState:
    spent_s = event.at_s - state.entered_s
    limit_s = state.target.deadlines_s[state.phase]
    if spent_s <= limit_s or state.late:
        return state
    if state.phase.may_abort:
        return _aborted(state, f"{state.phase} took longer than {limit_s:g} s", event.at_s)
    return replace(state, late=True)
