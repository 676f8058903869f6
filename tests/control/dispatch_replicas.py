"""Replicas and clients of random worlds: what goes over connections, token by token.

Tokens are numbered, so that one which is lost or shown twice is seen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Protocol

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.events import Cause, Event, Rest
from oserve.control.dispatch.table import TableReplica

from .dispatch_scenario import Ask, Fake

_CAUSES = {"break": Cause.LOST, "trouble": Cause.FAILED, "diverge": Cause.DIVERGED}


@dataclass(eq=False, slots=True, kw_only=True)
class Connection:
    """What one replica does for one request; ``made``: tokens that it has told, all in all."""

    number: int
    replica: TableReplica
    does: str
    made: int
    open: bool = True
    answers: bool = False

    @property
    def start(self) -> tuple[str, float]:
        return self.replica.id, self.replica.started_s


@dataclass(eq=False, slots=True, kw_only=True)
class Client:
    """A client, as the gateway sees it. ``free_sends``: those that are no attempts."""

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

    def see(self, connection: Connection) -> None:
        """Show what has come, as far as that is allowed."""
        if self.forwarded:
            self.shown.extend(range(len(self.shown), min(connection.made, self.credit)))


class Later(Protocol):
    """Has something happen in so many steps, to a request or (``None``) to the fleet."""

    def __call__(
        self, steps: int, number: int | None, event: Callable[[], Event | None]
    ) -> None: ...


Tells = Callable[[Connection], Event | None]


class Replicas:
    """What the replicas of a world do."""

    def __init__(
        self, fakes: Mapping[str, Fake], clients: Mapping[int, Client], later: Later
    ) -> None:
        self._fakes = fakes
        self._clients = clients
        self._later = later
        self._scripts: dict[str, Iterator[str]] = {
            name: cycle(fake.script) for name, fake in fakes.items()
        }
        self._reworded: set[tuple[str, float]] = set()

    def connect(self, number: int, replica: TableReplica) -> Connection:
        """Send it a request."""
        client = self._clients[number]
        does = next(self._scripts[replica.id])
        connection = Connection(number=number, replica=replica, does=does, made=len(client.shown))
        if does == "reword":
            # How that replica wants to be asked is learned once.
            if connection.start in self._reworded:
                connection.does = "answer"
            self._reworded.add(connection.start)
        self._begin(connection, client)
        return connection

    def when(self, connection: Connection, steps: int, tells: Tells) -> None:
        """Later, if the connection still stands; if its request has ended, the world tells late."""

        def event() -> Event | None:
            if connection.open:
                return tells(connection)
            ended = self._clients[connection.number].records
            return on.Finished(connection.number) if ended else None

        self._later(steps, connection.number, event)

    def _begin(self, connection: Connection, client: Client) -> None:
        number, does = connection.number, connection.does
        first = self._fakes[connection.replica.id].first
        answers: dict[str, Event] = {
            "refuse 500": on.Refused(number=number, status=500, reason="500"),
            "refuse 429": on.Refused(number=number, status=429, reason="429", retry_after_s=2.0),
            "refuse 400": on.Refused(number=number, status=400, reason="400"),
            "refuse 401": on.Refused(number=number, status=401, reason="401"),
            "abort": on.Refused(number=number, status=500, reason="x", aborted=True),
            "unheard": on.Lost(number=number, reason="broke", status=400),
            "reword": on.Reworded(number),
            "crash": on.Crashed(number),
        }
        if does == "unreachable":
            self.when(connection, 0, self.breaks)
        elif does == "break at once" or (client.moves and does in answers and does != "crash"):
            # Whatever keeps a stream from going on, it is broken.
            self.when(connection, first, self.breaks)
        elif does in answers:
            self.when(connection, first, lambda _: answers[does])
        elif does != "hang":
            streams = client.ask.kind == "stream"
            self.when(connection, first, self._token if streams else self._begins)

    # -- what breaks ----------------------------------------------------------------------------
    def breaks(self, connection: Connection) -> Event:
        """The connection breaks."""
        number, client = connection.number, self._clients[connection.number]
        if client.forwarded and client.ask.kind == "stream":
            return self.broken(connection, Cause.LOST)
        if client.forwarded:
            return on.Broken(number=number, cause=Cause.LOST, rest=None, reason="broke")
        return on.Lost(
            number=number,
            reason="broke",
            status=200 if connection.answers else 0,
            connected=connection.does != "unreachable",
        )

    def broken(self, connection: Connection, cause: Cause, *, with_cache: bool = False) -> Event:
        """A stream cannot stay."""
        client = self._clients[connection.number]
        client.see(connection)
        made = len(client.shown)
        moves = client.ask.movable and not client.ask.hidden
        return on.Broken(
            number=connection.number,
            cause=cause,
            rest=Rest(client.ask.prompt + made, made) if moves else None,
            reason="broke",
            with_cache=with_cache,
            can_end=cause is Cause.FAILED,
        )

    # -- answers that come whole ----------------------------------------------------------------
    def _begins(self, connection: Connection) -> Event:
        ask = self._clients[connection.number].ask
        connection.answers = True
        each = self._fakes[connection.replica.id].each
        if connection.does in _CAUSES:
            self.when(connection, each, self.breaks)
        elif ask.kind == "long":
            self.when(connection, each, self._shows)
            self.when(connection, 2 * each, self._whole)
        else:
            self.when(connection, each * ask.output, self._whole)
        return on.Began(connection.number)

    def _shows(self, connection: Connection) -> Event:
        self._clients[connection.number].forwarded = True
        return on.Shown(connection.number)

    def _whole(self, connection: Connection) -> Event:
        client = self._clients[connection.number]
        client.shown = list(range(client.ask.output))
        connection.open = False
        return on.Finished(connection.number)

    # -- streams --------------------------------------------------------------------------------
    def _token(self, connection: Connection) -> Event | None:
        """The next token of a stream, or what comes instead of it."""
        client = self._clients[connection.number]
        output = client.ask.output
        if client.forwarded and connection.does in _CAUSES and 2 * connection.made >= output:
            return self.broken(connection, _CAUSES[connection.does])
        if connection.made == output:
            assert client.shown == list(range(output))
            connection.open = False
            return on.Finished(connection.number)
        connection.made += 1
        event: Event | None
        if connection.answers:
            event = self._progress(connection)
        else:
            connection.answers = True
            event = (on.Began if client.moves else on.Streams)(connection.number)
            self.when(connection, 0, self._progress)
        self.when(connection, self._fakes[connection.replica.id].each, self._token)
        return event

    def _progress(self, connection: Connection) -> Event | None:
        """The client sees what it may; if there is more, that is told."""
        client = self._clients[connection.number]
        client.see(connection)
        if connection.made > client.credit:
            return on.Progressed(connection.number, connection.made)
        return None
