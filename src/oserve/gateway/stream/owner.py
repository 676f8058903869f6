"""The interface between the readers of an answer and its request."""

from typing import Protocol

from oserve.control.dispatch.events import Cause, Event
from oserve.gateway.http.headers import Headers
from oserve.gateway.stream.answer import TokenUsage
from oserve.gateway.stream.migration import StreamMigration
from oserve.wire import Exchange
from oserve.wire.upstream import Sink, UpstreamConnection


class AnswerOwner(Protocol):
    """A request whose answer is being read.

    ``wanted``: the client still waits for the answer. ``committed``: it has part of the answer.
    ``streams``, ``hides_usage``: it requested a stream, and no usage report.
    """

    number: int
    exchange: Exchange
    streams: bool
    hides_usage: bool
    generates: bool
    service_tier: str
    committed: bool
    usage: TokenUsage
    migration: StreamMigration | None

    @property
    def wanted(self) -> bool: ...

    def reads(self, sink: Sink) -> bool:
        """Whether this reader belongs to the present replica."""
        ...

    def report(self, event: Event) -> None:
        """Report an event to the request machine and execute its commands before returning."""
        ...

    def attached(self, connection: UpstreamConnection) -> None:
        """Set the connection that receives the answer."""
        ...

    def crashed(self, error: Exception) -> None:
        """End this request after an exception while reading."""
        ...

    def first_byte(self) -> None:
        """Record that the replica has begun to answer."""
        ...

    def progressed(self, events: int) -> None:
        """Record progress of a stream: its events so far."""
        ...

    def commit(
        self, status: int, headers: Headers, body: bytes, *, close: bool, events: bool
    ) -> None:
        """Send the head and the first bytes of the body; ``events``: it is an event stream."""
        ...

    def retries_without_options(self) -> bool:
        """Handle a refusal of ``stream_options``; returns whether to retry without them."""
        ...

    def broken(self, cause: Cause, reason: str, *, can_end: bool = False) -> None:
        """Report that a stream must leave its replica."""
        ...

    def broken_later(self, cause: Cause, reason: str) -> None:
        """As ``broken``, after other streams had their turn."""
        ...

    def conclude(self) -> None:
        """Finish a continued stream after its last token."""
        ...
