"""The journal of a switch: typed lines, from which the state of any wave can be restored.

The first line holds the plans. Each wave adds a line with its target, then one line for each event
that changed its transaction. The driver writes a line, and knows it to be on disk, before it
follows the new state's instructions: the journal is never behind what the cluster has seen, and a
restart asks again for what was being done. On disk a line is a JSON object whose ``kind`` is its
tag. Times are Unix seconds.
"""

from collections.abc import Sequence

import msgspec

from oserve.core import OServeError
from oserve.switch.transaction import (
    Cancelled,
    SwitchTarget,
    Task,
    TaskFailed,
    TaskFinished,
    Ticked,
    TransactionEvent,
    TransactionState,
    advance,
    begin,
)


class SwitchLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="switch"):
    """The first line: the plan before the switch, and the plan in force after each wave.

    Plans are the text of plan files.
    """

    id: str
    at_s: float
    before: str
    plans: tuple[str, ...]


class WaveLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """A line of one wave's transaction; ``sequence`` counts the lines of the wave from 0."""

    wave: int
    sequence: int
    at_s: float


class BeginLine(WaveLine, frozen=True, kw_only=True, tag="begin"):
    """A wave begins."""

    target: SwitchTarget


class FinishedLine(WaveLine, frozen=True, kw_only=True, tag="finished"):
    """See ``transaction.TaskFinished``."""

    transaction: str
    task: Task
    replica: str


class FailedLine(WaveLine, frozen=True, kw_only=True, tag="failed"):
    """See ``transaction.TaskFailed``."""

    transaction: str
    task: Task
    replica: str
    reason: str
    final: bool = False


class CancelledLine(WaveLine, frozen=True, kw_only=True, tag="cancelled"):
    """See ``transaction.Cancelled``."""

    transaction: str
    reason: str


class TickedLine(WaveLine, frozen=True, kw_only=True, tag="ticked"):
    """See ``transaction.Ticked``."""

    transaction: str


class EndLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="end"):
    """The last line."""

    at_s: float
    state: str
    reason: str


EventLine = FinishedLine | FailedLine | CancelledLine | TickedLine
TransactionLine = BeginLine | EventLine
JournalLine = SwitchLine | TransactionLine | EndLine

_DECODER: msgspec.json.Decoder[JournalLine] = msgspec.json.Decoder(JournalLine)


def encode_line(line: JournalLine) -> bytes:
    """Return a line as JSON, without a line break."""
    return msgspec.json.encode(line)


def decode_line(data: bytes) -> JournalLine | None:
    """Read a line; ``None`` if it is no whole JSON value, as the last line of a torn file.

    Raises OServeError if it is JSON, but no line of a journal.
    """
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError as error:
        raise _unreadable(f"a line cannot be read: {error}") from None
    except msgspec.DecodeError:
        return None


def opened(
    target: SwitchTarget, at_s: float, *, wave: int = 0
) -> tuple[TransactionState, BeginLine]:
    """Return a new transaction and its first line."""
    return begin(target, at_s), BeginLine(wave=wave, sequence=0, at_s=at_s, target=target)


def recorded(
    state: TransactionState, event: TransactionEvent, sequence: int, *, wave: int = 0
) -> tuple[TransactionState, EventLine | None]:
    """Return the state after an event and the line to write first; None if nothing changed.

    ``sequence`` is the number of lines that the wave has written so far.
    """
    after = advance(state, event)
    if after is state:
        return state, None
    return after, _line_of(event, wave, sequence)


def restored(lines: Sequence[TransactionLine]) -> TransactionState:
    """Return the state that a wave's lines lead to. Raises OServeError if a line is missing."""
    if not lines or not isinstance(lines[0], BeginLine):
        raise _unreadable("a wave does not start with its target")
    state = begin(lines[0].target, lines[0].at_s)
    for number, line in enumerate(lines[1:], start=1):
        if isinstance(line, BeginLine) or line.sequence != number:
            raise _unreadable(f"line {number} of a wave is missing")
        state = advance(state, _event_of(line))
    return state


def _line_of(event: TransactionEvent, wave: int, sequence: int) -> EventLine:
    match event:
        case TaskFinished(transaction=transaction, task=task, replica=replica, at_s=at_s):
            return FinishedLine(
                wave=wave,
                sequence=sequence,
                at_s=at_s,
                transaction=transaction,
                task=task,
                replica=replica,
            )
        case TaskFailed(transaction=transaction, task=task, replica=replica, at_s=at_s):
            return FailedLine(
                wave=wave,
                sequence=sequence,
                at_s=at_s,
                transaction=transaction,
                task=task,
                replica=replica,
                reason=event.reason,
                final=event.final,
            )
        case Cancelled(transaction=transaction, at_s=at_s, reason=reason):
            return CancelledLine(
                wave=wave, sequence=sequence, at_s=at_s, transaction=transaction, reason=reason
            )
        case Ticked(transaction=transaction, at_s=at_s):
            return TickedLine(wave=wave, sequence=sequence, at_s=at_s, transaction=transaction)


def _event_of(line: EventLine) -> TransactionEvent:
    match line:
        case FinishedLine(transaction=transaction, task=task, replica=replica, at_s=at_s):
            return TaskFinished(transaction=transaction, task=task, replica=replica, at_s=at_s)
        case FailedLine(transaction=transaction, task=task, replica=replica, at_s=at_s):
            return TaskFailed(
                transaction=transaction,
                task=task,
                replica=replica,
                at_s=at_s,
                reason=line.reason,
                final=line.final,
            )
        case CancelledLine(transaction=transaction, at_s=at_s, reason=reason):
            return Cancelled(transaction=transaction, at_s=at_s, reason=reason)
        case TickedLine(transaction=transaction, at_s=at_s):
            return Ticked(transaction=transaction, at_s=at_s)


def _unreadable(reason: str) -> OServeError:
    return OServeError(
        f"the journal of a switch is unreadable: {reason}",
        place="journal",
        remedy="move the file away; the server then keeps the plan of its settings",
    )
