"""The client side: pooled connections to one server, responses handed on as the bytes they are."""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from oserve.core import HatchAddress
from oserve.wire.framing import Framing, FramingError
from oserve.wire.hatch import connect_hatch
from oserve.wire.response import ResponseHead, read_head

_MAX_HEAD_BYTES = 64 * 1024
_CONNECT_TIMEOUT_S = 5.0
_FINAL = 200
_MAX_IDLE = 256


class Sink(Protocol):
    """Receives one response. Nothing is called after ``on_end`` or ``on_error``.

    An exception of any of these methods is passed to ``crashed``, which itself must not raise.

    ``cancelled`` is read before a new connection is used; ``attached`` passes the connection, by
    which the caller pauses the response or drops the request.
    """

    @property
    def cancelled(self) -> bool: ...

    def attached(self, connection: "UpstreamConnection") -> None: ...

    def on_head(self, head: ResponseHead) -> None: ...

    def on_data(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_error(self, reason: str) -> None: ...

    def crashed(self, error: Exception) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to a server; one request at a time."""

    def __init__(self, pool: "UpstreamPool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._head: ResponseHead | None = None
        self._buffer = b""
        self._keep_alive = True
        self._request = b""
        self._reused = False
        self.dropped = False
        self.framing: Framing | None = None

    # -- used by the sender of the request ------------------------------------------------------
    def abort(self) -> None:
        """Drop the request: the server sees that the connection closes."""
        self._sink = None
        # The pool may be about to send the request again on another connection.
        self.dropped = True
        if self._transport is not None:
            self._transport.abort()

    def sever(self) -> None:
        """Break the connection; its sink gets ``on_error``."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self, paused: bool) -> None:
        """Stop or go on reading the response."""
        if self._transport is None:
            return
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # -- used by the pool -----------------------------------------------------------------------
    def begin(self, request: bytes, sink: Sink, *, reused: bool) -> None:
        self._sink = sink
        self._request = request
        self._reused = reused
        self._head = None
        self.framing = None
        self._buffer = b""
        if self._transport is None:
            self.connection_lost(None)
        else:
            self._transport.write(request)

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # -- transport ------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape only

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            self._lost(sink)
        except Exception as error:  # a fault of the sink ends its own request
            sink.crashed(error)

    def _lost(self, sink: Sink) -> None:
        if self._head is None and not self._buffer and self._reused:
            # The server closed an idle connection just as it was reused: it read no request.
            self._pool.send_fresh(self._request, sink, instead_of=self)
        elif self._head is not None and self.framing is None:
            sink.on_end()  # the body ended with the connection, as its head announced
        else:
            sink.on_error("the connection broke")

    def data_received(self, data: bytes) -> None:
        sink, framing = self._sink, self.framing
        if sink is None:
            return
        try:
            if framing is None:
                self._received_unframed(sink, data)
            else:
                self._received(sink, framing, data)
        except Exception as error:  # a fault of the sink ends its own request
            self._sink = None
            self.close()
            sink.crashed(error)

    def _received_unframed(self, sink: Sink, data: bytes) -> None:
        """Bytes of the head, or of a body that ends with the connection."""
        if self._head is None:
            self._buffer = self._buffer + data if self._buffer else data
            data = self._parse_head(sink)
            if self._sink is None:
                return
        framing = self.framing
        if framing is not None:
            self._received(sink, framing, data)
        elif data and self._head is not None:
            sink.on_data(data)

    def _received(self, sink: Sink, framing: Framing, data: bytes) -> None:
        try:
            used = framing.feed(data)
        except FramingError as error:
            self._broken(sink, str(error))
            return
        if used:
            sink.on_data(data if used == len(data) else data[:used])
        if framing.complete and self._sink is sink:
            self._complete(sink, clean=used == len(data))

    def _complete(self, sink: Sink, *, clean: bool) -> None:
        self._sink = None
        if self._keep_alive and clean and self._transport is not None:
            # The response may have been paused for a slow client; the next one is not.
            self._transport.resume_reading()
            self._pool.give_back(self)
        else:
            self.close()
        sink.on_end()

    def _parse_head(self, sink: Sink) -> bytes:
        """Take the head off the buffer; returns the bytes after it."""
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > _MAX_HEAD_BYTES:
                self._broken(sink, "the response head is too long")
            return b""
        rest = buffer[end + 4 :]
        try:
            head = read_head(buffer[:end])
        except ValueError as error:
            self._broken(sink, f"the response head is malformed: {error}")
            return b""
        if head.status < _FINAL:
            self._buffer = rest
            return self._parse_head(sink) if rest else b""
        self._buffer = b""
        self._keep_alive = head.keep_alive
        self._head = head
        if head.chunked or head.length is not None:
            self.framing = Framing(head.length)
        sink.on_head(head)
        if self.framing is not None and self.framing.complete and self._sink is sink:
            self._complete(sink, clean=not rest)
        return rest

    def _broken(self, sink: Sink, reason: str) -> None:
        self._sink = None
        self.close()
        sink.on_error(reason)


def client_context(ca_file: str = "") -> ssl.SSLContext:
    """For servers whose certificate the system's authorities vouch for, or those in ``ca_file``."""
    return ssl.create_default_context(cafile=ca_file or None)


def _unwanted(sink: Sink, replaced: UpstreamConnection | None) -> bool:
    """Whether a connection that has just been made is not wanted any more."""
    return sink.cancelled or (replaced is not None and replaced.dropped)


def _tell(sink: Sink, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:  # a fault of the sink ends its own request
        sink.crashed(error)


class UpstreamPool:
    """Connections to one server, by Unix socket or by host and port (over TLS with ``tls``).

    With a ``hatch``, ``unix_socket`` is a name behind it.
    """

    def __init__(
        self,
        *,
        unix_socket: str = "",
        hatch: HatchAddress | None = None,
        host: str = "",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._unix_socket = unix_socket
        self._hatch = hatch
        self._host = host
        self._port = port
        self._tls = tls
        self._idle: deque[UpstreamConnection] = deque()
        self._all: set[UpstreamConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    def send(self, request: bytes, sink: Sink) -> None:
        """Send one request, on an idle connection where there is one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                sink.attached(connection)
                connection.begin(request, sink, reused=True)
                return
        self.send_fresh(request, sink)

    def send_fresh(
        self, request: bytes, sink: Sink, *, instead_of: UpstreamConnection | None = None
    ) -> None:
        """Send on a new connection, unless the connection that it replaces has been dropped."""
        work = self._connect(request, sink, instead_of)
        task = asyncio.get_running_loop().create_task(work)
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(
        self, request: bytes, sink: Sink, instead_of: UpstreamConnection | None
    ) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                connection = await self._opened()
        except (OSError, TimeoutError) as error:
            if not _unwanted(sink, instead_of):
                reason = f"cannot connect: {error or 'timed out'}"
                _tell(sink, lambda: sink.on_error(reason))
            return
        if _unwanted(sink, instead_of):
            connection.close()
            return
        self._all.add(connection)

        def begin() -> None:
            sink.attached(connection)
            connection.begin(request, sink, reused=False)

        _tell(sink, begin)

    async def _opened(self) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        factory = lambda: UpstreamConnection(self)  # noqa: E731
        if self._hatch is not None:
            _, opened = await connect_hatch(loop, factory, self._hatch, self._unix_socket)
            return cast(UpstreamConnection, opened)
        if self._unix_socket:
            _, connection = await loop.create_unix_connection(factory, self._unix_socket)
        else:
            _, connection = await loop.create_connection(
                factory, self._host, self._port, ssl=self._tls
            )
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        if len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def forget(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self) -> None:
        """Close what is not in use; requests under way go on."""
        while self._idle:
            self._idle.pop().close()

    def fail_all(self) -> None:
        """Break every connection: the server is known to be dead, its requests get ``on_error``."""
        for connection in list(self._all):
            connection.sever()
