"""One client connection: hands over whole requests as exchanges, answers them in order.

Nothing that a handler raises affects another request.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from oserve.core.faults import fault
from oserve.wire.exchange import Exchange
from oserve.wire.known import KnownHeads
from oserve.wire.reader import RefusedError, RequestReader
from oserve.wire.timers import Timers

_log = logging.getLogger("oserve.wire")

_HIGH_WATER_BYTES = 256 * 1024
# Pipelined requests that wait for an answer; past this many the connection is read no further.
_MAX_PENDING = 4
# After a refusal the connection is read on for a while, so that the client sees the answer and not
# a reset.
_LINGER_S = 5.0
_LINGER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on client connections. ``stall_s``: how long a full send buffer may not shrink."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_connections: int = 10_000
    read_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    stall_s: float = 60.0


def _drop(_data: bytes) -> None:
    """What is written before a connection is made or after it is lost."""


Handler = Callable[[Exchange], None]
RefusalHandler = Callable[[Exchange, int, str], None]


class Connections:
    """What the connections of one server share."""

    def __init__(self, handler: Handler, refuse: RefusalHandler, limits: ServerLimits) -> None:
        self.handler = handler
        self.refuse = refuse
        self.limits = limits
        self.open: set[ServerConnection] = set()
        self.known = KnownHeads()
        self.timers: Timers[ServerConnection] = Timers(ServerConnection.timed_out)


class ServerConnection(asyncio.Protocol):
    """One client connection; requests on it are answered one after the other."""

    def __init__(self, server: Connections) -> None:
        self._server = server
        self._limits = server.limits
        self._timers = server.timers
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.send: Callable[[bytes], None] = _drop
        self._reader = RequestReader(self, server.known, server.limits.max_body_bytes)
        self._current: Exchange | None = None
        self._pending: deque[Exchange] = deque()
        self._refusal: tuple[int, str] | None = None
        # Bytes dropped since the connection takes no more requests; -1 while it takes them.
        self._lingered_bytes = -1
        self._refused = False
        self._stall: asyncio.TimerHandle | None = None
        self._reading_paused = False

    # -- transport ------------------------------------------------------------------------------
    @property
    def peer(self) -> str:
        """The client's address; empty for a Unix socket or a closed connection."""
        named = None if self._transport is None else self._transport.get_extra_info("peername")
        return str(named[0]) if isinstance(named, tuple) and named else ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape only
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self.send = self._transport.write
        self._server.open.add(self)
        self._timers.set(self, self._limits.read_timeout_s)
        if len(self._server.open) > self._limits.max_connections:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self)
        self._timers.cancel(self)
        self._disarm_stall()
        self._transport = None
        self.send = _drop
        self._pending.clear()
        current, self._current = self._current, None
        if current is not None and not current.done:
            current.done = True
            told, current.on_disconnect, current.on_pause = current.on_disconnect, None, None
            if told is not None:
                self._tell(told)

    def pause_writing(self) -> None:
        self._stall = self._loop.call_later(self._limits.stall_s, self.abort)
        if self._current is not None and self._current.on_pause is not None:
            self._tell(self._current.on_pause, True)

    def resume_writing(self) -> None:
        self._disarm_stall()
        if self._current is not None and self._current.on_pause is not None:
            self._tell(self._current.on_pause, False)
        self._loop.call_soon(self._next)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # whatever a handler's callback raises ends this connection
            _log.error("a client connection could not be followed: %s", fault(error))
            self.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._received(data)
        except Exception as error:  # a fault of ours ends this connection, not the event loop
            _log.error("a client connection broke off: %s", fault(error))
            self.abort()

    def _received(self, data: bytes) -> None:
        if self._lingered_bytes >= 0:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > _LINGER_BYTES:
                self.abort()
            return
        try:
            self._reader.feed(data)
        except RefusedError as refused:
            self._refuse(refused.status, refused.message)

    # -- the reader -----------------------------------------------------------------------------
    def request_begun(self) -> None:
        """The first byte of a request arrived."""
        if self._current is None:
            self._timers.set(self, self._limits.read_timeout_s)

    def continue_wanted(self) -> None:
        """The client waits to be asked for the body: ask once all before it is answered."""
        if self._reader.continue_due and self._current is None and not self._pending:
            self._reader.continue_due = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take(self, request: Exchange) -> None:
        """A request is whole: begin with it, or let it wait for those before it."""
        if not request.keep_alive:
            # Whatever follows is no request (RFC 9112, 9.6).
            self._lingered_bytes = 0
        if self._current is not None or self._pending or self._stall is not None:
            self._pending.append(request)
            if self._transport is not None and len(self._pending) >= _MAX_PENDING:
                self._reading_paused = True
                self._transport.pause_reading()
            return
        self._begin(request)

    # -- answering ------------------------------------------------------------------------------
    def _begin(self, request: Exchange) -> None:
        self._current = request
        try:
            self._server.handler(request)
        except Exception as error:  # whatever the handler raises ends its own request
            _log.error("a request could not be handled: %s", fault(error))
            if request.started:
                request.abort()
            else:
                self._answer(request, 500, "the request could not be handled")

    def _answer(self, exchange: Exchange, status: int, message: str) -> None:
        try:
            self._server.refuse(exchange, status, message)
        except Exception as error:  # the handler of refusals may be at fault as well
            _log.error("a request could not be refused: %s", fault(error))
            self.abort()

    def finished(self, *, close: bool) -> None:
        """The answer is complete."""
        self._current = None
        transport = self._transport
        if transport is None:
            return
        if close:
            self._end(transport)
        elif self._pending or self._refusal is not None:
            self._loop.call_soon(self._next)
        else:
            self.continue_wanted()
            self._timers.set(self, self._limits.idle_timeout_s)

    def _end(self, transport: asyncio.Transport) -> None:
        """Close, but not before a client that still sends can have read the answer."""
        self._pending.clear()
        self._refusal = None
        if (self._refused or self._lingered_bytes > 0) and transport.can_write_eof():
            transport.write_eof()
            self._resume_reading()
            self._timers.set(self, _LINGER_S)
            return
        # The send buffer may take as long to drain as that of any stalled client.
        self._timers.set(self, self._limits.stall_s)
        transport.close()

    def _next(self) -> None:
        """Begin with the next request, if the client takes the answers in."""
        if self._current is not None or self._transport is None or self._stall is not None:
            return
        if self._pending:
            request = self._pending.popleft()
            if len(self._pending) < _MAX_PENDING:
                self._resume_reading()
            self._begin(request)
        elif self._refusal is not None:
            self._give_refusal(*self._refusal)

    def _resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Break the connection off."""
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read, after what came before it; no more requests are taken."""
        if self._lingered_bytes >= 0 or self._transport is None:
            return
        self._lingered_bytes = 0
        self._refused = True
        self._reader.forget()
        if self._current is not None or self._pending:
            self._refusal = status, message
        else:
            self._give_refusal(status, message)

    def _give_refusal(self, status: int, message: str) -> None:
        self._refusal = None
        exchange = Exchange(self)
        exchange.keep_alive = False
        self._current = exchange
        self._answer(exchange, status, message)

    def shut(self) -> None:
        """Close when idle; used when the server ends."""
        if self._transport is not None and self._current is None:
            self._transport.close()

    # -- timeouts -------------------------------------------------------------------------------
    def timed_out(self) -> None:
        """The connection's deadline passed: for the request, the next one, or the last bytes.

        It is not cancelled while a request is answered, since it is set anew after that.
        """
        if self._current is not None:
            return
        if self._reader.reading and self._lingered_bytes < 0:
            self._tell(self._refuse, 408, "the request did not arrive in time")
        else:
            self.abort()

    def _disarm_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
