"""Reads the answer of a replica that continues a stream, and converts it to the client's.

The continuation parses and stores every event, so that the stream can migrate again.
"""

from oserve.control.dispatch import events as on
from oserve.control.dispatch.events import Cause
from oserve.gateway.stream.answer import events_with_service_tier
from oserve.gateway.stream.continuation import BrokenError, Continuation, DivergedError
from oserve.gateway.stream.continuation_fields import UnmovableError
from oserve.gateway.stream.owner import AnswerOwner
from oserve.gateway.stream.pass_through import DONE
from oserve.gateway.stream.replay_buffer import read_event
from oserve.wire import Dechunker, ResponseHead, chunk
from oserve.wire.events import EventReader, EventsError
from oserve.wire.framing import FramingError
from oserve.wire.upstream import UpstreamConnection

_OK = 200


class ContinuationReader:
    """A sink for the answer of one replica that continues a stream."""

    def __init__(self, owner: AnswerOwner, continuation: Continuation) -> None:
        self._owner = owner
        self._continuation = continuation
        self._plain = owner.exchange.http_1_0
        self._head: ResponseHead | None = None
        self._dechunker: Dechunker | None = None
        self._reader = EventReader()
        self._connection: UpstreamConnection | None = None
        self._begun = False

    @property
    def cancelled(self) -> bool:
        """Whether the answer is no longer needed."""
        return not self._owner.wanted or not self._owner.reads(self)

    def attached(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._owner.attached(connection)

    def crashed(self, error: Exception) -> None:
        """Handle an exception raised while reading."""
        self._owner.crashed(error)

    def forward(self) -> None:
        """Does nothing: the client has part of the stream already."""

    def show_error(self) -> None:
        """Report an error; its form differs from that of the client's stream."""

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        self._dechunker = Dechunker() if head.chunked else None

    def on_data(self, data: bytes) -> None:
        owner = self._owner
        if self._head is None or self._head.status != _OK:
            return
        owner.progressed(0)
        if not self._begun:
            self._begun = True
            owner.report(on.Began(owner.number))
        try:
            payload = data if self._dechunker is None else self._dechunker.feed(data)
            events = self._reader.feed(payload)
        except (EventsError, FramingError) as error:
            if self._connection is not None:
                self._connection.abort()
            self.on_error(str(error))
            return
        found = [event.data for event in events if event.data is not None]
        if found:
            self._translate(found)

    def _translate(self, found: list[bytes]) -> None:
        continuation = self._continuation
        events = []
        cause: Cause | None = None
        try:
            for data in found:
                if data.strip() != DONE:
                    events.append(continuation.convert(read_event(data)))
        except BrokenError:
            cause = Cause.ABORTED
        except DivergedError:
            cause = Cause.DIVERGED
        except UnmovableError:
            cause = Cause.FAILED
        payload = events_with_service_tier(b"".join(events), self._owner.service_tier)
        if payload:
            self._owner.exchange.write(payload if self._plain else chunk(payload))
        if continuation.finished:
            self._owner.conclude()
        elif cause is not None:
            self._owner.broken(cause, f"the replica could not continue the stream: {cause}")

    def on_end(self) -> None:
        status = self._head.status if self._head is not None else 0
        self.on_error(
            f"it answered with status {status}" if status != _OK else "the answer ended early"
        )

    def on_error(self, reason: str) -> None:
        if not self.cancelled:
            self._owner.broken(Cause.LOST, reason)
