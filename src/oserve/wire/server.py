"""The server side: a connection parses whole requests and hands each over as an exchange."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

import httptools

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_MAX_HEADER_BYTES = 32 * 1024
_HIGH_WATER_BYTES = 256 * 1024
# After refusing a body we read on for a while, so that the client sees the answer, not a reset.
_LINGER_S = 5.0
_LINGER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on one client connection. ``stall_s``: how long a full send buffer may not shrink."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_connections: int = 10_000
    read_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    stall_s: float = 60.0


class Exchange:
    """One request and its answer.

    ``on_disconnect`` is called if the client goes before the answer is complete; ``on_pause`` with
    ``True`` when the client reads too slowly, with ``False`` when it has caught up.
    """

    __slots__ = (
        "_connection",
        "body",
        "done",
        "headers",
        "http_1_0",
        "keep_alive",
        "method",
        "on_disconnect",
        "on_pause",
        "path",
        "started",
    )

    def __init__(self, connection: "_ServerConnection") -> None:
        self._connection = connection
        self.method = b""
        self.path = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.keep_alive = True
        self.http_1_0 = False
        self.started = False
        self.done = False
        self.on_disconnect: Callable[[], None] | None = None
        self.on_pause: Callable[[bool], None] | None = None

    def respond(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = b"application/json",
        headers: tuple[tuple[bytes, bytes], ...] = (),
        close: bool = False,
    ) -> None:
        """A whole answer at once."""
        fields = (
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            *headers,
        )
        self.start(status, fields, close=close)
        self.write(b"" if self.method == b"HEAD" else body)
        self.finish()

    def start(
        self, status: int, headers: tuple[tuple[bytes, bytes], ...], *, close: bool = False
    ) -> None:
        """Status line and headers; the body follows in ``write``, framed as the headers say."""
        if self.done:
            return
        self.started = True
        self.keep_alive = self.keep_alive and not close
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
        lines += [b"%b: %b\r\n" % field for field in headers]
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.http_1_0:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._connection.send(b"".join(lines))

    def write(self, data: bytes) -> None:
        """Raw bytes of the answer's body."""
        if not self.done:
            self._connection.send(data)

    def finish(self, *, close: bool = False) -> None:
        """The answer is complete."""
        if not self.done:
            self.done = True
            self._connection.finished(close=close or not self.keep_alive)

    def abort(self) -> None:
        """Break the connection off: the answer cannot be completed."""
        if not self.done:
            self.done = True
            self._connection.abort()


Handler = Callable[[Exchange], None]


class _ServerConnection(asyncio.Protocol):
    """One client connection; requests on it are answered one after the other."""

    def __init__(self, server: "_Connections") -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Exchange | None = None
        self._current: Exchange | None = None
        self._pending: deque[Exchange] = deque()
        self._parts: list[bytes] = []
        self._body_bytes = 0
        self._header_bytes = 0
        self._in_head = True
        self._url = b""
        self._lingered_bytes = -1
        self._timer: asyncio.TimerHandle | None = None

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
        self._transport = None
        self._pending.clear()
        current, self._current = self._current, None
        if current is not None and not current.done:
            current.done = True
            if current.on_disconnect is not None:
                current.on_disconnect()

    def pause_writing(self) -> None:
        self._arm(self._limits.stall_s)
        if self._current is not None and self._current.on_pause is not None:
            self._current.on_pause(True)

    def resume_writing(self) -> None:
        self._disarm()
        if self._current is not None and self._current.on_pause is not None:
            self._current.on_pause(False)

    def data_received(self, data: bytes) -> None:
        if self._lingered_bytes >= 0:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > _LINGER_BYTES:
                self.abort()
            return
        self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self._in_head and self._header_bytes > _MAX_HEADER_BYTES:
                self._refuse(431, b"request headers are larger than 32 KiB")
        except httptools.HttpParserUpgrade:
            self._refuse(400, b"protocol upgrades are not supported")
        except httptools.HttpParserError:
            if self._lingered_bytes < 0:
                self._refuse(400, b"malformed HTTP request")

    # -- httptools callbacks --------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._reading = Exchange(self)
        self._url = b""
        self._parts = []
        self._body_bytes = 0
        self._in_head = True
        if self._current is None:
            self._arm(self._limits.read_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._reading is not None
        self._reading.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        request = self._reading
        assert request is not None
        self._in_head = False
        self._header_bytes = 0
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        request.http_1_0 = self._parser.get_http_version() == "1.0"
        request.path = self._url
        length = request.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            self._refuse_body()
            raise ValueError("body too large")
        if request.headers.get(b"expect", b"").lower() == b"100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
            raise ValueError("body too large")
        self._parts.append(body)

    def on_message_complete(self) -> None:
        request, self._reading = self._reading, None
        assert request is not None
        self._in_head = True
        self._header_bytes = 0
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        if self._current is not None:
            self._pending.append(request)
            if self._transport is not None and len(self._pending) >= 4:
                self._transport.pause_reading()
            return
        self._begin(request)

    # -- answering ------------------------------------------------------------------------------
    def _begin(self, request: Exchange) -> None:
        self._disarm()
        self._current = request
        self._server.handler(request)

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def finished(self, *, close: bool) -> None:
        self._current = None
        if self._transport is None:
            return
        if close:
            # What is still in the send buffer gets as long as any stalled reader.
            self._arm(self._limits.stall_s)
            self._transport.close()
        elif self._pending:
            self._transport.resume_reading()
            self._loop.call_soon(self._next)
        else:
            self._arm(self._limits.idle_timeout_s)

    def _next(self) -> None:
        if self._current is None and self._pending and self._transport is not None:
            self._begin(self._pending.popleft())

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _refuse_body(self) -> None:
        limit = self._limits.max_body_bytes
        self._refuse(413, b"request body is larger than the limit of %d bytes" % limit)

    def _refuse(self, status: int, message: bytes) -> None:
        """Answer what cannot be parsed, then read on a little and close."""
        if self._lingered_bytes >= 0 or self._transport is None:
            return
        self._lingered_bytes = 0
        if self._current is not None:
            self.abort()
            return
        exchange = Exchange(self)
        self._current = exchange
        self._server.refuse(exchange, status, message.decode())
        self._arm(_LINGER_S)

    def shut(self) -> None:
        """Close when idle; used when the server ends."""
        if self._transport is not None and self._current is None:
            self._transport.close()

    # -- timeouts -------------------------------------------------------------------------------
    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, self.abort)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


Refusal = Callable[[Exchange, int, str], None]


class _Connections:
    """What the connections of one server share."""

    def __init__(self, handler: Handler, refuse: Refusal, limits: ServerLimits) -> None:
        self.handler = handler
        self.refuse = refuse
        self.limits = limits
        self.open: set[_ServerConnection] = set()


class Server:
    """A listening server; ``close`` ends it and every connection."""

    def __init__(self, server: asyncio.AbstractServer, connections: _Connections) -> None:
        self._server = server
        self._connections = connections

    @property
    def port(self) -> int:
        """The TCP port bound (0 for a Unix socket)."""
        sockets = getattr(self._server, "sockets", ())
        name = sockets[0].getsockname() if sockets else ""
        return int(name[1]) if isinstance(name, tuple) else 0

    def stop_listening(self) -> None:
        self._server.close()
        for connection in list(self._connections.open):
            connection.shut()

    async def close(self) -> None:
        self._server.close()
        for connection in list(self._connections.open):
            connection.abort()
        await self._server.wait_closed()


async def serve(
    handler: Handler,
    *,
    refuse: Refusal,
    limits: ServerLimits,
    host: str = "127.0.0.1",
    port: int = 0,
    unix_socket: str = "",
    reuse_port: bool = False,
) -> Server:
    """Listen on a TCP port or a Unix socket.

    ``handler`` is called with each request, ``refuse`` to answer one that breaks a limit (its
    connection closes afterwards); neither may block.
    """
    loop = asyncio.get_running_loop()
    connections = _Connections(handler, refuse, limits)
    factory = lambda: _ServerConnection(connections)  # noqa: E731
    if unix_socket:
        server = await loop.create_unix_server(factory, unix_socket, backlog=1024)
    else:
        server = await loop.create_server(
            factory,
            host,
            port,
            reuse_port=reuse_port or None,
            backlog=4096,
            family=socket.AF_UNSPEC,
        )
    return Server(server, connections)
