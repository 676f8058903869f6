"""A small world around a request machine, on a virtual clock: clients, replicas, a fleet.

It carries out commands as the gateway does, and checks each: whether it may come now, and whether
what the client has been shown is the beginning of its answer.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Command, Refusal
from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.events import Cause, Event
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.router import NoRoute
from oserve.control.dispatch.state import Queued, Resuming, Streaming
from oserve.control.dispatch.table import RoutingTable
from oserve.control.dispatch.witness import Witness
from oserve.core import FinishStatus, ReplicaPhase

from .dispatch_replicas import Client, Connection, Replicas
from .dispatch_scenario import STEP_S, Ask, Change, Scenario, arrival, replica_of, table_of

_MOST_STEPS = 20_000
_NEVER_S = float("inf")


class World:
    """Plays a scenario to its end. ``told`` counts events and commands by name."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        policy = scenario.policy
        self.machine = RequestMachine(policy, scenario.drain)
        self._max_queued = -(-policy.max_queued // policy.processes)
        self.witness = Witness(self.machine, max_queued=self._max_queued)
        self.clients: dict[int, Client] = {}
        self.told: Counter[str] = Counter()
        self.now_s = 0.0
        self._queue: list[tuple[float, int, int | None, Callable[[], Event | None]]] = []
        self._order = count()
        self._names = [f"r{index}" for index in range(len(scenario.fakes))]
        fakes = dict(zip(self._names, scenario.fakes, strict=True))
        self._replicas = Replicas(fakes, self.clients, self._later)
        self._expected = True
        self._constants: DispatchConstants | None = None
        self._starts = [0.0] * len(scenario.fakes)
        self._phases = [ReplicaPhase.READY] * len(scenario.fakes)
        # The type of a command is that of its step's parameter.
        self._steps: dict[type[Command], Callable[[Any], None]] = {
            do.Send: self._send,
            do.Hold: self._hold,
            do.Forward: self._forward,
            do.ShowError: self._show_error,
            do.LetGo: self._let_go,
            do.Retry: self._retry,
            do.Depart: self._depart,
            do.Resume: self._resume,
            do.Survey: self._survey,
            do.Refuse: self._refuse,
            do.Demote: self._demote,
            do.Record: self._record,
        }

    # -- the course -----------------------------------------------------------------------------
    def play(self) -> "World":
        """Play it; every command and every settled moment is checked."""
        self._later(0, None, lambda: on.TableChanged(self.table))
        for change in self.scenario.changes:
            self._later(change.at, None, partial(self._change, change))
        for number, ask in enumerate(sorted(self.scenario.asks, key=lambda ask: ask.at)):
            self._later(ask.at, number, partial(self._ask, number, ask))
        ticks = 0
        for _ in range(_MOST_STEPS):
            next_s = min(self._queue[0][0] if self._queue else _NEVER_S, self.machine.due_s)
            if next_s == _NEVER_S:
                self._over()
                return self
            if next_s > self.now_s:
                self.now_s, ticks = next_s, 0
            if self.machine.due_s > self.now_s:
                self._tell(self._due())
                continue
            ticks += 1
            assert ticks <= 2 + len(self.scenario.asks), "ticks make no progress"
            self._tell([on.Tick()])
            assert self.machine.due_s > self.now_s, "a tick is due at once"
            self._in_time()
        raise AssertionError("it does not end")

    def _later(self, steps: int, number: int | None, event: Callable[[], Event | None]) -> None:
        at_s = self.now_s + steps * STEP_S
        heapq.heappush(self._queue, (at_s, next(self._order), number, event))

    def _due(self) -> list[Event]:
        """Events of this moment: one, or as many as concern different requests."""
        events: list[Event] = []
        numbers: set[int | None] = set()
        while self._queue and self._queue[0][0] <= self.now_s:
            number = self._queue[0][2]
            if numbers and (number is None or number in numbers):
                # What it is depends on what becomes of the earlier ones.
                break
            event = heapq.heappop(self._queue)[3]()
            numbers.add(number)
            if event is not None:
                events.append(event)
            if number is None or not self.scenario.together:
                break
        return events

    def _tell(self, events: Sequence[Event]) -> None:
        if not events:
            return
        commands = self.machine.handle_all(events, self.now_s)
        self.told.update(type(item).__name__ for item in (*events, *commands))
        for command in commands:
            self._steps[type(command)](command)
        self._settled()

    # -- what must hold -------------------------------------------------------------------------
    def _settled(self) -> None:
        """Nothing waits while a replica that may serve it has room."""
        for state in self.machine.waiting:
            assert state.request is not None  # auxiliary calls do not wait
            choice = self.machine.fleet.choose(state, state.request, self.now_s)
            assert isinstance(choice, NoRoute), self.story(state.number)

    def _in_time(self) -> None:
        """Nothing is later than it may be once a tick has been told."""
        policy = self.scenario.policy
        for state in self.machine.requests.values():
            story = self.story(state.number)
            assert self.now_s < state.arrival_s + policy.request_timeout_s, story
            shed_s = policy.overload.shed_after_s
            if shed_s is not None and isinstance(state.phase, Queued):
                assert self.now_s < state.arrival_s + shed_s, story

    def _over(self) -> None:
        for number, client in self.clients.items():
            assert len(client.records) == 1, self.story(number)
            completed = client.records[0].status is FinishStatus.COMPLETED
            if completed and client.ask.kind != "auxiliary":
                assert client.shown == list(range(client.ask.output)), self.story(number)
        assert not self.machine.requests
        assert len(self.machine.waiting) == 0
        assert all(load == (0.0, 0) for load in self.machine.fleet.ledger.own().values())

    def story(self, number: int) -> str:
        """What happened to a request."""
        return f"at {self.now_s} s\n{self.witness.story(number)}"

    # -- clients and fleet ----------------------------------------------------------------------
    def _ask(self, number: int, ask: Ask) -> Event:
        self.clients[number] = Client(ask=ask)
        if ask.leaves is not None:
            self._later(ask.leaves, number, lambda: on.ClientGone(number))
        return arrival(number, self.now_s, ask)

    @property
    def table(self) -> RoutingTable:
        """The fleet as it is."""
        fleet = zip(self._names, self.scenario.fakes, self._phases, self._starts, strict=True)
        return table_of(
            [
                replica_of(name, fake, phase=phase, started_s=started_s)
                for name, fake, phase, started_s in fleet
                if phase is not ReplicaPhase.GONE
            ],
            expected=self._expected,
            constants=self._constants,
            tiers=self.scenario.tiers,
        )

    def _change(self, change: Change) -> Event:
        index = change.replica % len(self._names)
        name = self._names[index]
        match change.what:
            case "vacate":
                return on.Vacate(replica=name, within_s=change.steps * STEP_S)
            case "elsewhere":
                return on.LoadElsewhere({name: (float(change.steps), change.steps)})
            case "expected" | "unexpected":
                self._expected = change.what == "expected"
            case "tune":
                self._constants = self._tuned(change.steps)
            case "drain":
                if self._phases[index] is ReplicaPhase.READY:
                    self._phases[index] = ReplicaPhase.DRAINING
            case "again":
                self._break_all(name)
                self._phases[index] = ReplicaPhase.READY
                self._starts[index] = self.now_s
            case "gone":
                self._break_all(name)
                self._phases[index] = ReplicaPhase.GONE
        return on.TableChanged(self.table)

    def _tuned(self, steps: int) -> DispatchConstants | None:
        """Other constants of dispatch; those of the policy after 0 steps."""
        policy = self.scenario.policy
        if steps == 0:
            return None
        overload = replace(
            policy.overload, ttft_s=(None, 0.5, 2.0)[steps % 3], owed_of_ttft=0.1 * steps
        )
        return DispatchConstants(overload=overload, overflow_s=0.5 * steps)

    def _break_all(self, name: str) -> None:
        """Its connections break, which is told after the table has changed."""
        for client in self.clients.values():
            connection = client.connection
            if connection is not None and connection.replica.id == name:
                self._replicas.when(connection, 0, self._replicas.breaks)

    # -- commands -------------------------------------------------------------------------------
    def _alive(self, number: int) -> Client:
        client = self.clients[number]
        assert not client.records, self.story(number)
        return client

    def _placed(self, number: int) -> tuple[Client, Connection]:
        client = self._alive(number)
        assert client.connection is not None, self.story(number)
        return client, client.connection

    def _drop(self, number: int) -> tuple[Client, Connection]:
        client, connection = self._placed(number)
        connection.open = False
        client.connection = None
        return client, connection

    def _send(self, command: do.Send) -> None:
        client = self._alive(command.number)
        replica = command.replica
        story = self.story(command.number)
        assert client.connection is None, story
        assert self.machine.serving[replica.id] is replica
        assert (replica.id, replica.started_s) not in client.tried, story
        assert command.resumes == (client.moves > 0)
        assert replica.returns_token_ids or not command.resumes
        tier = client.ask.tier
        if tier is not None and client.ask.kind != "auxiliary":
            assert tier.allows(replica.precision), story
        client.sends += 1
        tries = client.sends - client.free_sends - client.moves
        assert tries <= self.scenario.policy.max_attempts, story
        client.connection = self._replicas.connect(command.number, replica)

    def _hold(self, command: do.Hold) -> None:
        client = self._alive(command.number)
        assert client.connection is None
        assert isinstance(self.machine.requests[command.number].phase, Queued | Resuming)

    def _forward(self, command: do.Forward) -> None:
        client, connection = self._placed(command.number)
        if client.ask.kind != "stream" or not connection.answers:
            self._ends(client, connection, FinishStatus.CLIENT_ERROR)
        else:
            client.forwarded = True
            assert command.credit_tokens >= connection.made, self.story(command.number)
            client.credit = command.credit_tokens
            client.see(connection)

    def _show_error(self, command: do.ShowError) -> None:
        client, connection = self._placed(command.number)
        assert client.forwarded
        self._ends(client, connection, FinishStatus.FAILED)

    def _ends(self, client: Client, connection: Connection, status: FinishStatus) -> None:
        """The client is shown an error, with which the answer ends."""
        client.forwarded = True
        connection.open = False
        self._later(0, connection.number, lambda: on.Finished(connection.number, status))

    def _let_go(self, command: do.LetGo) -> None:
        client, connection = self._drop(command.number)
        if connection.does == "reword" and command.number in self.machine.requests:
            client.free_sends += 1

    def _retry(self, command: do.Retry) -> None:
        client, connection = self._drop(command.number)
        assert connection.replica.id == command.replica
        assert not client.forwarded, self.story(command.number)
        client.tried.add(connection.start)

    def _depart(self, command: do.Depart) -> None:
        client, connection = self._placed(command.number)
        assert client.forwarded
        assert isinstance(self.machine.requests[command.number].phase, Streaming)

        def leaves(connection: Connection) -> Event:
            return self._replicas.broken(
                connection, Cause.HANDED_OVER, with_cache=command.with_cache
            )

        self._replicas.when(connection, self.scenario.reading, leaves)

    def _resume(self, command: do.Resume) -> None:
        client, connection = self._drop(command.number)
        assert connection.replica.id == command.replica
        assert client.forwarded, self.story(command.number)
        client.moves += 1
        assert client.moves <= self.scenario.policy.max_moves
        if command.cause is not Cause.DIVERGED:
            client.tried.add(connection.start)

    def _survey(self, command: do.Survey) -> None:
        progress = {}
        for number in command.numbers:
            client, connection = self._placed(number)
            assert connection.start == (command.replica, command.started_s)
            movable = client.ask.movable and client.ask.kind == "stream"
            progress[number] = on.Progress(len(client.shown), movable, 0.1)
        surveyed = on.Surveyed(command.replica, command.started_s, progress)
        self._later(0, None, lambda: surveyed)

    def _refuse(self, command: do.Refuse) -> None:
        client = self._alive(command.number)
        assert client.refused is None
        client.refused = command
        if command.refusal in {Refusal.QUEUE_FULL, Refusal.SHED}:
            assert 1 <= command.retry_after_s <= 60
            assert not client.moves
        if command.refusal is Refusal.PROMISE:
            assert not client.sends, self.story(command.number)
            assert command.retry_after_s >= 1
        if command.refusal is Refusal.QUEUE_FULL:
            assert len(self.machine.waiting) >= self._max_queued, self.story(command.number)

    def _demote(self, command: do.Demote) -> None:
        client = self._alive(command.number)
        assert not client.demoted
        assert not client.moves
        client.demoted = True

    def _record(self, command: do.Record) -> None:
        client = self._alive(command.number)
        client.records.append(command)
        client.connection = None
        assert command.moves == client.moves
        if client.refused is not None:
            assert command.status is not FinishStatus.COMPLETED
