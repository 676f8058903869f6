"""Reads one replica's answer to a request, and reports events to the request machine.

Until the client has the first event, or a whole answer, a failed request can be retried on another
replica. Streams are forwarded event by event (``pass_through``). Other answers are held until they
are complete, and forwarded unchanged.
"""

from dataclasses import replace

from oserve.control.dispatch import events as on
from oserve.control.dispatch.breaker import retry_after_s
from oserve.control.dispatch.events import Cause
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus
from oserve.gateway.http.headers import client_headers, is_event_stream
from oserve.gateway.stream.answer import (
    Trouble,
    read_answer,
    trouble_of,
    usage_in,
    usage_of,
    with_service_tier,
)
from oserve.gateway.stream.owner import AnswerOwner
from oserve.gateway.stream.pass_through import PassThrough
from oserve.wire import Dechunker, Framing, ResponseHead
from oserve.wire.events import EventsError
from oserve.wire.framing import LAST_CHUNK, FramingError
from oserve.wire.upstream import UpstreamConnection

_HOLD_BYTES = 1024 * 1024
_TAIL_BYTES = 4096
# Every further piece is scanned together with the held bytes, so their number is bounded.
_BLANK_BYTES = 16 * 1024
_OK, _CLIENT_ERROR, _SERVER_ERROR = 200, 400, 500
_OPTION = b"stream_options"
_OPTION_REFUSALS = {400, 422}


class AnswerReader:
    """A sink for the replica's answer; the session drops it when it leaves the replica."""

    def __init__(self, owner: AnswerOwner, replica: TableReplica) -> None:
        self._owner = owner
        self._replica = replica
        self._connection: UpstreamConnection | None = None
        self._head: ResponseHead | None = None
        self._chunked = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail = b""
        self._dechunker: Dechunker | None = None
        self._trouble: Trouble | None = None
        self._forwarding = False
        self._stream: PassThrough | None = None

    @property
    def events(self) -> int:
        """The events with text so far, about one token each."""
        return self._stream.events if self._stream is not None else 0

    # -- the replica (Sink) ---------------------------------------------------------------------
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

    @property
    def _framing(self) -> Framing | None:
        return self._connection.framing if self._connection is not None else None

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        self._chunked = head.chunked
        if head.chunked and self._owner.exchange.http_1_0:
            self._dechunker = Dechunker()

    def on_data(self, data: bytes) -> None:
        if self._stream is not None:
            self._take(self._stream, data)
        elif self._head is None:
            self.on_error("its answer has no head")
        elif self._owner.committed:
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
            self._owner.exchange.write(self._framed(data))
        else:
            self._hold(self._head, data)

    def _hold(self, head: ResponseHead, data: bytes) -> None:
        """Hold bytes until it is clear whether the client gets them."""
        owner = self._owner
        self._held.append(data)
        self._held_bytes += len(data)
        if owner.streams and head.status == _OK:
            kind = is_event_stream(head, b"".join(self._held))
            if kind:
                self._begin_events()
            elif kind is None and self._held_bytes > _BLANK_BYTES:
                self._reject("it sends nothing but white space")
            if kind is not False:
                return
        framing = self._framing
        # An answer in one piece is reported only once, at its end.
        begins = self._held_bytes == len(data) and (framing is None or not framing.complete)
        if begins and head.status < _CLIENT_ERROR:
            owner.first_byte()
            owner.report(on.Began(owner.number))
        if self._held_bytes > _HOLD_BYTES:
            owner.report(on.Shown(owner.number))
            self._commit(head)

    # -- a stream of events ---------------------------------------------------------------------
    def _begin_events(self) -> None:
        migration = self._owner.migration
        self._stream = PassThrough(
            hide_usage=self._owner.hides_usage,
            replay=migration.buffer if migration is not None else None,
            shows_ids=migration is None or migration.shows_ids,
            plain=self._owner.exchange.http_1_0,
            service_tier=self._owner.service_tier,
        )
        held, self._held = b"".join(self._held), []
        self._held_bytes = 0
        self._take(self._stream, held)

    def _reject(self, reason: str) -> None:
        """Stop reading an invalid answer."""
        if self._connection is not None:
            self._connection.abort()
        self.on_error(reason)

    def _take(self, stream: PassThrough, data: bytes) -> None:
        owner = self._owner
        try:
            output = stream.take(data, chunked=self._chunked)
        except (EventsError, FramingError) as error:
            self._reject(str(error))
            return
        if owner.committed:
            owner.progressed(stream.events)
            if output:
                owner.exchange.write(output)
            if stream.trouble is not None:
                self._report_trouble(stream.trouble)
            return
        if output:
            self._held.append(output)
            self._held_bytes += len(output)
        # Comments keep a connection alive, but do not count as an answer.
        if stream.begun:
            self._begin_answer(stream)
        elif self._held_bytes > _HOLD_BYTES:
            self._reject("it sends nothing but comments")

    def _begin_answer(self, stream: PassThrough) -> None:
        """Report the first events: the machine forwards them or retries on another replica."""
        owner, head = self._owner, self._head
        if stream.trouble is not None:
            self._report_refused(stream.trouble)
        else:
            owner.report(on.Streams(owner.number))
        if not self._forwarding or head is None:
            return
        owner.first_byte()
        self._commit(head)
        if stream.trouble is not None:
            self._report_trouble(stream.trouble)

    def forward(self) -> None:
        """Forward the held answer to the client."""
        self._forwarding = True

    def show_error(self) -> None:
        """Forward the error in the stream, and what follows it."""
        stream = self._stream
        if stream is not None and stream.trouble is not None:
            self._trouble = stream.trouble
            output = stream.forward_error()
            if output:
                self._owner.exchange.write(output)

    def _report_trouble(self, trouble: Trouble) -> None:
        """Report an error in a stream that has reached the client: it migrates, or ends with it."""
        if trouble.of_client:
            self.show_error()
        else:
            cause = Cause.ABORTED if trouble.aborted else Cause.FAILED
            self._owner.broken(cause, trouble.message, can_end=True)

    def _end_events(self, stream: PassThrough) -> None:
        owner = self._owner
        output = stream.end()
        if output:
            (owner.exchange.write if owner.committed else self._held.append)(output)
        trouble = stream.trouble
        if not owner.committed:
            if trouble is None and not stream.begun:
                self.on_error("its stream was empty")
                return
            self._begin_answer(stream)
            if not owner.committed:
                return
        elif trouble is not None:
            self._report_trouble(trouble)
        if not owner.reads(self) or (trouble is not None and self._trouble is None):
            return
        if self._framing is None and not (stream.done or stream.finished or self._trouble):
            # Only the end of the connection marks the end of the answer.
            self.on_error("the answer ended early")
            return
        owner.usage = usage_of(stream.usage)
        if not owner.exchange.http_1_0:
            owner.exchange.write(LAST_CHUNK)
        self._end(_OK)

    # -- a non-streaming answer -----------------------------------------------------------------
    def _framed(self, data: bytes) -> bytes:
        return data if self._dechunker is None else self._dechunker.feed(data)

    def _end_whole(self, head: ResponseHead) -> None:
        """Report a complete answer: the machine forwards it or retries on another replica."""
        owner = self._owner
        body = b"".join(self._held)
        if head.chunked:
            body = Dechunker().feed(body)
        if head.status >= _CLIENT_ERROR:
            if self._refuses_stream_options(head.status, body):
                owner.report(on.Reworded(owner.number))
                return
            self._trouble = Trouble(status=head.status, message="")
        elif owner.generates:
            answer = read_answer(body)
            if answer is None and self._framing is None:
                # Only the end of the connection marks the end of the answer.
                self.on_error("the answer ended early")
                return
            if answer is not None:
                owner.usage = usage_of(answer.usage)
                self._trouble = trouble_of(answer)
        if self._trouble is not None:
            self._report_refused(self._trouble)
            if not self._forwarding:
                return
        if head.status < _CLIENT_ERROR:
            owner.first_byte()
            if owner.service_tier:
                body = with_service_tier(body, owner.service_tier)
                self._held, self._dechunker = [body], None
                head = replace(head, length=len(body), chunked=False)
        self._commit(head)
        self._end(head.status)

    def _refuses_stream_options(self, status: int, body: bytes) -> bool:
        """Whether a server refused ``stream_options``, and the request is sent without them."""
        if not (self._replica.attached and self._owner.streams and status in _OPTION_REFUSALS):
            return False
        return _OPTION in body and self._owner.retries_without_options()

    # -- outcomes -------------------------------------------------------------------------------
    def _report_refused(self, trouble: Trouble) -> None:
        head = self._head
        header = dict(head.headers).get(b"retry-after", b"") if head is not None else b""
        reason = f"it answered with status {trouble.status}"
        self._owner.report(
            on.Refused(
                number=self._owner.number,
                status=trouble.status,
                reason=trouble.message if trouble.aborted else reason,
                aborted=trouble.aborted,
                retry_after_s=retry_after_s(header),
            )
        )

    def _commit(self, head: ResponseHead) -> None:
        """Send the head and the held bytes; from here on no retry is possible."""
        owner = self._owner
        events = self._stream is not None
        fields, close = client_headers(head, plain=owner.exchange.http_1_0, events=events)
        held, self._held = b"".join(self._held), []
        if not events:
            self._tail = held[-_TAIL_BYTES:]
            held = self._framed(held)
        owner.commit(head.status, fields, held, close=close, events=events)

    def on_end(self) -> None:
        owner, head = self._owner, self._head
        if head is None:
            self.on_error("its answer has no head")
        elif self._stream is not None:
            self._end_events(self._stream)
        elif owner.committed:
            owner.usage = usage_in(self._tail)
            self._end(head.status)
        elif owner.streams and head.status == _OK and is_event_stream(head, b""):
            self.on_error("its stream was empty")
        else:
            self._end_whole(head)

    def _end(self, status: int) -> None:
        """Report the end of the answer; ``status``: how it ended unless it held an error."""
        trouble, owner = self._trouble, self._owner
        owner.exchange.finish()
        if trouble is None and status < _CLIENT_ERROR:
            owner.report(on.Finished(owner.number))
            return
        of_client = status < _SERVER_ERROR if trouble is None else trouble.of_client
        finish = FinishStatus.CLIENT_ERROR if of_client else FinishStatus.FAILED
        owner.report(on.Finished(owner.number, finish))

    def on_error(self, reason: str) -> None:
        owner, head = self._owner, self._head
        if self.cancelled:
            return
        if owner.committed:
            owner.broken_later(Cause.LOST, reason)
            return
        owner.report(
            on.Lost(
                number=owner.number,
                reason=reason,
                status=head.status if head is not None else 0,
                connected=self._connection is not None,
            )
        )
