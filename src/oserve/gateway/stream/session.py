"""One request between its client and a replica: what comes in is reported, what is asked is done.

It decides nothing: the request machine does (``control.dispatch``).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.events import Cause, Event
from oserve.control.dispatch.table import TableReplica
from oserve.core import Request
from oserve.gateway.estimator import RequestEstimate
from oserve.gateway.http.body import GenerateBody, parse_body
from oserve.gateway.http.errors import ApiError, send_error
from oserve.gateway.http.headers import Headers, own_headers
from oserve.gateway.stream.answer import TokenUsage
from oserve.gateway.stream.continuation import Continuation
from oserve.gateway.stream.continuation_reader import ContinuationReader
from oserve.gateway.stream.migration import StreamMigration, Unmovable
from oserve.gateway.stream.reader import AnswerReader
from oserve.gateway.stream.replay_buffer import ReplayBudget
from oserve.gateway.upstream_request import Outgoing, asks_plainly
from oserve.gateway.yield_queue import YieldQueue
from oserve.wire import Exchange, chunk
from oserve.wire.events import data_event
from oserve.wire.framing import LAST_CHUNK
from oserve.wire.upstream import Sink, UpstreamConnection
from oserve.workload import PromptSize

_log = logging.getLogger("oserve.gateway")

_UNLIMITED_TOKENS = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContext:
    """What all sessions of a gateway process share.

    ``report`` tells the request machine of an event; its commands are carried out before it
    returns. ``crashed`` is told what a step of a request raised. ``later``: work that is long, a
    piece a turn. ``budget``: for streams that may move; ``None``: none may. ``observe``: seconds
    between two pieces of a stream. ``drop_options``: a replica refused ``stream_options``; whether
    that is news. ``plan_id`` of the plan in force.
    """

    report: Callable[[Event], None]
    crashed: Callable[[int, Exception], None]
    later: YieldQueue
    budget: ReplayBudget | None
    observe: Callable[[float], None]
    drop_options: Callable[[TableReplica], bool]
    plan_id: Callable[[], str]


class Session:
    """One request. ``request`` is ``None`` for auxiliary calls, which are not typed or recorded.

    ``hides_usage``: the usage report is asked for by OServe, so the client does not get to see it.
    ``first_byte_s`` and ``last_chunk_s``: on the monotonic clock, 0 before there were any.
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
        "committed",
        "ended",
        "estimate",
        "exchange",
        "first_byte_s",
        "generates",
        "hides_usage",
        "last_chunk_s",
        "left",
        "migration",
        "number",
        "parsed",
        "prompt_size",
        "refused",
        "replica",
        "report",
        "request",
        "request_id",
        "streams",
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
        self.generates = request is not None
        self.streams = self.generates and parsed.stream
        self.hides_usage = self.streams and not parsed.wants_usage
        self.arrival_s = monotonic() if request is None else request.arrival_s
        self.replica: TableReplica | None = None
        self.migration: StreamMigration | None = None
        self.usage = TokenUsage()
        self.committed = False
        self.ended = False
        # Whether an error of OServe's own was its answer.
        self.refused = False
        # The replica that it had to leave, and why, until it has another.
        self.left: tuple[str, str] | None = None
        self.first_byte_s = 0.0
        self.last_chunk_s = 0.0
        self._events = False
        self._paused = False
        self._credit_tokens = _UNLIMITED_TOKENS
        self._connection: UpstreamConnection | None = None
        self._reader: AnswerReader | ContinuationReader | None = None
        self._first_reader: AnswerReader | None = None
        self._ended_tokens = 0
        exchange.on_disconnect = self._disconnected
        exchange.on_pause = self._pause

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
        """Send the head and the first bytes of the body; ``events``: it is a stream of events."""
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
        )

    def fail(self, error: ApiError) -> None:
        """Answer with an error, in whatever form is still possible."""
        self.refused = True
        exchange = self.exchange
        if not self.committed:
            send_error(exchange, error, self._own_headers())
        elif self._events:
            # Whole events are passed on only, so that one can be added at any moment.
            event = data_event(error.body())
            exchange.write(event if exchange.http_1_0 else chunk(event) + LAST_CHUNK)
            # A client that keeps connections would have its next request broken off.
            exchange.finish(close=exchange.http_1_0)
        else:
            exchange.abort()

    def end(self) -> None:
        """The request has ended."""
        self._ended_tokens = self.made_tokens
        self.ended = True
        # Readers refer to the session; the cycle would wait for a garbage collection.
        self._reader = self._first_reader = None
        if self.migration is not None:
            self.migration.release()

    # -- to a replica ---------------------------------------------------------------------------
    def send(self, command: do.Send) -> tuple[Outgoing, Sink]:
        """Get ready for a replica: what it is sent, and who reads its answer."""
        replica = command.replica
        self.replica = replica
        migration = self.migration
        if command.resumes and migration is not None and migration.continuation is not None:
            migration.sent_to(replica)
            self._reader = ContinuationReader(self, migration.continuation)
            body = migration.continuation.continuation()
            return self._outgoing(b"/v1/completions", body, parse_body(body)), self._reader
        self._keep(replica)
        self.first_byte_s = 0.0
        self._reader = self._first_reader = AnswerReader(self, replica)
        path = self.exchange.path.partition(b"?")[0]
        return self._outgoing(path, self.exchange.body, self.parsed), self._reader

    def _outgoing(self, path: bytes, body: bytes, parsed: GenerateBody) -> Outgoing:
        migration = self.migration
        return Outgoing(
            method=self.exchange.method,
            path=path,
            headers=self.exchange.headers,
            request_id=self.request_id,
            body=body,
            parsed=parsed,
            token_ids=migration is not None,
            cache=migration.cache_fields if migration is not None else None,
        )

    def _keep(self, replica: TableReplica) -> None:
        """Keep what is needed to go on elsewhere, where this replica tells it."""
        if self.migration is not None:
            self.migration.release()
        self.migration = None
        parsed, budget = self.parsed, self._context.budget
        if budget is None or not (replica.returns_token_ids and parsed.may_tell_ids):
            return
        self.migration = StreamMigration(
            parsed.fields,
            budget,
            chat=self.exchange.path.startswith(b"/v1/chat/"),
            shows_ids=parsed.return_token_ids,
        )
        self.migration.sent_to(replica)

    def let_go(self) -> None:
        """Drop the connection to the replica."""
        self._reader = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def resume(self, command: do.Resume) -> bool:
        """The stream leaves its replica; whether its KV cache goes along."""
        self.let_go()
        return self.migration is not None and self.migration.leave(with_cache=command.with_cache)

    def forward(self, command: do.Forward) -> None:
        """The client may have what came, and what follows up to so many tokens."""
        self._credit_tokens = command.credit_tokens
        if self._reader is not None:
            self._reader.forward()

    def show_error(self) -> None:
        """The client gets the error that its stream's replica tells."""
        if self._reader is not None:
            self._reader.show_error()

    def depart(self, command: do.Depart) -> None:
        """The stream is to go on elsewhere, if it can."""
        self._broken(Cause.HANDED_OVER, "", with_cache=command.with_cache)

    # -- from a replica (AnswerOwner) -----------------------------------------------------------
    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer."""
        return not self.ended

    def reads(self, sink: Sink) -> bool:
        """Whether this is the reader whose answer counts."""
        return self._reader is sink and not self.ended

    def attached(self, connection: UpstreamConnection) -> None:
        """A connection carries the answer."""
        self._connection = connection
        if self._paused:
            connection.pause(True)

    def crashed(self, error: Exception) -> None:
        """Reading raised: that ends this request and nothing else."""
        self._context.crashed(self.number, error)

    def first_byte(self) -> None:
        """The replica has begun to answer."""
        if not self.first_byte_s:
            self.first_byte_s = self.last_chunk_s = monotonic()

    def passed_on(self, events: int) -> None:
        """More of a stream came: so many events by now, about a token each."""
        now_s = monotonic()
        self._context.observe(now_s - self.last_chunk_s)
        self.last_chunk_s = now_s
        if events > self._credit_tokens:
            self.report(on.Progressed(self.number, events))

    def drops_options(self) -> bool:
        """The replica refused ``stream_options``; whether to ask again without them."""
        if self.replica is None or not asks_plainly(self.parsed):
            return False
        return self._context.drop_options(self.replica)

    def broken_later(self, cause: Cause, reason: str) -> None:
        """A replica that dies breaks many streams at once; each is read in its turn."""
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
        """A stream that the client has part of cannot stay where it is."""
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
        """All tokens of a continued stream have come."""
        if self.migration is not None and self.migration.continuation is not None:
            self._conclude(self.migration.continuation)

    def _conclude(self, continuation: Continuation) -> None:
        self.let_go()
        self.usage = TokenUsage(
            prompt_tokens=len(continuation.prompt), output_tokens=len(continuation.tokens)
        )
        exchange, ending = self.exchange, continuation.ending()
        if ending:
            exchange.write(ending if exchange.http_1_0 else chunk(ending))
        if not exchange.http_1_0:
            exchange.write(LAST_CHUNK)
        exchange.finish()
        self.report(on.Finished(self.number))

    # -- how far it has come --------------------------------------------------------------------
    @property
    def made_tokens(self) -> int:
        """Output tokens so far; of a stream that has not moved about so many."""
        if self.ended:
            return self._ended_tokens
        if self.migration is not None and self.migration.continuation is not None:
            return len(self.migration.continuation.tokens)
        return self._first_reader.events if self._first_reader is not None else 0

    def progress(self) -> on.Progress:
        """How far it has come, for a replica that is vacated."""
        made = self.made_tokens if self.committed else 0
        spent_s = self.last_chunk_s - self.first_byte_s
        return on.Progress(
            made_tokens=made,
            movable=self.migration is not None and self.migration.movable,
            tpot_s=spent_s / (made - 1) if made > 1 else 0.0,
        )
