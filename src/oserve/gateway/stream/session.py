"""The request session: one request between its client and a replica.

It reports events and executes commands; the request machine (``control.dispatch``) decides.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.events import Cause, Event
from oserve.control.dispatch.state import UNLIMITED_TOKENS
from oserve.control.dispatch.table import TableReplica
from oserve.core import Request
from oserve.gateway.estimator import RequestEstimate
from oserve.gateway.http.api_form import COMPLETION
from oserve.gateway.http.body import GenerateBody, parse_body
from oserve.gateway.http.errors import ApiError, send_error
from oserve.gateway.http.headers import Headers, own_headers
from oserve.gateway.stream.answer import TokenUsage, events_with_service_tier
from oserve.gateway.stream.continuation import Continuation
from oserve.gateway.stream.continuation_reader import ContinuationReader
from oserve.gateway.stream.migration import StreamMigration, Unmovable
from oserve.gateway.stream.reader import AnswerReader
from oserve.gateway.stream.replay_buffer import ReplayBudget
from oserve.gateway.tiers import service_tier_of
from oserve.gateway.upstream_request import Outgoing, requests_only_usage
from oserve.gateway.yield_queue import YieldQueue
from oserve.wire import Exchange, chunk
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.upstream import Sink, UpstreamConnection
from oserve.workload import PromptSize

_log = logging.getLogger("oserve.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContext:
    """What all sessions of a gateway process share.

    ``report`` passes an event to the request machine and executes its commands before it returns.
    ``crashed`` gets exceptions raised in a request. ``later``: the yield queue. ``budget``: of the
    replay buffers; ``None``: streams cannot migrate. ``observe`` gets the seconds between two
    pieces of a stream. ``drop_options`` is told of a replica that refused ``stream_options``.
    ``plan_id``: of the plan in force.
    """

    report: Callable[[Event], None]
    crashed: Callable[[int, Exception], None]
    later: YieldQueue
    budget: ReplayBudget | None
    observe: Callable[[float], None]
    drop_options: Callable[[TableReplica], None]
    plan_id: Callable[[], str]


class Session:
    """One request. ``request`` is ``None`` for auxiliary calls, which are not typed or recorded.

    ``hides_usage``: only OServe requested the usage report, so the client does not get it.
    ``limit_headers``: about its tenant's limits. ``cache_salt``: vLLM's field of that name.
    ``asks_options``: its replica got ``stream_options``. ``refused``: OServe answered by an error.
    ``first_byte_s`` and ``last_chunk_s``: on the monotonic clock; 0: none yet.
    """

    __slots__ = (
        "_connection",
        "_context",
        "_credit_tokens",
        "_ended_tokens",
        "_events",
        "_first_reader",
        "_paused",
        "_reader",
        "arrival_s",
        "asks_options",
        "cache_salt",
        "committed",
        "ended",
        "estimate",
        "exchange",
        "first_byte_s",
        "generates",
        "hides_usage",
        "last_chunk_s",
        "left",
        "limit_headers",
        "migration",
        "number",
        "parsed",
        "prompt_size",
        "refused",
        "replica",
        "report",
        "request",
        "request_id",
        "service_tier",
        "streams",
        "tenant",
        "usage",
    )

    def __init__(
        self,
        context: SessionContext,
        exchange: Exchange,
        *,
        number: int,
        request_id: bytes,
        parsed: GenerateBody,
        request: Request | None = None,
        estimate: RequestEstimate | None = None,
        prompt_size: PromptSize | None = None,
    ) -> None:
        self._context = context
        self.report = context.report
        self.exchange = exchange
        self.number = number
        self.request_id = request_id
        self.parsed = parsed
        self.request = request
        self.estimate = estimate
        self.prompt_size = prompt_size
        self.service_tier = service_tier_of(request, parsed)
        self.tenant = ""
        self.limit_headers: Headers = ()
        self.cache_salt = ""
        self.generates = request is not None
        self.streams = self.generates and parsed.stream
        self.hides_usage = self.streams and parsed.lacks_usage
        self.arrival_s = monotonic() if request is None else request.arrival_s
        self.replica: TableReplica | None = None
        self.migration: StreamMigration | None = None
        self.usage = TokenUsage()
        self.asks_options = False
        self.committed = self.ended = self.refused = False
        # The replica it had to leave and why, until it has another.
        self.left: tuple[str, str] | None = None
        self.first_byte_s = self.last_chunk_s = 0.0
        self._events = self._paused = False
        self._ended_tokens = 0
        self._credit_tokens = UNLIMITED_TOKENS
        self._connection: UpstreamConnection | None = None
        self._reader: AnswerReader | ContinuationReader | None = None
        self._first_reader: AnswerReader | None = None
        exchange.on_disconnect, exchange.on_pause = self._disconnected, self._pause

    # -- the client -----------------------------------------------------------------------------
    def _disconnected(self) -> None:
        self.report(on.ClientGone(self.number))

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if self._connection is not None:
            self._connection.pause(paused)

    def commit(
        self, status: int, headers: Headers, body: bytes, *, close: bool, events: bool
    ) -> None:
        """Send the head and the first bytes of the body; ``events``: it is an event stream."""
        self.committed = True
        self._events = events
        self.exchange.start(status, (*headers, *self._own_headers()), body, close=close)
        if self.migration is not None and not events:
            self.migration.release()
            self.migration = None

    def _own_headers(self) -> Headers:
        return own_headers(
            self.request_id,
            replica=self.replica.id if self.replica is not None else "",
            workload_type=self.request.workload_type if self.request is not None else "",
            plan_id=self._context.plan_id(),
            limits=self.limit_headers,
        )

    def fail(self, error: ApiError) -> None:
        """End with an error response, or with an error event if the stream has begun."""
        self.refused = True
        exchange = self.exchange
        if not self.committed:
            send_error(exchange, error, self._own_headers())
        elif self._events:
            # The gateway forwards only whole events, so it can append one at any time.
            event = error.event_for(exchange.path)
            exchange.write(event if exchange.http_1_0 else chunk(event) + LAST_CHUNK)
            # A client that reuses the connection would lose its next request.
            exchange.finish(close=exchange.http_1_0)
        else:
            exchange.abort()

    def end(self) -> None:
        """End the request."""
        self._ended_tokens = self.made_tokens
        self.ended = True
        # Break the reference cycle between readers and session.
        self._reader = self._first_reader = None
        if self.migration is not None:
            self.migration.release()

    # -- to a replica ---------------------------------------------------------------------------
    def send(self, command: do.Send) -> tuple[Outgoing, Sink]:
        """Prepare the request for a replica, and the reader of its answer."""
        replica = command.replica
        self.replica = replica
        migration = self.migration
        if command.resumes and migration is not None and migration.continuation is not None:
            migration.use_replica(replica)
            self._reader = ContinuationReader(self, migration.continuation)
            body = migration.continuation.continuation()
            return self._outgoing(body, parse_body(body, COMPLETION)), self._reader
        self._keep(replica)
        self.first_byte_s = 0.0
        self._reader = self._first_reader = AnswerReader(self, replica)
        return self._outgoing(self.exchange.body, self.parsed), self._reader

    def _outgoing(self, body: bytes, parsed: GenerateBody) -> Outgoing:
        migration = self.migration
        return Outgoing(
            method=self.exchange.method,
            path=parsed.form.path,
            headers=self.exchange.headers,
            request_id=self.request_id,
            body=body,
            parsed=parsed,
            token_ids=migration is not None,
            cache_salt=self.cache_salt,
            cache=migration.cache_fields if migration is not None else None,
        )

    def _keep(self, replica: TableReplica) -> None:
        """Prepare for a later migration, if this replica reports token ids."""
        if self.migration is not None:
            self.migration.release()
        self.migration = None
        parsed, budget = self.parsed, self._context.budget
        if budget is None or not (replica.returns_token_ids and parsed.may_return_ids):
            return
        self.migration = StreamMigration(
            parsed.fields,
            budget,
            chat=parsed.form.is_chat,
            shows_ids=parsed.return_token_ids,
        )
        self.migration.use_replica(replica)

    def release(self) -> None:
        """Drop the connection to the replica."""
        self._reader = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def resume(self, command: do.Resume) -> bool:
        """Detach the stream from its replica; returns whether its KV cache migrates, too."""
        # The engine looks for the request to keep the cache when the stream is aborted.
        takes_cache = self.migration is not None and self.migration.leave(
            with_cache=command.with_cache
        )
        self.release()
        return takes_cache

    def forward(self, command: do.Forward) -> None:
        """Forward the held and the following output, up to so many tokens."""
        self._credit_tokens = command.credit_tokens
        if self._reader is not None:
            self._reader.forward()

    def show_error(self) -> None:
        """Forward the error in the replica's stream to the client."""
        if self._reader is not None:
            self._reader.show_error()

    def depart(self, command: do.Depart) -> None:
        """Report that the stream is to migrate, with its progress."""
        self._broken(Cause.HANDED_OVER, "", with_cache=command.with_cache)

    # -- from a replica (AnswerOwner) -----------------------------------------------------------
    @property
    def wanted(self) -> bool:
        """Whether the client still waits for the answer."""
        return not self.ended

    def reads(self, sink: Sink) -> bool:
        """Whether this reader belongs to the present replica."""
        return self._reader is sink and not self.ended

    def attached(self, connection: UpstreamConnection) -> None:
        """Set the connection that receives the answer."""
        self._connection = connection
        if self._paused:
            connection.pause(True)

    def crashed(self, error: Exception) -> None:
        """End this request after an exception while reading."""
        self._context.crashed(self.number, error)

    def first_byte(self) -> None:
        """Record that the replica has begun to answer."""
        if not self.first_byte_s:
            self.first_byte_s = self.last_chunk_s = monotonic()

    def progressed(self, events: int) -> None:
        """Record progress of a stream: its events so far, about one token each."""
        now_s = monotonic()
        self._context.observe(now_s - self.last_chunk_s)
        self.last_chunk_s = now_s
        if events > self._credit_tokens:
            self.report(on.Progressed(self.number, events))

    def retries_without_options(self) -> bool:
        """Handle a refusal of ``stream_options``; returns whether to retry without them."""
        if self.replica is None or not self.asks_options or not requests_only_usage(self.parsed):
            return False
        self._context.drop_options(self.replica)
        return True

    def broken_later(self, cause: Cause, reason: str) -> None:
        """As ``broken``, through the yield queue: a dead replica breaks many streams at once."""
        reader = self._reader
        if self.migration is None:
            self.broken(cause, reason)
            return

        def broken() -> None:
            if reader is not None and self.reads(reader):
                try:
                    self.broken(cause, reason)
                except Exception as error:  # an unforeseen fault ends this request alone
                    self.crashed(error)

        self._context.later(broken)

    def broken(self, cause: Cause, reason: str, *, can_end: bool = False) -> None:
        """Report that a stream must leave its replica."""
        self._broken(cause, reason, can_end=can_end)

    def _broken(
        self, cause: Cause, reason: str, *, can_end: bool = False, with_cache: bool = False
    ) -> None:
        rest = None
        if self.migration is not None:
            prepared = self.migration.prepare()
            if isinstance(prepared, Unmovable):
                name = self.replica.id if self.replica is not None else "?"
                _log.warning("request cannot leave replica %s: %s", name, prepared.reason)
            elif prepared.finished:
                self._conclude(prepared)
                return
            else:
                rest = on.Rest(prepared.context_tokens, len(prepared.tokens))
        self.report(
            on.Broken(
                number=self.number,
                cause=cause,
                rest=rest,
                reason=reason,
                with_cache=with_cache,
                can_end=can_end,
            )
        )

    def conclude(self) -> None:
        """Finish a continued stream after its last token."""
        if self.migration is not None and self.migration.continuation is not None:
            self._conclude(self.migration.continuation)

    def _conclude(self, continuation: Continuation) -> None:
        self.release()
        self.usage = TokenUsage(
            prompt_tokens=len(continuation.prompt), output_tokens=len(continuation.tokens)
        )
        exchange = self.exchange
        ending = events_with_service_tier(continuation.ending(), self.service_tier)
        if ending:
            exchange.write(ending if exchange.http_1_0 else chunk(ending))
        if not exchange.http_1_0:
            exchange.write(LAST_CHUNK)
        exchange.finish()
        self.report(on.Finished(self.number))

    # -- progress -------------------------------------------------------------------------------
    @property
    def made_tokens(self) -> int:
        """Output tokens so far; approximate before the first migration."""
        if self.ended:
            return self._ended_tokens
        if self.migration is not None and self.migration.continuation is not None:
            return len(self.migration.continuation.tokens)
        return self._first_reader.events if self._first_reader is not None else 0

    def progress(self) -> on.Progress:
        """The progress of the request, for a vacated replica."""
        made = self.made_tokens if self.committed else 0
        spent_s = self.last_chunk_s - self.first_byte_s
        movable = self.migration is not None and self.migration.movable
        return on.Progress(made, movable, spent_s / (made - 1) if made > 1 else 0.0)
