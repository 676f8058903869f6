"""One client connection: parses whole requests and hands each over as an exchange.

Where two readers of the same bytes could disagree on where a request ends or whom it is for, it is
refused and the connection closed. Nothing that a handler raises passes its own request.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

from oserve.core.faults import fault
from oserve.wire.exchange import Exchange
from oserve.wire.head import fault_of_head, origin_form

_log = logging.getLogger("oserve.wire")

_MAX_HEADER_BYTES = 32 * 1024
_TOO_LARGE = "request headers are larger than 32 KiB"
_HIGH_WATER_BYTES = 256 * 1024
# Requests that wait for the answers to those before them, past which no more are read.
_MAX_PENDING = 4
# After refusing a request we read on for a while, so that the client sees the answer, not a reset.
_LINGER_S = 5.0
_LINGER_BYTES = 256 * 1024 * 1024
# Fields of which a second one could be read by somebody else instead of the first.
_SINGLE = {b"host", b"authorization", b"content-type"}
_UPGRADE = {b"upgrade", b"http2-settings"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on one client connection. ``stall_s``: how long a full send buffer may not shrink."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_connections: int = 10_000
    read_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    stall_s: float = 60.0


Handler = Callable[[Exchange], None]
Refusal = Callable[[Exchange, int, str], None]


class Connections:
    """What the connections of one server share."""

    def __init__(self, handler: Handler, refuse: Refusal, limits: ServerLimits) -> None:
        self.handler = handler
        self.refuse = refuse
        self.limits = limits
        self.open: set[ServerConnection] = set()


class _RefusedError(Exception):
    """Ends the parser's work on a request that was refused."""


class ServerConnection(asyncio.Protocol):
    """One client connection; requests on it are answered one after the other."""

    def __init__(self, server: Connections) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        # The request that is being read, the one that is being answered, those in between.
        self._reading: Exchange | None = None
        self._current: Exchange | None = None
        self._pending: deque[Exchange] = deque()
        self._refusal: tuple[int, str] | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: bytes | bytearray = b""
        # Bytes since the last that belonged to a body.
        self._header_bytes = self._field_bytes = 0
        self._in_head = True
        self._upgrading = False
        self._continue_due = False
        self._url = b""
        # Bytes thrown away since no more requests are taken; -1: they are.
        self._lingered_bytes = -1
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._reading_paused = False

    # -- transport ------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape only
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._server.open.add(self)
        self._arm(self._limits.read_timeout_s)
        if len(self._server.open) > self._limits.max_connections:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self)
        self._disarm()
        self._disarm_stall()
        self._transport = None
        self._pending.clear()
        current, self._current = self._current, None
        if current is not None and not current.done:
            current.done = True
            if current.on_disconnect is not None:
                self._tell(current.on_disconnect)

    def pause_writing(self) -> None:
        self._stall = self._loop.call_later(self._limits.stall_s, self.abort)
        if self._current is not None and self._current.on_pause is not None:
            self._tell(self._current.on_pause, True)

    def resume_writing(self) -> None:
        self._disarm_stall()
        if self._current is not None and self._current.on_pause is not None:
            self._tell(self._current.on_pause, False)
        self._loop.call_soon(self._next)

    def _tell(self, callback: Callable[..., None], *arguments: bool) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            _log.error("a client connection could not be followed: %s", fault(error))
            self.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._received(data)
        except Exception as error:
            _log.error("a client connection broke off: %s", fault(error))
            self.abort()

    def _received(self, data: bytes) -> None:
        if self._lingered_bytes >= 0:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > _LINGER_BYTES:
                self.abort()
            return
        self._header_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, _RefusedError):
                raise
        except httptools.HttpParserError as error:
            self._refuse(400, f"malformed HTTP request: {error}")
        else:
            if self._header_bytes > _MAX_HEADER_BYTES:
                self._refuse(431, _TOO_LARGE)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # Ignoring an upgrade is allowed (RFC 9110, 7.8), but the parser stops at the head,
                # taking the body for the other protocol's: so it reads a head without the wish.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        request = self._reading
        assert request is not None
        version = b"1.0" if request.http_1_0 else b"1.1"
        lines = [b"%b %b HTTP/%b\r\n" % (request.method, self._url, version)]
        lines += [b"%b: %b\r\n" % item for item in self._fields if item[0] not in _UPGRADE]
        return b"".join((*lines, b"\r\n"))

    # -- httptools callbacks --------------------------------------------------------------------
    def on_message_begin(self) -> None:
        if self._lingered_bytes >= 0:
            raise _RefusedError
        self._reading = Exchange(self)
        self._url = b""
        self._fields = []
        self._body = b""
        self._in_head = True
        self._field_bytes = 0
        self._upgrading = self._continue_due = False
        if self._current is None:
            self._arm(self._limits.read_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._field_bytes += len(url)
        if self._field_bytes > _MAX_HEADER_BYTES:
            self._refuse_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > _MAX_HEADER_BYTES:
            self._refuse_head()
        # What follows a chunked body has no say in what it is.
        if self._in_head:
            self._fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        request = self._reading
        assert request is not None
        self._in_head = False
        self._header_bytes = self._field_bytes = 0
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        version = self._parser.get_http_version()
        request.http_1_0 = version == "1.0"
        for name, value in self._fields:
            if name in _SINGLE and name in request.headers:
                self._refuse_now(400, f"more than one {name.decode('latin-1')} field")
            request.headers.setdefault(name, value)
        request.path = origin_form(self._url, request.method)
        wrong = fault_of_head(request.method, request.path, version, request.headers)
        if wrong is not None:
            self._refuse_now(*wrong)
        if self._parser.should_upgrade():
            self._upgrading = True
            return
        length = request.headers.get(b"content-length", b"0")
        if int(length) > self._limits.max_body_bytes:
            self._refuse_body()
        has_body = length != b"0" or b"transfer-encoding" in request.headers
        expects = request.headers.get(b"expect", b"").lower() == b"100-continue"
        if expects and has_body and not request.http_1_0:
            self._continue_due = True
            self._continue()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        self._continue_due = False
        if len(self._body) + len(body) > self._limits.max_body_bytes:
            self._refuse_body()
        if not self._body:
            self._body = body
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += body

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        request, self._reading = self._reading, None
        assert request is not None
        self._in_head = True
        self._header_bytes = 0
        request.body, self._body = bytes(self._body), b""
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
        self._disarm()
        self._current = request
        try:
            self._server.handler(request)
        except Exception as error:
            _log.error("a request could not be handled: %s", fault(error))
            if request.started:
                request.abort()
            else:
                self._answer(request, 500, "the request could not be handled")

    def _answer(self, exchange: Exchange, status: int, message: str) -> None:
        try:
            self._server.refuse(exchange, status, message)
        except Exception as error:
            _log.error("a request could not be refused: %s", fault(error))
            self.abort()

    def send(self, data: bytes) -> None:
        """Bytes of the answer that is being given."""
        if self._transport is not None:
            self._transport.write(data)

    def _continue(self) -> None:
        """Ask for the body of a request that waits to be asked, once all before it is answered."""
        if self._continue_due and self._current is None and not self._pending:
            self._continue_due = False
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def finished(self, *, close: bool) -> None:
        """The answer is complete."""
        self._current = None
        if self._transport is None:
            return
        if close:
            self._end()
        elif self._pending or self._refusal is not None:
            self._loop.call_soon(self._next)
        else:
            self._continue()
            self._arm(self._limits.idle_timeout_s)

    def _end(self) -> None:
        """Close, but not before a client that still sends can have read the answer."""
        assert self._transport is not None
        self._pending.clear()
        self._refusal = None
        if (self._refused or self._lingered_bytes > 0) and self._transport.can_write_eof():
            self._transport.write_eof()
            self._resume_reading()
            self._arm(_LINGER_S)
            return
        # What is still in the send buffer gets as long as any stalled reader.
        self._arm(self._limits.stall_s)
        self._transport.close()

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

    def _refuse_body(self) -> None:
        limit = self._limits.max_body_bytes
        self._refuse_now(413, f"request body is larger than the limit of {limit} bytes")

    def _refuse_head(self) -> None:
        self._refuse_now(431, _TOO_LARGE)

    def _refuse_now(self, status: int, message: str) -> None:
        """From a callback of the parser, which goes no further."""
        self._refuse(status, message)
        raise _RefusedError

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read, after what came before it; no more requests are taken."""
        if self._lingered_bytes >= 0 or self._transport is None:
            return
        self._lingered_bytes = 0
        self._refused = True
        self._reading, self._body = None, b""
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
    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, self._timed_out)

    def _timed_out(self) -> None:
        if self._reading is not None and self._current is None and self._lingered_bytes < 0:
            self._refuse(408, "the request did not arrive in time")
        else:
            self.abort()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _disarm_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
