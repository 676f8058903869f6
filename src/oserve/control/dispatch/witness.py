"""Checks the invariants of a request machine after every event, and keeps each request's story.

For tests and debugging: every event costs time proportional to the number of open requests.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from oserve.control.dispatch.commands import Command
from oserve.control.dispatch.events import Event
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.state import Ended, Placed, Queued, Resuming

_MOST_STEPS = 200
_MOST_STORIES = 4096
# The most stale entries that queue and timers may hold.
_STALE = 66
_TINY_S = 1e-6


class InvariantError(AssertionError):
    """An invariant is violated; the message has the story of the request, if it concerns one."""


class Witness:
    """Checks a machine after each event, and records each request's events and commands."""

    def __init__(self, machine: RequestMachine, *, max_queued: int | None = None) -> None:
        self._machine = machine
        self._max_queued = max_queued
        self._stories: dict[int, deque[str]] = {}
        machine.observer = self._observe

    def _observe(self, events: Sequence[Event], commands: list[Command]) -> None:
        for event in events:
            self._note(getattr(event, "number", None), f"event   {event!r}")
        for command in commands:
            self._note(getattr(command, "number", None), f"command {command!r}")
        for number, fault in faults(self._machine, self._max_queued):
            raise InvariantError(f"{fault}\nafter {events!r}\n{self.story(number)}")

    def _note(self, number: int | None, line: str) -> None:
        if number is None:
            return
        story = self._stories.get(number)
        if story is None:
            if len(self._stories) >= _MOST_STORIES:
                self._stories.pop(next(iter(self._stories)))
            story = self._stories[number] = deque(maxlen=_MOST_STEPS)
        story.append(line)

    def story(self, number: int | None) -> str:
        """The events and commands of a request, one per line."""
        if number is None:
            return ""
        state = self._machine.requests.get(number)
        phase = "unknown" if state is None else repr(state.phase)
        return "\n".join((f"request {number}: {phase}", *self._stories.get(number, ())))


Fault = tuple[int | None, str]
"""The number of the request, or ``None``, and the violated invariant."""


def faults(machine: RequestMachine, max_queued: int | None = None) -> list[Fault]:
    """The violated invariants.

    Every request is in one phase, and is in the queue exactly if its phase says so. Every booked
    slot belongs to one request at that replica, and the ledger balances. No queue exceeds its
    bound.
    """
    return [
        *_faults_of_phases(machine),
        *_faults_of_books(machine),
        *_faults_of_queue(machine, max_queued),
    ]


def _faults_of_phases(machine: RequestMachine) -> Iterator[Fault]:
    for number, state in machine.requests.items():
        phase = state.phase
        if isinstance(phase, Ended):
            yield number, "an ended request is still open"
        elif (state in machine.waiting) != isinstance(phase, Queued | Resuming):
            yield number, "the queue and the phase of a request disagree"
        elif isinstance(phase, Placed):
            entry = phase.booking.entry
            if entry is not None and not entry.open:
                yield number, "a request at a replica has no booked slot"


def _faults_of_books(machine: RequestMachine) -> Iterator[Fault]:
    ledger = machine.fleet.ledger
    used: dict[str, list[float]] = {}
    for state in machine.requests.values():
        if isinstance(state.phase, Placed):
            entry = state.phase.booking.entry
            if entry is not None and ledger.holds(entry):
                used.setdefault(state.phase.booking.replica.id, []).append(entry.left_s)
    for name, (work_s, requests) in ledger.own().items():
        left_s = used.get(name, [])
        if requests != len(left_s):
            yield None, f"{requests} slots of {name} are booked, {len(left_s)} used"
        if abs(work_s - sum(left_s)) > _TINY_S:
            yield None, f"the work booked at {name} differs from that of its requests"


def _faults_of_queue(machine: RequestMachine, max_queued: int | None) -> Iterator[Fault]:
    waiting = machine.waiting
    for state in waiting:
        if state.number not in machine.requests:
            yield state.number, "an unknown request is in the queue"
    fresh = sum(isinstance(state.phase, Queued) for state in waiting)
    if max_queued is None:
        return
    if fresh > max_queued:
        yield None, f"{fresh} requests wait, more than {max_queued}"
    heap, timers = waiting.entries
    most = max(max_queued, len(waiting), len(machine.requests))
    if heap > 2 * most + _STALE or timers > 4 * most + _STALE:
        yield None, f"the queue holds {heap} entries and {timers} timers"
