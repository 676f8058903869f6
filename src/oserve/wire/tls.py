"""TLS on a plain transport, with little work for each small piece.

The event loops' own TLS allocates a quarter of a megabyte for each read, and ends each by an
exception; a streamed token costs them more than its encryption. Here a piece that comes is one
record in, one read and one call of the protocol; a piece that goes is one record and one write.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

_READ_BYTES: Final = 64 * 1024


class TlsTransport(asyncio.Transport):
    """What a protocol over TLS writes to. There is no half-closed TLS: ``close`` ends both ways.

    It sends first what has been written, then waits for the other side's end.
    """

    def __init__(self, layer: "TlsLayer") -> None:
        super().__init__()
        self._layer = layer
        self.write = layer.write  # type: ignore[method-assign]  # a call less for each piece

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._layer.tls
        return self._layer.plain.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._layer.closing

    def close(self) -> None:
        self._layer.close()

    def abort(self) -> None:
        self._layer.abort()

    def pause_reading(self) -> None:
        self._layer.pause(True)

    def resume_reading(self) -> None:
        self._layer.pause(False)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._layer.protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._layer.protocol

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._layer.plain.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._layer.plain.set_write_buffer_limits(high, low)


class TlsLayer(asyncio.Protocol):
    """The protocol of the plain transport; ``protocol`` is above it once the handshake is over.

    ``failed`` is told why a handshake came to nothing: ``protocol`` is then told nothing.
    ``linger_s``: how long a closed connection waits for the other side to read and to end it.
    """

    plain: asyncio.Transport

    def __init__(
        self,
        context: ssl.SSLContext,
        protocol: asyncio.Protocol,
        failed: Callable[[OSError], None],
        *,
        server_side: bool = False,
        linger_s: float = 5.0,
    ) -> None:
        self.protocol = protocol
        self.closing = False
        self._failed = failed
        self._linger_s = linger_s
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._shaken = self._settled = False
        self._paused = False
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None

    # -- of the plain transport -----------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.plain = cast(asyncio.Transport, transport)  # uvloop's is one by shape only
        self._shake()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self._incoming.write(data)
        if not self._shaken:
            self._shake()
        if self._shaken:
            self._deliver()

    def eof_received(self) -> bool:
        if self._shaken and not self.closing:
            self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.closing = True
        if self._shaken:
            self.protocol.connection_lost(exc)
        else:
            self._fail(exc if isinstance(exc, OSError) else ConnectionResetError())

    def pause_writing(self) -> None:
        if self._shaken:
            self.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._shaken:
            self.protocol.resume_writing()

    # -- the handshake --------------------------------------------------------------------------
    def _shake(self) -> None:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # it says why
            self.closing = True
            self.plain.close()
            self._fail(error)
        else:
            self._flush()
            self._shaken = self._settled = True
            self.protocol.connection_made(TlsTransport(self))

    def _fail(self, error: OSError) -> None:
        if not self._settled:
            self._settled = True
            self._failed(error)

    # -- bytes ----------------------------------------------------------------------------------
    def _deliver(self) -> None:
        """Hand on what can be read, as long as the protocol wants it."""
        tls, incoming = self.tls, self._incoming
        try:
            while not (self._paused or self.closing):
                data = tls.read(_READ_BYTES)
                if not data:
                    self._end()
                    return
                self.protocol.data_received(data)
                if not (incoming.pending or tls.pending()):
                    break
        except ssl.SSLWantReadError:
            pass  # the rest of a record has not come
        except ssl.SSLError:
            self.abort()
            return
        if self._outgoing.pending:  # an answer of TLS itself, as to new keys
            self._flush()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send."""
        if self.closing or not data:
            return
        self.tls.write(data)
        self.plain.write(self._outgoing.read())

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self.plain.write(data)

    def pause(self, paused: bool) -> None:
        """Stop or go on reading."""
        if self.closing or paused is self._paused:
            return
        self._paused = paused
        if paused:
            self.plain.pause_reading()
        elif self._incoming.pending or self.tls.pending():
            # What has come already goes first; the end of the connection may be next.
            asyncio.get_running_loop().call_soon(self._resume)
        else:
            self.plain.resume_reading()

    def _resume(self) -> None:
        if not (self._paused or self.closing):
            self._deliver()
        if not (self._paused or self.closing):
            self.plain.resume_reading()

    # -- the end --------------------------------------------------------------------------------
    def _end(self) -> None:
        """The other side has ended."""
        if not self._ended:
            self._ended = True
            self.protocol.eof_received()
            self.close()

    def close(self) -> None:
        """Send what is left and the end of TLS; close when the other side has ended, too.

        Closing at once would discard what it has not read, if bytes of it are under way.
        """
        if self.closing:
            return
        self.closing = True
        with contextlib.suppress(ssl.SSLError):  # it waits for the answer, which is not read
            self.tls.unwrap()
        self._flush()
        self.plain.resume_reading()
        if self._ended:
            self.plain.close()
            return
        self.plain.write_eof()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._linger_s, self.plain.abort)

    def abort(self) -> None:
        """Close without a word."""
        self.closing = True
        self.plain.abort()
