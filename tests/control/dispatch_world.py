"""A small world around a request machine, on a virtual clock: clients, replicas, a fleet.

It carries out commands as the gateway does, and checks each: whether it may come now, and whether
what the client has been shown is the beginning of its answer. Tokens are numbered, so that one that
is lost or shown twice is seen. Moments are multiples of an eighth of a second, so that many fall
together.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, cycle

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Command, Refusal
from oserve.control.dispatch.events import Cause, Event, Rest
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.policy import DispatchPolicy, DrainDecision, all_leave
from oserve.control.dispatch.router import NoRoute
from oserve.control.dispatch.state import Queued, Resuming, Streaming
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.control.dispatch.witness import Witness
from oserve.core import Endpoint, FinishStatus, ReplicaPhase, Request

STEP_S = 0.125
_MOST_STEPS = 20_000

# What a replica does with a request that it is sent.
ANSWERS = ("answer",)
FAULTS = (
    "refuse 500",
    "refuse 429",
    "refuse 400",
    "refuse 401",
    "abort",
    "unreachable",
    "break at once",
    "break",
    "unheard",
    "trouble",
    "diverge",
    "hang",
    "reword",
    "crash",
)
_BREAKS = {"break": Cause.LOST, "trouble": Cause.FAILED, "diverge": Cause.DIVERGED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A forecast of an answer's length."""

    tokens: float

    def beyond(self, made_tokens: float) -> float:
        return max(self.tokens, 1.5 * made_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a client asks, and when. ``guess``: of its output; ``None``: it is known.

    ``leaves``: steps after which the client goes. ``kind``: stream, whole, long or auxiliary.
    ``hidden``: why the stream cannot move shows only when it is to.
    """

    at: int = 0
    prompt: int = 10
    output: int = 3
    guess: int | None = None
    kind: str = "stream"
    movable: bool = True
    hidden: bool = False
    leaves: int | None = None
    session: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to the fleet: gone, again, drain, vacate, elsewhere, expected, unexpected."""

    at: int
    what: str
    replica: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fake:
    """A replica: its limits, steps to the first token and to each further one, what it does."""

    most: int = 2
    context: int = 0
    first: int = 1
    each: int = 1
    resumes: bool = True
    attached: bool = False
    script: tuple[str, ...] = ANSWERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that happens, and how it is told: ``together``, a moment's events are one call."""

    fakes: tuple[Fake, ...]
    asks: tuple[Ask, ...]
    changes: tuple[Change, ...] = ()
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    drain: DrainDecision = all_leave
    together: bool = True
    reading: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Connection:
    """What one replica does for one request; ``made``: tokens that it has told, all in all."""

    number: int
    replica: TableReplica
    does: str
    made: int
    open: bool = True
    answers: bool = False


@dataclass(eq=False, slots=True, kw_only=True)
class Client:
    """A client, as the gateway sees it."""

    ask: Ask
    connection: Connection | None = None
    shown: list[int] = field(default_factory=list)
    forwarded: bool = False
    credit: int = 0
    sends: int = 0
    free_sends: int = 0
    moves: int = 0
    demoted: bool = False
    tried: set[tuple[str, float]] = field(default_factory=set)
    refused: do.Refuse | None = None
    records: list[do.Record] = field(default_factory=list)


class World:
    """Plays a scenario to its end."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        policy = scenario.policy
        self.machine = RequestMachine(policy, scenario.drain)
        self._max_queued = -(-policy.max_queued // policy.processes)
        self.witness = Witness(self.machine, max_queued=self._max_queued)
        self.clients: dict[int, Client] = {}
        self.now_s = 0.0
        self.told: Counter[str] = Counter()
        self._queue: list[tuple[float, int, int | None, Callable[[], Event | None]]] = []
        self._order = count()
        self._expected = True
        self._reworded: set[tuple[str, float]] = set()
        self._starts = [0.0] * len(scenario.fakes)
        self._phases = [ReplicaPhase.READY] * len(scenario.fakes)
        self._scripts: list[Iterator[str]] = [cycle(fake.script) for fake in scenario.fakes]
        self._commands: dict[type[Command], Callable[..., None]] = {
            do.Send: self._send,
            do.Hold: self._hold,
            do.Forward: self._forward,
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
            self._later(change.at, None, lambda change=change: self._change(change))
        for number, ask in enumerate(sorted(self.scenario.asks, key=lambda ask: ask.at)):
            self._later(ask.at, number, lambda number=number, ask=ask: self._ask(number, ask))
        ticks = steps = 0
        while True:
            steps += 1
            assert steps < _MOST_STEPS, "it does not end"
            next_s = min(self._queue[0][0] if self._queue else float("inf"), self.machine.due_s)
            if next_s == float("inf"):
                break
            if next_s > self.now_s:
                self.now_s, ticks = next_s, 0
            if self.machine.due_s <= self.now_s:
                ticks += 1
                assert ticks <= 2 + len(self.scenario.asks), "ticks make no progress"
                self._tell([on.Tick()])
                assert self.machine.due_s > self.now_s
                self._in_time()
            else:
                self._tell(self._due())
        self._over()
        return self

    def _later(self, steps: int, number: int | None, event: Callable[[], Event | None]) -> None:
        """Have something happen, to a request or to the fleet."""
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
        for event in events:
            self.told[type(event).__name__] += 1
        for command in self.machine.handle_all(events, self.now_s):
            self.told[type(command).__name__] += 1
            self._commands[type(command)](command)
        self._settled()

    # -- what must hold -------------------------------------------------------------------------
    def _settled(self) -> None:
        """Nothing waits while a replica that may serve it has room."""
        for state in self.machine.waiting:
            assert state.request is not None
            choice = self.machine.fleet.choose(state, state.request, self.now_s)
            assert isinstance(choice, NoRoute), self.story(state.number)

    def _in_time(self) -> None:
        policy = self.scenario.policy
        for state in self.machine.requests.values():
            waited_s = self.now_s - state.arrival_s
            assert waited_s < policy.request_timeout_s, self.story(state.number)
            shed_s = policy.overload.shed_after_s
            if shed_s is not None and isinstance(state.phase, Queued):
                assert waited_s < shed_s, self.story(state.number)

    def _over(self) -> None:
        for number, client in self.clients.items():
            assert len(client.records) == 1, self.story(number)
            if client.records[0].status is FinishStatus.COMPLETED:
                whole = client.ask.kind == "auxiliary" or client.refused is not None
                assert whole or len(client.shown) == client.ask.output, self.story(number)
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
        if ask.kind == "auxiliary":
            return on.Arrived(number=number, request=None)
        return on.Arrived(
            number=number,
            request=Request(
                id=str(number),
                arrival_s=self.now_s,
                workload_type="t",
                prompt_tokens=ask.prompt,
                output_tokens=ask.output if ask.guess is None else ask.guess,
            ),
            rank_s=self.now_s + ask.prompt / 20,
            streams=ask.kind == "stream",
            session=ask.session,
            forecast=None if ask.guess is None else Guess(tokens=float(ask.guess)),
        )

    @property
    def table(self) -> RoutingTable:
        """The fleet as it is."""
        replicas = [
            TableReplica(
                id=f"r{index}",
                shape="s",
                phase=self._phases[index],
                endpoint=Endpoint(url="x"),
                max_inflight=fake.most,
                max_model_len=fake.context,
                accepts_priority=True,
                tells_token_ids=fake.resumes,
                prefill_s_per_token=0.01,
                decode_s_per_token=0.1,
                attached=fake.attached,
                started_s=self._starts[index],
            )
            for index, fake in enumerate(self.scenario.fakes)
            if self._phases[index] is not ReplicaPhase.GONE
        ]
        return RoutingTable(
            plan_id="p",
            workload_types=(),
            routing_shares={"t": {"r0": 0.7, "r1": 0.3}},
            replicas=tuple(replicas),
            expected=self._expected,
        )

    def _change(self, change: Change) -> Event:
        index = change.replica % len(self.scenario.fakes)
        match change.what:
            case "vacate":
                return on.Vacate(replica=f"r{index}", within_s=change.steps * STEP_S)
            case "elsewhere":
                return on.LoadElsewhere({f"r{index}": (float(change.steps), change.steps)})
            case "expected" | "unexpected":
                self._expected = change.what == "expected"
            case "drain":
                if self._phases[index] is ReplicaPhase.READY:
                    self._phases[index] = ReplicaPhase.DRAINING
            case "again":
                self._break_all(index)
                self._phases[index] = ReplicaPhase.READY
                self._starts[index] = self.now_s
            case "gone":
                self._break_all(index)
                self._phases[index] = ReplicaPhase.GONE
        return on.TableChanged(self.table)

    def _break_all(self, index: int) -> None:
        """Its connections break, which is told after the table has changed."""
        for client in self.clients.values():
            connection = client.connection
            if connection is not None and connection.replica.id == f"r{index}":
                self._when(connection, 0, self._breaks)

    # -- replicas -------------------------------------------------------------------------------
    def _when(
        self, connection: Connection, steps: int, tells: Callable[[Connection], Event | None]
    ) -> None:
        """Later, if the connection still stands; of a request that has ended it may be told."""

        def event() -> Event | None:
            if connection.open:
                return tells(connection)
            ended = self.clients[connection.number].records
            return on.Finished(connection.number) if ended else None

        self._later(steps, connection.number, event)

    def _fake(self, connection: Connection) -> Fake:
        return self.scenario.fakes[int(connection.replica.id[1:])]

    def _connected(self, connection: Connection) -> None:
        first = self._fake(connection).first
        number = connection.number
        does: dict[str, Callable[[], Event]] = {
            "refuse 500": lambda: on.Refused(number=number, status=500, reason="500"),
            "refuse 429": lambda: on.Refused(
                number=number, status=429, reason="429", retry_after_s=2.0
            ),
            "refuse 400": lambda: on.Refused(number=number, status=400, reason="400"),
            "refuse 401": lambda: on.Refused(number=number, status=401, reason="401"),
            "abort": lambda: on.Refused(number=number, status=500, reason="x", aborted=True),
            "unheard": lambda: on.Lost(number=number, reason="broke", status=400),
            "reword": lambda: on.Reworded(number),
            "crash": lambda: on.Crashed(number),
        }
        client = self.clients[number]
        what = connection.does
        if what == "reword":
            # It learns how to ask that replica, once.
            start = (connection.replica.id, connection.replica.started_s)
            what = connection.does = "answer" if start in self._reworded else what
            self._reworded.add(start)
        if what == "hang":
            return
        if what in {"unreachable", "break at once"}:
            self._when(connection, 0 if what == "unreachable" else first, self._breaks)
        elif client.moves and what in does and what != "crash":
            # Whatever keeps it from going on, the stream is broken.
            self._when(connection, first, self._breaks)
        elif what in does:
            self._when(connection, first, lambda _: does[what]())
        elif client.ask.kind == "stream":
            self._when(connection, first, self._token)
        else:
            self._when(connection, first, lambda _: self._begins(connection))

    def _breaks(self, connection: Connection) -> Event:
        client = self.clients[connection.number]
        if client.forwarded and client.ask.kind == "stream":
            return self._broken(connection, Cause.LOST)
        status = 200 if connection.answers else 0
        if client.forwarded:
            return on.Broken(number=connection.number, cause=Cause.LOST, rest=None, reason="broke")
        return on.Lost(
            number=connection.number,
            reason="broke",
            status=status,
            connected=connection.does != "unreachable",
        )

    def _begins(self, connection: Connection) -> Event:
        ask = self.clients[connection.number].ask
        connection.answers = True
        each = self._fake(connection).each
        if connection.does == "break":
            self._when(connection, each, self._breaks)
        elif ask.kind == "long":
            self._when(connection, each, lambda _: on.Shown(connection.number))
            self._when(connection, 2 * each, self._whole)
        else:
            self._when(connection, each * ask.output, self._whole)
        return on.Began(connection.number)

    def _whole(self, connection: Connection) -> Event:
        client = self.clients[connection.number]
        client.shown = list(range(client.ask.output))
        connection.open = False
        return on.Finished(connection.number)

    def _token(self, connection: Connection) -> Event | None:
        """The next token of a stream, or what comes instead of it."""
        client = self.clients[connection.number]
        ask = client.ask
        halfway = 2 * connection.made >= ask.output
        if client.forwarded and halfway and connection.does in _BREAKS:
            return self._broken(connection, _BREAKS[connection.does])
        if connection.made == ask.output:
            assert client.shown == list(range(ask.output)), self.story(connection.number)
            connection.open = False
            return on.Finished(connection.number)
        connection.made += 1
        self._when(connection, self._fake(connection).each, self._token)
        if not connection.answers:
            connection.answers = True
            if client.moves:
                self._show(client, connection)
                return on.Began(connection.number)
            return on.Streams(connection.number)
        self._show(client, connection)
        if connection.made > client.credit:
            return on.Progressed(connection.number, connection.made)
        return None

    def _show(self, client: Client, connection: Connection) -> None:
        if client.forwarded:
            client.shown.extend(range(len(client.shown), min(connection.made, client.credit)))

    def _broken(self, connection: Connection, cause: Cause, *, cache: bool = False) -> Event:
        client = self.clients[connection.number]
        self._show(client, connection)
        made = len(client.shown)
        rest = Rest(client.ask.prompt + made, made)
        return on.Broken(
            number=connection.number,
            cause=cause,
            rest=rest if client.ask.movable and not client.ask.hidden else None,
            reason="broke",
            with_cache=cache,
            can_end=cause is Cause.FAILED,
        )

    # -- commands -------------------------------------------------------------------------------
    def _alive(self, number: int) -> Client:
        client = self.clients[number]
        assert not client.records, self.story(number)
        return client

    def _placed(self, number: int) -> tuple[Client, Connection]:
        client = self._alive(number)
        assert client.connection is not None, self.story(number)
        return client, client.connection

    def _send(self, command: do.Send) -> None:
        client = self._alive(command.number)
        replica, policy = command.replica, self.scenario.policy
        assert client.connection is None, self.story(command.number)
        assert self.machine.serving[replica.id] is replica
        assert (replica.id, replica.started_s) not in client.tried, self.story(command.number)
        assert command.resumes == (client.moves > 0)
        assert replica.tells_token_ids or not command.resumes
        client.sends += 1
        tries = client.sends - client.free_sends - client.moves
        assert tries <= policy.max_attempts, self.story(command.number)
        script = self._scripts[int(replica.id[1:])]
        client.connection = connection = Connection(
            number=command.number, replica=replica, does=next(script), made=len(client.shown)
        )
        self._connected(connection)

    def _hold(self, command: do.Hold) -> None:
        client = self._alive(command.number)
        assert client.connection is None
        assert isinstance(self.machine.requests[command.number].phase, Queued | Resuming)

    def _forward(self, command: do.Forward) -> None:
        client, connection = self._placed(command.number)
        client.forwarded = True
        if client.ask.kind != "stream" or not connection.answers:
            # It is an error, and the answer ends with it.
            connection.open = False
            self._later(
                0, command.number, lambda: on.Finished(command.number, FinishStatus.CLIENT_ERROR)
            )
            return
        if connection.does == "trouble" and client.shown and connection.made == len(client.shown):
            connection.open = False
            self._later(0, command.number, lambda: on.Finished(command.number, FinishStatus.FAILED))
            return
        assert command.credit_tokens >= connection.made, self.story(command.number)
        client.credit = command.credit_tokens
        self._show(client, connection)

    def _drop(self, number: int) -> Client:
        client, connection = self._placed(number)
        connection.open = False
        client.connection = None
        return client

    def _let_go(self, command: do.LetGo) -> None:
        reworded = self._placed(command.number)[1].does == "reword"
        client = self._drop(command.number)
        client.free_sends += reworded and command.number in self.machine.requests

    def _retry(self, command: do.Retry) -> None:
        start = self._placed(command.number)[1].replica
        client = self._drop(command.number)
        assert start.id == command.replica
        assert not client.forwarded, self.story(command.number)
        client.tried.add((start.id, start.started_s))

    def _depart(self, command: do.Depart) -> None:
        client, connection = self._placed(command.number)
        assert client.forwarded
        assert isinstance(self.machine.requests[command.number].phase, Streaming)

        def leaves(connection: Connection) -> Event:
            return self._broken(connection, Cause.HANDED_OVER, cache=command.with_cache)

        self._when(connection, self.scenario.reading, leaves)

    def _resume(self, command: do.Resume) -> None:
        start = self._placed(command.number)[1].replica
        client = self._drop(command.number)
        assert start.id == command.replica
        assert client.forwarded, self.story(command.number)
        client.moves += 1
        assert client.moves <= self.scenario.policy.max_moves
        if command.cause is not Cause.DIVERGED:
            client.tried.add((start.id, start.started_s))

    def _survey(self, command: do.Survey) -> None:
        progress = {}
        for number in command.numbers:
            client, connection = self._placed(number)
            assert (connection.replica.id, connection.replica.started_s) == (
                command.replica,
                command.started_s,
            )
            movable = client.ask.movable and client.ask.kind == "stream"
            progress[number] = on.Progress(len(client.shown), movable, 0.1)
        self._later(0, None, lambda: on.Surveyed(command.replica, command.started_s, progress))

    def _refuse(self, command: do.Refuse) -> None:
        client = self._alive(command.number)
        assert client.refused is None
        client.refused = command
        if command.refusal in {Refusal.QUEUE_FULL, Refusal.SHED}:
            assert 1 <= command.retry_after_s <= 60
            assert not client.moves
        if command.refusal is Refusal.QUEUE_FULL:
            assert len(self.machine.waiting) >= self._max_queued

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
        assert (command.status is FinishStatus.COMPLETED) <= (client.refused is None)


def with_faults(scenario: Scenario, *faults: str) -> Scenario:
    """The same with replicas that do these things, all of them in turn."""
    return replace(
        scenario, fakes=tuple(replace(fake, script=faults or ANSWERS) for fake in scenario.fakes)
    )
