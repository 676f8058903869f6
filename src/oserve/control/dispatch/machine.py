"""The request machine of one gateway process: events in, commands out.

It has no sockets, clocks or tasks: the caller reports events with their time and executes the
commands. The gateway drives it with connections, and tests drive it with random events. Tests also
check that the simulator's kernel behaves in the same way.

    Queued -> Sent -> Held -> Streaming -> Ended
       ^------+---------+       |   ^
         (other replica)        v   |
                              Resuming

While the client has nothing of an answer, a failed request is retried on another replica. After
that a stream resumes on another replica if it can, and else ends with an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

from oserve.control.dispatch import events as on
from oserve.control.dispatch.answers import Answers
from oserve.control.dispatch.charge import Charge
from oserve.control.dispatch.commands import Command, Refusal
from oserve.control.dispatch.departures import Departures
from oserve.control.dispatch.events import Event
from oserve.control.dispatch.fleet import Fleet
from oserve.control.dispatch.lifecycle import Lifecycle
from oserve.control.dispatch.policy import DispatchPolicy, DrainDecision, all_leave
from oserve.control.dispatch.state import Placed, RequestState
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.control.dispatch.vacating import NEVER_S
from oserve.control.dispatch.waiting import WaitingRoom
from oserve.core import FinishStatus

Observer = Callable[[Sequence[Event], list[Command]], None]


class RequestMachine:
    """All requests of one gateway process. ``observer`` gets each call's events and commands."""

    def __init__(self, policy: DispatchPolicy, drain: DrainDecision = all_leave) -> None:
        self.observer: Observer | None = None
        self._life = Lifecycle(policy)
        self._departures = Departures(self._life, drain)
        answers = Answers(self._life)
        # The type of an event is that of its handler's parameter, which no annotation can say.
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            on.Arrived: self._arrived,
            on.Began: answers.began,
            on.Streams: answers.streams,
            on.Shown: answers.shown,
            on.Progressed: answers.progressed,
            on.Refused: answers.refused,
            on.Lost: answers.lost,
            on.Broken: answers.broken,
            on.Reworded: answers.reworded,
            on.Finished: answers.finished,
            on.ClientGone: self._client_gone,
            on.Crashed: self._crashed,
            on.Tick: self._tick,
            on.TableChanged: self._table_changed,
            on.LoadElsewhere: self._load_elsewhere,
            on.Vacate: self._vacate,
            on.Surveyed: self._departures.surveyed,
            on.ShutDown: self._shut_down,
            on.ChargedElsewhere: self._charged_elsewhere,
        }

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """The commands that follow from an event at ``now_s``, on the caller's monotonic clock."""
        return self.handle_all((event,), now_s)

    def handle_all(self, events: Sequence[Event], now_s: float) -> list[Command]:
        """The commands for simultaneous events; dispatch, by rank, follows the last event."""
        life = self._life
        life.now_s = now_s
        commands: list[Command] = []
        life.commands = commands
        for event in events:
            self._handlers[type(event)](event)
        life.settle()
        if self.observer is not None:
            self.observer(events, commands)
        life.commands = []
        return commands

    def forget(self, number: int) -> Charge | None:
        """Drop a request that cannot be ended because a step of that raises; returns its charge."""
        state = self._life.requests.pop(number, None)
        if state is None:
            return None
        self._life.waiting.discard(state)
        if isinstance(state.phase, Placed):
            self._life.fleet.unbook(state.phase.booking, self._life.now_s)
        return state.charge

    def settle_charge(self, charge: Charge, output_tokens: float) -> None:
        """Correct the charge of an ended request: its output tokens at its last replica.

        No command follows from it, so it is no event.
        """
        self._life.waiting.fair.settle(charge, output_tokens)

    # -- queries --------------------------------------------------------------------------------
    @property
    def emitted(self) -> list[Command]:
        """Where the last call raised, what it had asked for until then."""
        return self._life.commands

    @property
    def due_s(self) -> float:
        """When the caller must report a ``Tick``; infinite if none is needed."""
        return self._life.due_s

    @property
    def requests(self) -> dict[int, RequestState]:
        """Open requests by number, in order of arrival."""
        return self._life.requests

    @property
    def waiting(self) -> WaitingRoom:
        """The requests that wait for a replica."""
        return self._life.waiting

    @property
    def fleet(self) -> Fleet:
        """The replicas, their outstanding work and their circuit breakers."""
        return self._life.fleet

    @property
    def serving(self) -> dict[str, TableReplica]:
        """Replicas that take new requests, by id."""
        return self._life.fleet.serving

    @property
    def table(self) -> RoutingTable:
        """The routing table in force."""
        return self._life.fleet.table

    # -- handlers -------------------------------------------------------------------------------
    def _arrived(self, event: on.Arrived) -> None:
        state = RequestState(
            number=event.number,
            arrival_s=self._life.now_s,
            request=event.request,
            rank_s=event.rank_s,
            streams=event.streams,
            forecast=event.forecast,
        )
        state.session, state.prefix = event.session, event.prefix
        state.prefix_tokens = event.prefix_tokens
        state.tenant, state.owner = event.tenant, event.owner
        if event.max_queued is not None:
            state.max_queued = event.max_queued
        if event.tenant:
            self._life.waiting.fair.arrived(state, self._life.now_s)
        self._life.requests[event.number] = state
        self._life.due_s = min(
            self._life.due_s, self._life.now_s + self._life.policy.request_timeout_s
        )
        if not self._life.breaks_promise(state):
            self._life.enter(state)

    def _client_gone(self, event: on.ClientGone) -> None:
        state = self._life.requests.get(event.number)
        if state is not None:
            self._life.leave(state)
            self._life.end(state, FinishStatus.DISCONNECTED)

    def _crashed(self, event: on.Crashed) -> None:
        state = self._life.requests.get(event.number)
        if state is not None:
            self._life.refuse(state, Refusal.INTERNAL)

    def _tick(self, event: on.Tick) -> None:
        timeout_s = self._life.policy.request_timeout_s
        late = []
        for state in self._life.requests.values():
            if state.arrival_s + timeout_s > self._life.now_s:
                break
            late.append(state)
        for state in late:
            self._life.refuse(state, Refusal.DEADLINE)
        for number in self._life.waiting.due(self._life.now_s):
            waiting = self._life.requests.get(number)
            if waiting is not None and waiting in self._life.waiting:
                self._check_wait(waiting)
        for start in self._life.fleet.vacating.due(self._life.now_s):
            self._departures.check(start)
        oldest = next(iter(self._life.requests.values()), None)
        self._life.due_s = min(
            oldest.arrival_s + timeout_s if oldest is not None else NEVER_S,
            self._life.waiting.next_s,
            self._life.fleet.vacating.next_s,
        )
        self._life.may_settle()

    def _check_wait(self, state: RequestState) -> None:
        """Refuse a request whose waiting time is up."""
        if self._life.waiting.sheds(state, self._life.now_s):
            self._life.refuse(state, Refusal.SHED, retry_after_s=self._life.retry_after_s())
        elif state.give_up_s is not None and state.give_up_s <= self._life.now_s:
            state.give_up_s = None
            if not self._life.fleet.may_serve(state, self._life.now_s):
                self._life.refuse(state, Refusal.NONE_READY_IN_TIME)

    def _table_changed(self, event: on.TableChanged) -> None:
        self._life.fleet.follow(event.table, self._life.now_s)
        self._life.waiting.use(self._life.fleet.overload, by_tier=bool(event.table.tiers))
        self._fleet_changed()

    def _load_elsewhere(self, event: on.LoadElsewhere) -> None:
        if event.processes:
            self._life.share(event.processes)
        self._life.fleet.ledger.set_elsewhere(event.loads)
        self._life.may_settle()

    def _charged_elsewhere(self, event: on.ChargedElsewhere) -> None:
        self._life.waiting.fair.charged_elsewhere(event.charged_s, self._life.now_s)

    def _vacate(self, event: on.Vacate) -> None:
        self._life.fleet.vacate(event.replica, event.within_s, event.started_s, self._life.now_s)
        self._fleet_changed()

    def _fleet_changed(self) -> None:
        if not self._life.fleet.serving:
            for state in self._life.waiting:
                if state.give_up_s is None:
                    state.give_up_s = self._life.now_s + self._life.policy.no_replica_wait_s
                    self._life.waiting.set_timers(state)
        self._life.due_s = min(
            self._life.due_s, self._life.waiting.next_s, self._life.fleet.vacating.next_s
        )
        self._life.may_settle()

    def _shut_down(self, event: on.ShutDown) -> None:
        for state in list(self._life.requests.values()):
            self._life.refuse(state, Refusal.SHUTTING_DOWN)
