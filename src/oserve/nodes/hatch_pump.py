"""Bytes both ways between a TLS connection and a Unix socket, in one thread.

One TLS connection must not be read and written by two threads at once, so that both directions
share a thread: it waits for neither side while the other can go on.
"""

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

BUFFER_BYTES: Final = 256 * 1024
"""Of each direction: large enough that the interpreter's share of the work is small."""

_LINGER_S = 5.0
_READ, _WRITE = select.POLLIN, select.POLLOUT


class _Way:
    """One direction: a buffer that is filled from one side, then emptied to the other.

    ``awaits``: the side and the event without which it cannot go on; ``None`` if it can.
    """

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self._source = source
        self._sink = sink
        # A TLS record is small; a socket gives all that it has at once.
        self._by_record = isinstance(source, ssl.SSLSocket)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        self._ended = False
        self.awaits: tuple[socket.socket, int] | None = None

    @property
    def over(self) -> bool:
        """Whether the source has ended and all that it sent is through."""
        return self._ended and self._start == self._end

    def step(self) -> int:
        """Go on until one side must be waited for; the bytes that went through. Raises OSError."""
        moved = 0
        self.awaits = None
        while self.awaits is None and not self.over:
            if self._start == self._end:
                self._fill()
            if self._start < self._end:
                moved += self._empty()
        return moved

    def _fill(self) -> None:
        """Read until the buffer is full, or the source has no more for now."""
        self._start = self._end = 0
        try:
            while self._end < BUFFER_BYTES:
                size = self._source.recv_into(self._buffer[self._end :])
                if size == 0:
                    self._ended = True
                    return
                self._end += size
                if not self._by_record:
                    return
        except (ssl.SSLWantReadError, BlockingIOError):
            self._await(self._source, _READ)
        except ssl.SSLWantWriteError:
            self._await(self._source, _WRITE)

    def _await(self, side: socket.socket, event: int) -> None:
        # What has come already is passed on before anything is awaited.
        if self._start == self._end:
            self.awaits = (side, event)

    def _empty(self) -> int:
        try:
            # TLS takes all or nothing, and wants the same bytes again.
            sent = self._sink.send(self._buffer[self._start : self._end])
        except (ssl.SSLWantWriteError, BlockingIOError):
            self.awaits = (self._sink, _WRITE)
            return 0
        except ssl.SSLWantReadError:
            self.awaits = (self._sink, _READ)
            return 0
        self._start += sent
        return sent


def pump(tls: ssl.SSLSocket, inner: socket.socket, count: Callable[[int, int], None]) -> None:
    """Relay until one side ends or breaks, and close both.

    ``count`` is told the bytes that went out over TLS, and those that came in.
    """
    tls.setblocking(False)
    inner.setblocking(False)
    outward, inward = _Way(inner, tls), _Way(tls, inner)
    try:
        while True:
            sent, received = outward.step(), inward.step()
            if sent or received:
                count(sent, received)
            if outward.over or inward.over:
                break
            if not (sent or received):
                _wait(outward, inward)
        _end(tls)
    except OSError:
        pass  # of a side that broke: the other is told by the end of its connection
    finally:
        tls.close()
        inner.close()


def _wait(*ways: _Way) -> None:
    events: dict[int, int] = {}
    for way in ways:
        if way.awaits is None:
            return
        side, event = way.awaits
        events[side.fileno()] = events.get(side.fileno(), 0) | event
    poll = select.poll()
    for file, mask in events.items():
        poll.register(file, mask)
    poll.poll()


def _end(tls: ssl.SSLSocket) -> None:
    """End TLS in form, and wait for the other side: an early close discards bytes under way."""
    with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
        tls.unwrap()
    tls.shutdown(socket.SHUT_WR)
    tls.settimeout(_LINGER_S)
    end_s = time.monotonic() + _LINGER_S
    while tls.recv(BUFFER_BYTES) and time.monotonic() < end_s:
        pass
