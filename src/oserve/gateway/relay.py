"""One request on its way: from the client to a replica and back.

Until the answer begins, a failed replica means another try on another one (``attempt`` reads what
it says); after that, a stream goes on at another one where it can (``moving``), else the client is
told by an SSE error object and the connection closes without ``[DONE]``.
"""

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from oserve.control.dispatch.ledger import WorkEntry
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus, Request
from oserve.core.faults import fault
from oserve.gateway.attempt import Attempt
from oserve.gateway.estimator import Expected
from oserve.gateway.http.body import GenerateBody, parse_body
from oserve.gateway.http.errors import (
    ApiError,
    internal,
    send_error,
    shown,
    timed_out,
    upstream_failed,
    with_status,
)
from oserve.gateway.http.headers import Headers, own_headers
from oserve.gateway.moving import Moving
from oserve.gateway.stream.answer import Usage
from oserve.wire import Exchange, chunk
from oserve.wire.events import data_event
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.upstream import UpstreamConnection
from oserve.workload import PromptSize

if TYPE_CHECKING:
    from oserve.gateway.dispatch import Dispatcher


_log = logging.getLogger("oserve.gateway")


class Relay:
    """A request and its answer in progress.

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
        self.attempt: Attempt | None = None
        self._events = False
        self.committed = False
        self.usage = Usage()
        self._paused = False
        self._answering = False
        self._first_byte_s = 0.0
        self.last_chunk_s = 0.0
        self.first_request = request
        self.moving: Moving | None = None
        # Events carry about a token each; past this many the answer is longer than was booked.
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
    def sink(self) -> Attempt | Moving:
        """Who takes the replica's answer."""
        if self.moves and self.moving is not None:
            return self.moving
        assert self.attempt is not None
        return self.attempt

    @property
    def events(self) -> int:
        """Events with text that the replica has sent, about a token each."""
        passing = self.attempt.passing if self.attempt is not None else None
        return passing.events if passing is not None else 0

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
        self._keep(replica)
        self.attempt = Attempt(self, replica)

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
        # Whole events are passed on only, so that one can be added at any moment.
        if self._events:
            event = data_event(error.body())
            self.exchange.write(event if self.exchange.http_1_0 else chunk(event) + LAST_CHUNK)
            # A client that keeps connections would have its next request broken off.
            self.exchange.finish(close=self.exchange.http_1_0)
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

    # -- the replica ----------------------------------------------------------------------------
    def attached(self, connection: UpstreamConnection) -> None:
        """A connection carries it."""
        self._connection = connection
        if self._paused:
            connection.pause(True)

    def answers(self, now_s: float) -> None:
        """The replica has begun to answer."""
        if not self._first_byte_s:
            self._first_byte_s = self.last_chunk_s = now_s
        if not self._answering and self._entry is not None:
            self._answering = True
            self._entry.first_byte(now_s)
            self.dispatcher.prompt_done()

    def commit(
        self, status: int, fields: Headers, body: bytes, *, close: bool, events: bool
    ) -> None:
        """Send the head and the first bytes of the body; ``events``: it is a stream of events."""
        self.committed = True
        self._events = events
        self.exchange.start(status, (*fields, *own_headers(self)), body, close=close)
        if self.moving is not None and not events:
            self.moving.release()
            self.moving = None

    def passed_on(self, events: int) -> None:
        """More of a stream has come: so many events by now."""
        now_s = monotonic()
        self._observe(now_s - self.last_chunk_s)
        self.last_chunk_s = now_s
        if events > self._booked_tokens:
            self._outgrown(events, now_s)

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

    def go_on_or_fail(self, reason: str) -> None:
        """A stream broke off: have it go on elsewhere, if it can."""
        if not self.ended and (self.moving is None or not self.moving.resume("lost")):
            self.failed(reason)

    def failed(self, reason: str) -> None:
        """The replica failed, and nobody can take its place."""
        name = self.replica.id if self.replica is not None else "?"
        self.fail(upstream_failed(f"Replica {name} failed: {reason}"))

    def refused_unheard(self, status: int) -> None:
        """The replica refused the request, but its words were lost."""
        self.dispatcher.metrics.count("oserve_request_errors", "engine_refused")
        error = with_status(status, "The replica refused the request, and its reasons were lost")
        try:
            send_error(self.exchange, error, own_headers(self))
        finally:
            self._end(FinishStatus.CLIENT_ERROR)

    def retry(self, reason: str, *, died: bool) -> bool:
        """Give the request to another replica if one may take it; tells whether it did."""
        if self.ended or not self.dispatcher.may_retry(self, died=died):
            return False
        self.release(tried=True)
        self._first_byte_s = 0.0
        assert self.replica is not None
        self.dispatcher.metrics.count("oserve_requests_retried", self.replica.id)
        self.dispatcher.send_on(self, reason)
        return True

    def ask_again(self) -> None:
        """Send it once more, as it is said better now; that is no failed attempt."""
        self.release(tried=False)
        self.attempts -= 1
        self.dispatcher.dispatch(self)

    # -- going on elsewhere ---------------------------------------------------------------------
    @property
    def placed(self) -> bool:
        """Whether a replica has it now, and can be told to let go of it."""
        return self._entry is not None and self._connection is not None

    def hand_over(self, *, cache: bool = False, reason: str = "handed_over") -> bool:
        """Leave this replica for another, with its KV ``cache`` if so; tells whether it did."""
        if not self.committed:
            return self.retry("it hands over", died=True)
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
        self.answers(now_s)

    def completed(self) -> None:
        """The answer has ended well."""
        self._end(FinishStatus.COMPLETED)

    def refused(self, *, of_client: bool) -> None:
        """The answer was an error, which the client has; of its own making or not."""
        reason = "engine_refused" if of_client else "engine_failed"
        self.dispatcher.metrics.count("oserve_request_errors", reason)
        self._end(FinishStatus.CLIENT_ERROR if of_client else FinishStatus.FAILED)

    # -- the end --------------------------------------------------------------------------------
    def _close_entry(self, *, done: bool) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.close(monotonic(), done=done)
            assert self.replica is not None
            self.dispatcher.breakers.let_go(self.replica.id)

    def _end(self, status: FinishStatus) -> None:
        if self.ended:
            return
        self.ended = True
        if self.moving is not None:
            self.moving.release()
        self._close_entry(done=status is FinishStatus.COMPLETED)
        self.dispatcher.ended(self, status)

    @property
    def first_byte_s(self) -> float:
        """When the first byte came (monotonic seconds), 0 if none did."""
        return self._first_byte_s
