"""A transaction ends whole, in the new deployment or the old one, whatever happens on the way."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.switch.journal import (
    EndLine,
    SwitchLine,
    TransactionLine,
    decode_line,
    encode_line,
    opened,
    recorded,
    restored,
)
from oserve.switch.transaction import (
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
    advance,
    begin,
    instructions,
    transactions_of,
)
from oserve.switch.waves import Wave, WaveOrder

TARGET = SwitchTarget(
    id="s1.0",
    serves=("keep", "new0", "new1"),
    start=("new0", "new1"),
    retire=("old0", "room0"),
    release=("room0",),
    stop=("room1",),
)
OLD = {"keep", "old0", "room0", "room1"}
BARE = SwitchTarget(id="s2.0", serves=("a", "b"), start=("b",))


@dataclass
class World:
    """What runs. Its assertions are the promises: nothing routed to is ever ended unasked."""

    target: SwitchTarget
    routed: set[str]
    alive: set[str]
    filled: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)

    def do(self, instruction: Instruction) -> None:
        name = instruction.replica
        match instruction.task:
            case Task.RELEASE:
                self.released.add(name)
                self.routed.discard(name)
            case Task.STOP:
                self._end(name)
            case Task.START:
                assert not self.alive & set(self.target.stop)
                assert self.released >= set(self.target.release)
                self.alive.add(name)
            case Task.FILL:
                assert name in self.alive
                self.filled.add(name)
            case Task.CHECK:
                assert name in self.filled
                self.checked.add(name)
            case Task.ROUTE:
                assert self.checked >= set(self.target.start)
                self.routed = set(self.target.serves)
            case Task.RETIRE:
                assert name not in self.routed
                self._end(name)
            case Task.UNDO:
                assert name not in self.routed
                self._end(name)
                self.filled.discard(name)
                self.checked.discard(name)
            case Task.RESTORE:
                assert not self.alive & set(self.target.start)
                self.alive.add(name)
                self.routed.add(name)
                self.released.discard(name)

    def _end(self, name: str) -> None:
        self.routed.discard(name)
        self.alive.discard(name)

    def check_end(self, phase: TransactionPhase, old: set[str]) -> None:
        assert self.routed == (set(self.target.serves) if phase is TransactionPhase.DONE else old)
        assert self.alive == self.routed
        assert not self.released & self.alive


def kept(line: TransactionLine) -> TransactionLine:
    """A line as it comes back from disk."""
    found = decode_line(encode_line(line))
    assert found == line
    return line


def step(
    state: TransactionState, journal: list[TransactionLine], event: TransactionEvent
) -> TransactionState:
    after, line = recorded(state, event, len(journal))
    if line is not None:
        journal.append(kept(line))
    assert restored(journal) == after
    assert advance(after, event) is after or isinstance(event, TaskFailed)
    return after


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), target=st.sampled_from([TARGET, BARE]))
def test_ends_whole_under_any_fate(seed: int, target: SwitchTarget) -> None:
    """Answers fail, get lost, come twice or late; the controller crashes; time passes."""
    rng = random.Random(seed)
    old = OLD if target is TARGET else {"a"}
    world = World(target=target, routed=set(old), alive=set(old))
    state, first = opened(target, 0.0)
    journal: list[TransactionLine] = [kept(first)]
    now = 0.0
    past: list[TransactionEvent] = []
    committed = False
    for number in range(600):
        if state.phase.ended:
            break
        # After a while fate turns kind, so that every run ends.
        mischief = rng.random() if number < 60 else 1.0
        now += rng.choice([0.1, 1.0, 30.0 if number < 60 else 1.0])
        if mischief < 0.05:
            state = restored(journal)
        elif mischief < 0.15 and past:
            state = step(state, journal, rng.choice(past))
        elif mischief < 0.2:
            state = step(state, journal, Ticked(transaction=target.id, at_s=now))
        elif mischief < 0.22:
            event = Cancelled(transaction=target.id, at_s=now, reason="no longer wanted")
            state = step(state, journal, event)
        elif instructions(state):
            instruction = rng.choice(instructions(state))
            answer = told(world, instruction, now, mischief)
            if mischief >= 0.3 or number >= 60:
                state = step(state, journal, answer)
            past.append(answer)
        if committed:
            assert state.phase not in {TransactionPhase.ABORT, TransactionPhase.ROLLED_BACK}
        committed = committed or state.phase in {
            TransactionPhase.COMMIT,
            TransactionPhase.DRAIN,
            TransactionPhase.DONE,
        }
        assert old - set(target.release) - set(target.stop) <= world.alive or committed
    assert state.phase.ended
    world.check_end(state.phase, old)


def told(world: World, instruction: Instruction, now: float, mischief: float) -> TransactionEvent:
    """Carries it out, or half of it, and answers."""
    if 0.3 <= mischief < 0.5:
        return TaskFailed(
            transaction=instruction.transaction,
            task=instruction.task,
            replica=instruction.replica,
            at_s=now,
            reason="it broke",
            final=mischief < 0.32,
        )
    world.do(instruction)
    return finished(instruction, now)


def finished(instruction: Instruction, now: float) -> TaskFinished:
    return TaskFinished(
        transaction=instruction.transaction,
        task=instruction.task,
        replica=instruction.replica,
        at_s=now,
    )


def run_to(phase: TransactionPhase, target: SwitchTarget = TARGET) -> TransactionState:
    state = begin(target, 0.0)
    while state.phase is not phase:
        state = advance(state, finished(instructions(state)[0], 1.0))
    return state


@pytest.mark.parametrize(
    "phase", [TransactionPhase.PREPARE, TransactionPhase.TRANSFER, TransactionPhase.VERIFY]
)
def test_rolls_back_before_the_commit(phase: TransactionPhase) -> None:
    state = run_to(phase)
    events: list[TransactionEvent] = [
        Ticked(transaction="s1.0", at_s=10_000.0),
        Cancelled(transaction="s1.0", at_s=2.0, reason="no longer wanted"),
        TaskFailed(
            transaction="s1.0",
            task=instructions(state)[0].task,
            replica=instructions(state)[0].replica,
            at_s=2.0,
            reason="the disk is full",
            final=True,
        ),
    ]
    for event in events:
        after = advance(state, event)
        assert after.phase is TransactionPhase.ABORT
        assert after.reason
        assert {one.task for one in instructions(after)} == {Task.UNDO}


@pytest.mark.parametrize("phase", [TransactionPhase.COMMIT, TransactionPhase.DRAIN])
def test_rolls_forward_after_it(phase: TransactionPhase) -> None:
    state = run_to(phase)
    for _ in range(5):
        state = advance(state, Cancelled(transaction="s1.0", at_s=2.0, reason="too late"))
        first = instructions(state)[0]
        state = advance(
            state,
            TaskFailed(
                transaction="s1.0",
                task=first.task,
                replica=first.replica,
                at_s=3.0,
                reason="it broke",
                final=True,
            ),
        )
    state = advance(state, Ticked(transaction="s1.0", at_s=10_000.0))
    assert state.phase is phase
    assert all(one.late for one in instructions(state))
    assert instructions(state)[0].attempt == 6


def test_a_failure_is_tried_again_a_few_times() -> None:
    state = run_to(TransactionPhase.TRANSFER)
    for attempt in (1, 2, 3):
        first = instructions(state)[0]
        assert (state.phase, first.attempt) == (TransactionPhase.TRANSFER, attempt)
        failed = TaskFailed(
            transaction="s1.0",
            task=Task.FILL,
            replica=first.replica,
            at_s=2.0,
            reason="a peer is gone",
        )
        state = advance(state, failed)
    assert state.phase is TransactionPhase.ABORT
    assert state.reason == "fill new0: a peer is gone"


def test_events_of_others_change_nothing() -> None:
    state = run_to(TransactionPhase.TRANSFER)
    for event in (
        TaskFinished(transaction="other", task=Task.FILL, replica="new0", at_s=2.0),
        TaskFinished(transaction="s1.0", task=Task.CHECK, replica="new0", at_s=2.0),
        TaskFinished(transaction="s1.0", task=Task.FILL, replica="who", at_s=2.0),
        Ticked(transaction="s1.0", at_s=2.0),
    ):
        assert advance(state, event) is state


@pytest.mark.parametrize("spoilt", ["first", "gap", "kind", "field"])
def test_an_unreadable_journal_is_refused(spoilt: str) -> None:
    state, first = opened(TARGET, 0.0)
    lines: list[TransactionLine] = [first]
    for _ in range(3):
        state, line = recorded(state, finished(instructions(state)[0], 1.0), len(lines))
        assert line is not None
        lines.append(line)
    assert restored(lines) == state
    journal = [json.loads(encode_line(line)) for line in lines]
    if spoilt == "first":
        journal = journal[1:]
    elif spoilt == "gap":
        del journal[1]
    elif spoilt == "kind":
        journal[2]["kind"] = "danced"
    else:
        del journal[2]["replica"]
    with pytest.raises(OServeError, match="unreadable"):
        restored(read(json.dumps(record).encode() for record in journal))


def read(data: Iterable[bytes]) -> list[TransactionLine]:
    found = []
    for one in data:
        line = decode_line(one)
        assert isinstance(line, TransactionLine)
        found.append(line)
    return found


# As servers wrote them before lines had types.
_OLD_JOURNAL = b"""\
{"kind":"switch","id":"s","at_s":1.0,"before":"replicas: []","plans":["replicas: []"]}
{"wave":0,"sequence":0,"kind":"begin","at_s":1.0,"target":{"id":"s.0","serves":["w","k"],\
"start":["w"],"retire":["a","b"],"release":[],"stop":[],"attempts":3,"deadlines_s":\
{"prepare":180.0,"transfer":60.0,"verify":60.0,"commit":10.0,"drain":600.0,"abort":120.0}}}
{"wave":0,"sequence":1,"kind":"finished","transaction":"s.0","task":"start","replica":"w",\
"at_s":5.0}
{"wave":0,"sequence":2,"kind":"failed","transaction":"s.0","task":"fill","replica":"w",\
"at_s":7.0,"reason":"cut","final":true}
{"kind":"end","at_s":8.0,"state":"rolled_back","reason":"fill w: cut"}
"""


def test_old_journals_are_still_read() -> None:
    first, *wave, last = map(decode_line, _OLD_JOURNAL.splitlines())
    assert isinstance(first, SwitchLine)
    assert isinstance(last, EndLine)
    state = restored([line for line in wave if isinstance(line, TransactionLine)])
    assert len(wave) == 3
    assert (state.phase, state.reason) == (TransactionPhase.ABORT, "fill w: cut")
    assert state.cause == FailedTask(task=Task.FILL, replica="w")


def test_waves_become_a_chain_of_whole_deployments() -> None:
    order = WaveOrder(
        waves=(
            Wave(release=("a",), start=("x",), retire=("b",)),
            Wave(stop=("c",), start=("y",)),
        ),
        kept=("k",),
        floor_share=1.0,
        proved=True,
    )
    first, second = transactions_of("s7", order, ("a", "b", "c", "k"))
    assert (first.id, first.serves, first.retire) == ("s7.0", ("c", "k", "x"), ("b", "a"))
    assert (second.id, second.serves, second.stop) == ("s7.1", ("k", "x", "y"), ("c",))
