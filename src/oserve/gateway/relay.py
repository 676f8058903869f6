"""One request on its way: from the client to a replica and back, byte for byte.

Until the first byte of the answer has gone to the client, a failed replica means another try on
another one; after it, a stream goes on at another one where it can (``moving``), else the client is
told by an SSE error object and the connection closes without ``[DONE]``. Chunks are not parsed:
their framing is followed, and fixed patterns are looked for (the usage report, the final chunk that
only we asked for, token ids).
"""

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from oserve.control.ledger import WorkEntry
from oserve.control.table import TableReplica
from oserve.core import FinishStatus, Request
from oserve.core.faults import fault
from oserve.gateway.body import GenerateBody, parse_body
from oserve.gateway.errors import (
    ApiError,
    internal,
    send_error,
    shown,
    timed_out,
    upstream_failed,
    with_status,
)
from oserve.gateway.foresight import Expected
from oserve.gateway.heads import own_headers, told_headers
from oserve.gateway.moving import Moving
from oserve.gateway.passing import Passing
from oserve.wire import Exchange, Framing, ResponseHead, chunk
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.upstream import UpstreamConnection
from oserve.workload import PromptSize

if TYPE_CHECKING:
    from oserve.gateway.dispatch import Dispatcher

_log = logging.getLogger("oserve.gateway")

_STREAM_ERROR = b'data: {"error"'
_ABORTED = b'"finish_reason":"abort"'
_HOLD_BYTES = 1024 * 1024


class Relay:
    """A request and its answer in progress; the sink of whatever replica serves it.

    ``request`` is ``None`` for auxiliary calls (tokenize), which are neither typed nor recorded.
    ``hide_usage``: we asked for the usage chunk, so the client does not get to see it.
    """

    def __init__(
        self,
        dispatcher: "Dispatcher",
        exchange: Exchange,
        *,
        request: Request | None,
        request_id: bytes,
        expected: Expected | None = None,
        parsed: GenerateBody | None = None,
        rank: float = 0.0,
        stream: bool = False,
        hide_usage: bool = False,
        prompt_size: PromptSize | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.exchange = exchange
        self.request = request
        self.request_id = request_id
        self.expected = expected
        self.demoted = False
        self.parsed = parsed
        self.rank = rank
        self.stream = stream
        self.prompt_size = prompt_size
        self.hide_usage = hide_usage
        self.arrival_s = monotonic()
        self.attempts = 0
        self.tried: set[tuple[str, float]] = set()
        self.replica: TableReplica | None = None
        self.cancelled = False
        self.ended = False
        self._entry: WorkEntry | None = None
        self._connection: UpstreamConnection | None = None
        self._head: ResponseHead | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._passing = Passing(self)
        self.committed = False
        self.usage = b""
        self.chunks = 0
        self._paused = False
        self._answering = False
        self._first_byte_s = 0.0
        self.last_chunk_s = 0.0
        self.first_request = request
        self.moving: Moving | None = None
        # Chunks carry about a token each; past this many the answer is longer than was booked.
        self._booked_tokens = request.output_tokens if request is not None else 1 << 60
        self._observe = dispatcher.metrics.inter_token.observe
        exchange.on_disconnect = self._disconnected
        exchange.on_pause = self._pause

    # -- called by the dispatcher ----------------------------------------------------------------
    @property
    def method(self) -> bytes:
        return self.exchange.method

    @property
    def path(self) -> bytes:
        return b"/v1/completions" if self.moves else self.exchange.path.partition(b"?")[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return self.exchange.headers

    @property
    def body(self) -> tuple[bytes, GenerateBody | None]:
        """What to have a replica do now, and what is known of it."""
        if self.moves and self.moving is not None:
            body = self.moving.body()
            return body, parse_body(body)
        return self.exchange.body, self.parsed

    @property
    def sink(self) -> "Relay | Moving":
        """Who takes the replica's answer."""
        return self.moving if self.moves and self.moving is not None else self

    @property
    def cache_fields(self) -> dict[str, str]:
        """What the engine is told of this request's KV cache."""
        return self.moving.cache_fields if self.moving is not None else {}

    @property
    def moves(self) -> int:
        """How many times the stream went on at another replica."""
        return self.moving.moves if self.moving is not None else 0

    def sent_to(self, replica: TableReplica, entry: WorkEntry | None) -> None:
        """A replica was chosen; its answer will come to this sink."""
        self.attempts += 1
        self.replica = replica
        self._close_entry(done=False)
        self._entry = entry
        if self.request is not None:
            self._booked_tokens = self.request.output_tokens
        self._answering = False
        if self.moves and self.moving is not None:
            self.moving.sent_to(replica)
            return
        self._head = None
        self._held = []
        self._held_bytes = 0
        self._passing = Passing(self)
        self._keep(replica)

    def _keep(self, replica: TableReplica) -> None:
        """Keep what is needed to go on elsewhere, where this replica tells it."""
        if self.moving is not None:
            self.moving.release()
        self.moving = None
        parsed = self.parsed
        if parsed is not None and replica.tells_token_ids and parsed.may_tell_ids:
            self.moving = self.dispatcher.moving(self, shows_ids=parsed.return_token_ids)
        if self.moving is not None:
            self.moving.sent_to(replica)

    def fail(self, error: ApiError) -> None:
        """Answer with an error, in whatever form is still possible."""
        if self.ended:
            return
        self.cancelled = True
        self._drop_connection()
        status = FinishStatus.REJECTED if error.status in {429, 503} else FinishStatus.FAILED
        self.dispatcher.metrics.count("oserve_request_errors", error.code or "error")
        try:
            if not self.committed:
                send_error(self.exchange, error, own_headers(self))
            else:
                self._fail_stream(error)
        finally:
            self._end(status)

    def crashed(self, error: Exception) -> None:
        """A step of this request raised: it ends with an error, and nothing else does."""
        _log.error("request %s failed in the gateway: %s", shown(self.request_id), fault(error))
        try:
            self.fail(internal())
        except Exception as again:
            _log.error("request %s broke off: %s", shown(self.request_id), fault(again))
        if not self.exchange.done:
            self.exchange.abort()

    def safely(self, step: Callable[..., object], *arguments: object) -> None:
        """Take a step of this request that nobody waits for."""
        try:
            step(*arguments)
        except Exception as error:
            self.crashed(error)

    def deadline(self) -> None:
        """The request took longer than it may."""
        self.fail(timed_out("The request exceeded the server's time limit"))

    def _fail_stream(self, error: ApiError) -> None:
        framing = self.framing
        event = b"data: " + error.body() + b"\n\n"
        # Where whole chunks are passed on only, the client is always at a boundary.
        clean = (
            self.moving is not None
            or self.hide_usage
            or (framing is not None and framing.at_boundary)
        )
        if self.stream and clean:
            whole = event if self.exchange.http_1_0 else chunk(event) + LAST_CHUNK
            self.exchange.write(whole)
            # A client that keeps connections would have its next request broken off.
            head = self._head
            self.exchange.finish(close=head is None or not head.chunked)
        else:
            self.exchange.abort()

    # -- the client -----------------------------------------------------------------------------
    def _disconnected(self) -> None:
        self.cancelled = True
        self._drop_connection()
        self._end(FinishStatus.DISCONNECTED)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self._connection is not None:
            self._connection.pause(paused)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    # -- the replica (Sink) ---------------------------------------------------------------------
    def attached(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        if self._paused:
            connection.pause(True)

    @property
    def framing(self) -> Framing | None:
        """Of the replica's answer."""
        return self._connection.framing if self._connection is not None else None

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_data(self, data: bytes) -> None:
        now_s = monotonic()
        if self.committed:
            if self.stream:
                self._observe(now_s - self.last_chunk_s)
                self.last_chunk_s = now_s
                framing = self._connection.framing if self._connection is not None else None
                if framing is not None:
                    if framing.chunks > self._booked_tokens:
                        self._outgrown(framing.chunks, now_s)
                    if self.moving is not None:
                        self.moving.take(data, framing)
                        return
            self._pass_on(data)
            return
        head = self._head
        assert head is not None
        if not self._first_byte_s:
            if self._refused_by_replica(head, data):
                return
            self._first_byte_s = self.last_chunk_s = now_s
            self._answers(now_s)
        if not self.stream or head.status != 200:
            # Held back until whole: as long as no byte has gone out, another replica can take over.
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > _HOLD_BYTES:
                self._commit()
            return
        if self.moving is not None and self.moving.hold(data):
            return
        self._commit()
        self._pass_on(data)

    def _answers(self, now_s: float) -> None:
        if not self._answering and self._entry is not None:
            self._answering = True
            self._entry.first_byte(now_s)
            self.dispatcher.prompt_done()

    def _outgrown(self, made_tokens: int, now_s: float) -> None:
        """Book what is expected of an answer that is this long already."""
        expected = self.expected
        # Where the client has told the length, it is that.
        if expected is None or expected.output is None or self._entry is None:
            self._booked_tokens = 1 << 60
            return
        total = max(made_tokens + 1.0, expected.output.beyond(made_tokens))
        self._entry.outgrown(total - self._booked_tokens, now_s)
        self.dispatcher.metrics.count("oserve_requests_outgrown")
        self._booked_tokens = int(total)

    def _refused_by_replica(self, head: ResponseHead, data: bytes) -> bool:
        """Whether the replica failed rather than answered, and another try was arranged."""
        failed = head.status >= 500 or (
            head.status == 200
            and self.stream
            and (data.find(_STREAM_ERROR, 0, 64) >= 0 or _ABORTED in data)
        )
        return failed and self._retry(f"it answered with status {head.status}", died=False)

    def _commit(self) -> None:
        """Send the head and what was held; from here on there is no other try."""
        head = self._head
        assert head is not None
        self.committed = True
        fields, close = told_headers(head, plain=self.exchange.http_1_0)
        self.exchange.start(head.status, (*fields, *own_headers(self)), close=close)
        framing = self.framing
        if self.moving is not None and (
            head.status != 200 or not self.stream or framing is None or not framing.chunked
        ):
            self.moving.release()
            self.moving = None
        held, self._held = self._held, []
        for data in held:
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        framing = self.framing
        if self.moving is not None and framing is not None:
            self.moving.take(data, framing)
            return
        self._passing(data, framing)

    def on_end(self) -> None:
        head = self._head
        assert head is not None
        if not self.committed:
            if head.status >= 500 and self._retry(
                f"it answered with status {head.status}", died=False
            ):
                return
            aborted = head.status == 200 and not self.stream and _ABORTED in b"".join(self._held)
            if aborted and self._retry("it gave the request up", died=False):
                return
            self._commit()
        if self._connection is not None and self._connection.framing is not None:
            self.chunks = self._connection.framing.chunks
        self.exchange.finish()
        if head.status < 400:
            self._end(FinishStatus.COMPLETED)
        else:
            reason = "engine_refused" if head.status < 500 else "engine_failed"
            self.dispatcher.metrics.count("oserve_request_errors", reason)
            client = head.status < 500
            self._end(FinishStatus.CLIENT_ERROR if client else FinishStatus.FAILED)

    def on_error(self, reason: str) -> None:
        if self.ended:
            return
        head = self._head
        if not self.committed and head is not None and 400 <= head.status < 500:
            # It was answered, and would be again; only the words are lost.
            self._refused(head.status)
            return
        if not self.committed and self._retry(reason, died=True):
            return
        if self.committed and self.moving is not None:
            # A dead replica breaks many streams at once; each is read in its turn.
            self.dispatcher.in_turn(lambda: self.safely(self._go_on_or_fail, reason))
            return
        self._failed(reason)

    def _refused(self, status: int) -> None:
        self.dispatcher.metrics.count("oserve_request_errors", "engine_refused")
        error = with_status(status, "The replica refused the request, and its reasons were lost")
        try:
            send_error(self.exchange, error, own_headers(self))
        finally:
            self._end(FinishStatus.CLIENT_ERROR)

    def _go_on_or_fail(self, reason: str) -> None:
        if not self.ended and (self.moving is None or not self.moving.resume("lost")):
            self._failed(reason)

    def _failed(self, reason: str) -> None:
        name = self.replica.id if self.replica is not None else "?"
        self.fail(upstream_failed(f"Replica {name} failed: {reason}"))

    def _retry(self, reason: str, *, died: bool) -> bool:
        """Give the request to another replica if one may take it; tells whether it did."""
        if self.ended or not self.dispatcher.may_retry(self, died=died):
            return False
        self.release(tried=True)
        self._first_byte_s = 0.0
        assert self.replica is not None
        self.dispatcher.metrics.count("oserve_requests_retried", self.replica.id)
        self.dispatcher.send_on(self, reason)
        return True

    # -- going on elsewhere ---------------------------------------------------------------------
    @property
    def placed(self) -> bool:
        """Whether a replica has it now, and can be told to let go of it."""
        return self._entry is not None and self._connection is not None

    def hand_over(self, *, cache: bool = False, reason: str = "handed_over") -> bool:
        """Leave this replica for another, with its KV ``cache`` if so; tells whether it did."""
        if not self.committed:
            return self._retry("it hands over", died=True)
        return self.moving is not None and self.moving.resume(reason, cache=cache)

    def release(self, *, tried: bool, done: bool = False) -> None:
        """Let go of the replica; ``tried``: it is not asked again."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        self._close_entry(done=done)
        if tried and self.replica is not None:
            self.tried.add((self.replica.id, self.replica.started_s))

    def progressed(self, now_s: float) -> None:
        """Bytes of a continuation came."""
        self._observe(now_s - self.last_chunk_s)
        self.last_chunk_s = now_s
        self._answers(now_s)

    def completed(self) -> None:
        """A moved stream has ended well."""
        self._end(FinishStatus.COMPLETED)

    # -- the end --------------------------------------------------------------------------------
    def _close_entry(self, *, done: bool) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.close(monotonic(), done=done)

    def _end(self, status: FinishStatus) -> None:
        if self.ended:
            return
        self.ended = True
        if self._connection is not None and self._connection.framing is not None:
            self.chunks = max(self.chunks, self._connection.framing.chunks)
        if self.moving is not None:
            self.moving.release()
        self._close_entry(done=status is FinishStatus.COMPLETED)
        self.dispatcher.ended(self, status)

    @property
    def first_byte_s(self) -> float:
        """When the first byte came (monotonic seconds), 0 if none did."""
        return self._first_byte_s
