"""One try of one request at one replica: reads the answer and decides what it means for the relay.

Until the first event has gone to the client, or a whole answer, the replica may be found to have
failed, and the relay tries another. Streams are passed on event by event (``passing``); answers
that come whole are held until they are, and pass as they are.
"""

from time import monotonic
from typing import TYPE_CHECKING

from oserve.control.dispatch.breaker import concerns_us, refuses, retry_after_s, worth_elsewhere
from oserve.control.dispatch.table import TableReplica
from oserve.gateway.http.headers import tells_events, told_headers
from oserve.gateway.stream.answer import Trouble, read_answer, trouble_of, usage_in, usage_of
from oserve.gateway.stream.pass_through import Passing
from oserve.gateway.upstream_request import asks_plainly
from oserve.wire import Dechunker, Framing, ResponseHead
from oserve.wire.events import EventsError
from oserve.wire.framing import LAST_CHUNK, FramingError
from oserve.wire.upstream import UpstreamConnection

if TYPE_CHECKING:
    from oserve.gateway.relay import Relay

_HOLD_BYTES = 1024 * 1024
_TAIL_BYTES = 4096
# It is looked through again with each piece that comes.
_BLANK_BYTES = 16 * 1024
_OK, _CLIENT_ERROR, _SERVER_ERROR = 200, 400, 500
_OPTION = b"stream_options"


class Attempt:
    """A sink of the replica's answer; the relay drops it when it lets go of the replica."""

    def __init__(self, relay: "Relay", replica: TableReplica) -> None:
        self._relay = relay
        self._replica = replica
        self._connection: UpstreamConnection | None = None
        self._head: ResponseHead | None = None
        self._chunked = False
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail = b""
        self._dechunker: Dechunker | None = None
        self._trouble: Trouble | None = None
        self.passing: Passing | None = None

    # -- the replica (Sink) ---------------------------------------------------------------------
    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this any more."""
        return self._relay.cancelled or self._relay.attempt is not self

    def attached(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self._relay.attached(connection)

    def crashed(self, error: Exception) -> None:
        """Taking the answer in raised."""
        self._relay.crashed(error)

    @property
    def _framing(self) -> Framing | None:
        return self._connection.framing if self._connection is not None else None

    def on_head(self, head: ResponseHead) -> None:
        self._head = head
        self._chunked = head.chunked
        if head.chunked and self._relay.exchange.http_1_0:
            self._dechunker = Dechunker()

    def on_data(self, data: bytes) -> None:
        passing = self.passing
        if passing is not None:
            self._take(passing, data)
            return
        relay, head = self._relay, self._head
        assert head is not None
        if relay.committed:
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
            relay.exchange.write(self._framed(data))
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if relay.stream and head.status == _OK:
            kind = tells_events(head, b"".join(self._held))
            if kind:
                self._begin_events()
            elif kind is None and self._held_bytes > _BLANK_BYTES:
                self._break_off("it sends nothing but white space")
            if kind is not False:
                return
        if head.status < _CLIENT_ERROR:
            relay.answers(monotonic())
        if self._held_bytes > _HOLD_BYTES:
            self._commit()

    # -- a stream of events ---------------------------------------------------------------------
    def _begin_events(self) -> None:
        relay, moving = self._relay, self._relay.moving
        self.passing = Passing(
            hide_usage=relay.hide_usage,
            kept=moving.kept if moving is not None else None,
            shows_ids=moving is None or moving.shows_ids,
            plain=relay.exchange.http_1_0,
        )
        held, self._held = b"".join(self._held), []
        self._held_bytes = 0
        self._take(self.passing, held)

    def _break_off(self, reason: str) -> None:
        """Read no more of an answer that makes no sense."""
        if self._connection is not None:
            self._connection.abort()
        self.on_error(reason)

    def _take(self, passing: Passing, data: bytes) -> None:
        relay = self._relay
        try:
            told = passing.take(data, chunked=self._chunked)
        except (EventsError, FramingError) as error:
            self._break_off(str(error))
            return
        if relay.committed:
            relay.passed_on(passing.events)
            if told:
                relay.exchange.write(told)
            if passing.trouble is not None:
                self._troubled(passing, passing.trouble)
            return
        if told:
            self._held.append(told)
            self._held_bytes += len(told)
        # Comments keep a connection alive; they are no answer.
        if not passing.begun:
            if self._held_bytes > _HOLD_BYTES:
                self._break_off("it sends nothing but comments")
        elif not (passing.trouble is not None and self._refused(passing.trouble)):
            self._begin_answer(passing)

    def _begin_answer(self, passing: Passing) -> None:
        self._relay.answers(monotonic())
        if passing.trouble is None:
            self._relay.dispatcher.served_by(self._replica)
        self._commit()
        if passing.trouble is not None:
            self._troubled(passing, passing.trouble)

    def _troubled(self, passing: Passing, trouble: Trouble) -> None:
        """A stream that the client has part of tells an error: it goes on elsewhere, or ends so."""
        relay = self._relay
        reason = "aborted" if trouble.aborted else "failed"
        if not trouble.of_client and relay.moving is not None and relay.moving.resume(reason):
            return
        self._trouble = trouble
        told = passing.give_in()
        if told:
            relay.exchange.write(told)

    def _end_events(self, passing: Passing) -> None:
        relay = self._relay
        told = passing.end()
        if told:
            (relay.exchange.write if relay.committed else self._held.append)(told)
        trouble = passing.trouble
        if trouble is not None:
            if not relay.committed:
                if self._refused(trouble):
                    return
                self._begin_answer(passing)
            else:
                self._troubled(passing, trouble)
            if self._trouble is None:
                return
        elif not relay.committed:
            if not passing.begun:
                self.on_error("its stream was empty")
                return
            self._begin_answer(passing)
        if self._framing is None and not (passing.done or passing.finished or self._trouble):
            # Only the end of the connection says that the answer is over.
            self.on_error("it stopped short")
            return
        relay.usage = usage_of(passing.usage)
        if not relay.exchange.http_1_0:
            relay.exchange.write(LAST_CHUNK)
        self._end(_OK)

    # -- an answer that comes whole -------------------------------------------------------------
    def _framed(self, data: bytes) -> bytes:
        return data if self._dechunker is None else self._dechunker.feed(data)

    def _whole(self, head: ResponseHead) -> bool:
        """Look at an answer that came whole; tells whether it is for the client."""
        relay = self._relay
        body = b"".join(self._held)
        if head.chunked:
            body = Dechunker().feed(body)
        trouble = None
        if head.status >= _CLIENT_ERROR:
            if self._refuses_stream_options(head.status, body):
                return False
            trouble = Trouble(status=head.status, message="")
        elif relay.request is not None:
            answer = read_answer(body)
            if answer is None and self._framing is None:
                # Only the end of the connection says that it is whole.
                self.on_error("it stopped short")
                return False
            if answer is not None:
                relay.usage = usage_of(answer.usage)
                trouble = trouble_of(answer)
        self._trouble = trouble
        if trouble is None:
            relay.dispatcher.served_by(self._replica)
            return True
        if self._refused(trouble, retry_after_s(dict(head.headers).get(b"retry-after", b""))):
            return False
        if relay.request is not None and self._replica.attached and concerns_us(head.status):
            relay.failed(f"it refuses OServe's request with status {head.status}")
            return False
        return True

    def _refuses_stream_options(self, status: int, body: bytes) -> bool:
        """Whether a server refused the option by which usage is asked for, and is asked again."""
        relay, replica = self._relay, self._replica
        if not (replica.attached and relay.stream and status in {400, 422} and _OPTION in body):
            return False
        if relay.parsed is None or not asks_plainly(relay.parsed):
            return False
        if not relay.dispatcher.learn_no_stream_options(replica):
            return False
        relay.ask_again()
        return True

    # -- outcomes -------------------------------------------------------------------------------
    def _refused(self, trouble: Trouble, asked_s: float = 0.0) -> bool:
        """Whether the replica failed rather than answered, and another try was arranged."""
        relay, replica = self._relay, self._replica
        elsewhere = worth_elsewhere(trouble.status, attached=replica.attached)
        if not elsewhere:
            relay.dispatcher.served_by(replica)
            return False
        reason = f"it answered with status {trouble.status}"
        if trouble.aborted:
            reason = trouble.message
        elif relay.request is not None:
            relay.dispatcher.failed_at(
                replica, reason, at_once=refuses(trouble.status), retry_after_s=asked_s
            )
        return relay.retry(reason, died=False)

    def _refuses_for_good(self, status: int) -> bool:
        client = _CLIENT_ERROR <= status < _SERVER_ERROR
        return client and not worth_elsewhere(status, attached=self._replica.attached)

    def _commit(self) -> None:
        """Send the head and what was held; from here on there is no other try."""
        relay, head = self._relay, self._head
        assert head is not None
        events = self.passing is not None
        fields, close = told_headers(head, plain=relay.exchange.http_1_0, events=events)
        held, self._held = b"".join(self._held), []
        if not events:
            self._tail = held[-_TAIL_BYTES:]
            held = self._framed(held)
        relay.commit(head.status, fields, held, close=close, events=events)

    def on_end(self) -> None:
        head = self._head
        assert head is not None
        if self.passing is not None:
            self._end_events(self.passing)
            return
        relay = self._relay
        if relay.committed:
            relay.usage = usage_in(self._tail)
        elif relay.stream and head.status == _OK and tells_events(head, b""):
            self.on_error("its stream was empty")
            return
        elif self._whole(head):
            self._commit()
        else:
            return
        self._end(head.status)

    def _end(self, status: int) -> None:
        """The answer is over; ``status`` is what it amounts to where it told no trouble."""
        trouble = self._trouble
        self._relay.exchange.finish()
        if trouble is None and status < _CLIENT_ERROR:
            self._relay.completed()
        else:
            of_client = status < _SERVER_ERROR if trouble is None else trouble.of_client
            self._relay.refused(of_client=of_client)

    def on_error(self, reason: str) -> None:
        relay = self._relay
        if relay.ended or relay.attempt is not self:
            return
        head = self._head
        if not relay.committed and head is not None and self._refuses_for_good(head.status):
            # It was answered, and would be again; only the words are lost.
            relay.refused_unheard(head.status)
            return
        relay.dispatcher.failed_at(self._replica, reason, at_once=self._connection is None)
        if not relay.committed and relay.retry(reason, died=True):
            return
        if relay.committed and relay.moving is not None:
            # A dead replica breaks many streams at once; each is read in its turn.
            relay.dispatcher.in_turn(lambda: relay.safely(relay.go_on_or_fail, reason))
            return
        relay.failed(reason)
