"""The journal of a transaction: records as plain data, from which any state can be had again.

The first record holds the target, each other one event that changed the state. A shell writes the
record, and knows it to be on disk, before it follows the new state's instructions: what the
world has seen is then never ahead of the journal, and a restart asks again for what was being done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oserve.core import OServeError
from oserve.switch.transaction import (
    Cancelled,
    Event,
    Failed,
    Finished,
    Phase,
    SwitchTarget,
    Task,
    Ticked,
    TransactionState,
    advance,
    begin,
)

# JSON values by name.
Record = Mapping[str, Any]

_EVENTS: dict[str, type[Event]] = {
    "finished": Finished,
    "failed": Failed,
    "cancelled": Cancelled,
    "ticked": Ticked,
}
_NAMES = {kind: name for name, kind in _EVENTS.items()}


def opened(target: SwitchTarget, at_s: float) -> tuple[TransactionState, Record]:
    """A new transaction and its first record."""
    fields = asdict(target)
    fields["deadlines_s"] = {phase.value: limit for phase, limit in target.deadlines_s.items()}
    record = {"sequence": 0, "kind": "begin", "at_s": at_s, "target": fields}
    return begin(target, at_s), record


def recorded(
    state: TransactionState, event: Event, sequence: int
) -> tuple[TransactionState, Record | None]:
    """The state after an event and the record to write first; None if nothing changed.

    ``sequence`` is the number of records written so far.
    """
    after = advance(state, event)
    if after is state:
        return state, None
    return after, {"sequence": sequence, "kind": _NAMES[type(event)], **asdict(event)}


def restored(records: Sequence[Record]) -> TransactionState:
    """The state that the records lead to. Raises OServeError where they make no sense."""
    if not records or records[0].get("kind") != "begin":
        raise _torn("it does not start with a target")
    try:
        state = begin(_target(records[0]["target"]), records[0]["at_s"])
        for number, record in enumerate(records[1:], start=1):
            if record["sequence"] != number:
                raise _torn(f"record {number} is missing")
            state = advance(state, _event(record))
    except (KeyError, TypeError, ValueError) as error:
        raise _torn(f"a record cannot be read: {error}") from None
    return state


def _event(record: Record) -> Event:
    kind = _EVENTS[record["kind"]]
    fields = {name: value for name, value in record.items() if name not in {"sequence", "kind"}}
    if "task" in fields:
        fields["task"] = Task(fields["task"])
    return kind(**fields)


def _target(fields: Record) -> SwitchTarget:
    named: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    named["deadlines_s"] = {Phase(name): limit for name, limit in fields["deadlines_s"].items()}
    return SwitchTarget(**named)


def _torn(reason: str) -> OServeError:
    return OServeError(
        f"the journal of a switch is unreadable: {reason}",
        place="journal",
        remedy="move it away; what runs is then taken for the deployment that is wished",
    )
