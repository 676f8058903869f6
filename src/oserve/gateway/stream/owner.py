"""What readers of answers know of the request that they read for."""

from typing import Protocol

from oserve.control.dispatch.events import Cause, Event
from oserve.gateway.http.headers import Headers
from oserve.gateway.stream.answer import TokenUsage
from oserve.gateway.stream.migration import StreamMigration
from oserve.wire import Exchange
from oserve.wire.upstream import Sink, UpstreamConnection


class AnswerOwner(Protocol):
    """A request whose answer is being read.

    ``wanted``: somebody waits for the answer; ``committed``: the client has part of it;
    ``streams`` and ``hides_usage``: it asked for a stream, and not for the usage report.
    """

    number: int
    exchange: Exchange
    streams: bool
    hides_usage: bool
    generates: bool
    committed: bool
    usage: TokenUsage
    migration: StreamMigration | None

    @property
    def wanted(self) -> bool: ...

    def reads(self, sink: Sink) -> bool:
        """Whether this is the reader whose answer counts."""
        ...

    def report(self, event: Event) -> None:
        """Tell the request machine, whose commands are carried out before this returns."""
        ...

    def attached(self, connection: UpstreamConnection) -> None:
        """A connection carries the answer."""
        ...

    def crashed(self, error: Exception) -> None:
        """Reading raised: that ends this request and nothing else."""
        ...

    def first_byte(self) -> None:
        """The replica has begun to answer."""
        ...

    def passed_on(self, events: int) -> None:
        """More of a stream came: so many events by now."""
        ...

    def commit(
        self, status: int, headers: Headers, body: bytes, *, close: bool, events: bool
    ) -> None:
        """Send the head and the first bytes of the body; ``events``: it is a stream of events."""
        ...

    def drops_options(self) -> bool:
        """The replica refused ``stream_options``; whether to ask again without them."""
        ...

    def broken(self, cause: Cause, reason: str, *, can_end: bool = False) -> None:
        """A stream that the client has part of cannot stay where it is."""
        ...

    def broken_later(self, cause: Cause, reason: str) -> None:
        """As ``broken``, when other streams have had their turn."""
        ...

    def conclude(self) -> None:
        """All tokens of a continued stream have come."""
        ...
