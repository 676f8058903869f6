"""Drives a request machine step by step, with its witness, for tests of single decisions."""

from collections.abc import Sequence
from typing import TypeVar

from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Command
from oserve.control.dispatch.events import Event
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.policy import DispatchPolicy, DrainDecision, all_leave
from oserve.control.dispatch.state import Placed
from oserve.control.dispatch.table import TableReplica
from oserve.control.dispatch.witness import Witness

from .dispatch_scenario import Ask, arrival, table_of

C = TypeVar("C", bound=Command)
_POLICY = DispatchPolicy()


class Driver:
    """A machine with these replicas."""

    def __init__(
        self,
        *replicas: TableReplica,
        policy: DispatchPolicy = _POLICY,
        drain: DrainDecision = all_leave,
        expected: bool = True,
    ) -> None:
        self.machine = RequestMachine(policy, drain)
        self.witness = Witness(self.machine, max_queued=policy.max_queued)
        self.table(0.0, *replicas, expected=expected)

    def table(self, now_s: float, *replicas: TableReplica, expected: bool = True) -> list[Command]:
        """Another table is in force."""
        return self.at(now_s, on.TableChanged(table_of(replicas, expected=expected)))

    def at(self, now_s: float, *events: Event) -> list[Command]:
        """What follows from these events of a moment."""
        return self.machine.handle_all(events, now_s)

    def ask(self, now_s: float, *numbers: int, ask: Ask | None = None) -> list[Command]:
        """Requests come, one after the other."""
        commands = []
        for number in numbers:
            commands += self.at(now_s, arrival(number, now_s, ask))
        return commands

    def place(self, number: int) -> str:
        """The replica that has a request; empty if none has."""
        state = self.machine.requests.get(number)
        if state is None or not isinstance(state.phase, Placed):
            return ""
        return state.phase.booking.replica.id

    @property
    def waiting(self) -> set[int]:
        """Numbers of those that wait."""
        return {state.number for state in self.machine.waiting}


def names(commands: Sequence[Command]) -> list[str]:
    """What is asked for, in order."""
    return [type(command).__name__ for command in commands]


def only(commands: Sequence[Command], kind: type[C]) -> C:
    """The one command of a kind."""
    (found,) = (command for command in commands if isinstance(command, kind))
    return found
