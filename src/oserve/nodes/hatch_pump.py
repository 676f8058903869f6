"""Bytes both ways between a TLS connection and a rank's Unix socket, in one thread.

One TLS connection must not be read and written by two threads at once, so that both directions
share a thread: it waits for neither side while the other can go on.

A rank can have the relay read and write its memory instead of the socket: see
``engines.weights.relay_orders``. What is read then goes from that memory into TLS, and what comes
from TLS into that memory, without a copy between.
"""

import contextlib
import mmap
import os
import select
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from oserve.engines.weights.relay_orders import PASS, SEND, FileRange, Order, OrderReader

BUFFER_BYTES: Final = 256 * 1024
"""Of each direction: large enough that the interpreter's share of the work is small."""

_LINGER_S = 5.0
_READ, _WRITE = select.POLLIN, select.POLLOUT
# What goes through before the other direction has its turn.
_TURN_BYTES = 4 << 20
# Rows of no less are written in place; shorter ones are gathered in the buffer.
_LONG_ROW_BYTES = 16 * 1024
_ONE_FILE = socket.CMSG_SPACE(4)
_READY_BYTES = 4 << 20
# MADV_POPULATE_WRITE, which Python does not name.
_POPULATE_WRITE = 23


class _File:
    """A file of a rank, mapped. Raises OSError for one without bytes."""

    def __init__(self, descriptor: int) -> None:
        try:
            self._map = mmap.mmap(descriptor, 0)
        except ValueError as error:
            raise OSError(str(error)) from None
        self.view = memoryview(self._map)
        self._ready = range(0)

    def make_ready(self, start: int) -> None:
        """Map the pages from this byte on at once: they are about to be written.

        Each would be mapped at the first write to it, which takes longer than the copy.
        """
        if start in self._ready:
            return
        first = start - start % mmap.PAGESIZE
        size = min(_READY_BYTES, len(self.view) - first)
        self._ready = range(first, first + size)
        with contextlib.suppress(OSError):  # before Linux 5.14, where writing maps them
            self._map.madvise(_POPULATE_WRITE, first, size)


class _Files:
    """The files of a rank that this relay has mapped, by inode."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], _File] = {}

    def taken(self, descriptor: int) -> _File:
        """The file behind a descriptor, which is closed. Raises OSError."""
        try:
            found = os.fstat(descriptor)
            key = (found.st_dev, found.st_ino)
            if key not in self._files:
                self._files[key] = _File(descriptor)
        finally:
            os.close(descriptor)
        return self._files[key]


class _Way:
    """One direction. ``awaits``: the side and the event without which it cannot go on, if any."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        # What has been read and not yet written.
        self.rest = self.buffer[:0]
        self.ended = False
        self.awaits: tuple[socket.socket, int] | None = None

    @property
    def over(self) -> bool:
        """Whether the source has ended and all that it sent is through."""
        return self.ended and not self.rest

    def step(self) -> int:
        """Go on for a turn, or until one side must be waited for; the bytes that went through.

        Raises OSError.
        """
        moved = 0
        self.awaits = None
        while self.awaits is None and not self.over and moved < _TURN_BYTES:
            moved += self._once()
        return moved

    def _once(self) -> int:
        raise NotImplementedError

    def _read(self, source: socket.socket, target: memoryview) -> int:
        """Bytes read; 0 if there are none for now, or no more at all."""
        try:
            size = source.recv_into(target)
        except (ssl.SSLWantReadError, BlockingIOError):
            self.awaits = (source, _READ)
            return 0
        except ssl.SSLWantWriteError:
            self.awaits = (source, _WRITE)
            return 0
        self.ended = size == 0
        return size

    def _write(self, sink: socket.socket) -> int:
        try:
            # TLS takes all or nothing, and wants the same bytes again.
            sent = sink.send(self.rest)
        except (ssl.SSLWantWriteError, BlockingIOError):
            self.awaits = (sink, _WRITE)
            return 0
        except ssl.SSLWantReadError:
            self.awaits = (sink, _READ)
            return 0
        self.rest = self.rest[sent:]
        return sent


class _Inward(_Way):
    """From TLS to the rank, or into its memory."""

    def __init__(self, tls: ssl.SSLSocket, inner: socket.socket) -> None:
        super().__init__()
        self._tls = tls
        self._inner = inner
        self._targets: deque[tuple[_File, FileRange]] = deque()
        # Of the first target: the bytes that have come.
        self._done = 0

    def place(self, file: _File, order: Order) -> None:
        """Bytes that have not been read yet go where the order says."""
        self._targets.extend((file, one) for one in order.ranges)

    def _once(self) -> int:
        if self.rest:
            return self._write(self._inner)
        if not self._targets:
            self._fill(BUFFER_BYTES)
            return 0
        file, target = self._targets[0]
        left = target.size - self._done
        if target.offset == PASS:
            size = self._fill(min(left, BUFFER_BYTES))
        else:
            size = self._place(file, target, left)
        self._done += size
        if self._done == target.size:
            self._targets.popleft()
            self._done = 0
        return 0 if target.offset == PASS else size

    def _place(self, file: _File, target: FileRange, left: int) -> int:
        """Read into the rows of a range; the bytes that came."""
        row, column = divmod(self._done, target.row_bytes)
        start = target.offset + row * target.stride
        file.make_ready(start + column)
        if target.rows == 1 or target.row_bytes >= _LONG_ROW_BYTES:
            return self._read(self._tls, file.view[start + column : start + target.row_bytes])
        size = self._read(self._tls, self.buffer[: min(left, BUFFER_BYTES)])
        _scatter(file.view, target, self._done, self.buffer[:size])
        return size

    def _fill(self, most: int) -> int:
        """Read for the rank until there is no more for now: a record is small."""
        end = 0
        while end < most and not self.ended:
            size = self._read(self._tls, self.buffer[end:most])
            if not size:
                break
            end += size
        self.rest = self.buffer[:end]
        if end:
            # What has come already is passed on before anything is awaited.
            self.awaits = None
        return end


class _Outward(_Way):
    """From the rank, or out of its memory, to TLS."""

    def __init__(self, inner: socket.socket, tls: ssl.SSLSocket, inward: _Inward) -> None:
        super().__init__()
        self._inner = inner
        self._tls = tls
        self._inward = inward
        self._files = _Files()
        self._pieces: Iterator[memoryview] = iter(())
        self._order: tuple[OrderReader, _File] | None = None

    def _once(self) -> int:
        if self.rest:
            return self._write(self._tls)
        piece = next(self._pieces, None)
        if piece is not None:
            self.rest = piece
        elif self._order is not None:
            self._read_order(*self._order)
        else:
            self._read_rank()
        return 0

    def _read_rank(self) -> None:
        try:
            size, notes, _, _ = self._inner.recvmsg_into([self.buffer], _ONE_FILE)
        except BlockingIOError:
            self.awaits = (self._inner, _READ)
            return
        self.ended = size == 0
        for level, kind, data in notes:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                # A read ends behind the byte that carries a file, and that byte is not passed on.
                size -= 1
                self._order = (
                    OrderReader(),
                    self._files.taken(int.from_bytes(data[:4], sys.byteorder)),
                )
        self.rest = self.buffer[:size]

    def _read_order(self, reader: OrderReader, file: _File) -> None:
        size = self._read(self._inner, self.buffer[: min(reader.missing, BUFFER_BYTES)])
        if not size:
            return
        try:
            order = reader.feed(self.buffer[:size])
        except ValueError as error:
            raise OSError(str(error)) from None
        if order is None:
            return
        self._order = None
        if any(one.offset != PASS and one.end > len(file.view) for one in order.ranges):
            raise OSError("an order leads out of its file")
        if order.kind == SEND:
            self._pieces = _pieces(file.view, order, self.buffer)
        else:
            self._inward.place(file, order)


def _pieces(view: memoryview, order: Order, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of an order's ranges; a piece is used before the next is asked for."""
    for one in order.ranges:
        if one.rows == 1 or one.row_bytes >= _LONG_ROW_BYTES:
            for start in range(one.offset, one.end, one.stride):
                row = view[start : start + one.row_bytes]
                for at in range(0, len(row), BUFFER_BYTES):
                    yield row[at : at + BUFFER_BYTES]
            continue
        for part in one.cut(BUFFER_BYTES):
            at = 0
            for start in range(part.offset, part.end, part.stride):
                buffer[at : at + part.row_bytes] = view[start : start + part.row_bytes]
                at += part.row_bytes
            yield buffer[:at]


def _scatter(view: memoryview, target: FileRange, done: int, data: memoryview) -> None:
    """Put bytes of a range, from its byte ``done`` on, into their rows."""
    row, column = divmod(done, target.row_bytes)
    while data:
        start = target.offset + row * target.stride + column
        size = min(len(data), target.row_bytes - column)
        view[start : start + size] = data[:size]
        data = data[size:]
        row, column = row + 1, 0


def pump(tls: ssl.SSLSocket, inner: socket.socket, count: Callable[[int, int], None]) -> None:
    """Relay until one side ends or breaks, and close both.

    ``count`` is told the bytes that went out over TLS, and those that came in.
    """
    tls.setblocking(False)
    inner.setblocking(False)
    inward = _Inward(tls, inner)
    outward = _Outward(inner, tls, inward)
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
