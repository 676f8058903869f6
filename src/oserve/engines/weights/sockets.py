"""Bytes between workers of one machine: a Unix socket for each pair and direction.

The sockets are in the engines' private folders, so that nobody else can listen or speak. Closing
one from another thread ends whatever waits on it at once.

They block in the kernel, which keeps the deadline and goes on until all of a chunk is over. A call
that returns after each bufferful must wait for the interpreter's lock each time, and in an engine
that serves that wait takes many times as long as the copying.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence

_CHUNK_BYTES = 16 << 20
_BUFFER_BYTES = 4 << 20
_POLL_S = 0.02
# Who calls (rank), for which transfer (bytes of its name that follow).
_HELLO = struct.Struct("!II")
_MAX_NAME_BYTES = 256
# The number of an operation and its bytes.
_HEAD = struct.Struct("!QQ")
# Seconds and microseconds, as the kernel has them.
_TIME = struct.Struct("@ll")


class TransferError(Exception):
    """A transfer that cannot go on; the text says why."""


class Throttle:
    """Holds the threads of one worker to ``bytes_per_s`` in all (0: no limit) until ``stopped``."""

    def __init__(self, bytes_per_s: float, stopped: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._stopped = stopped
        self._lock = threading.Lock()
        self._free_s = time.monotonic()

    @property
    def chunk_bytes(self) -> int:
        """What to send at a time."""
        if not self._bytes_per_s:
            return _CHUNK_BYTES
        return max(1, min(_CHUNK_BYTES, int(self._bytes_per_s / 10)))

    def wait(self, size: int) -> None:
        """Until that many bytes may go."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now_s = time.monotonic()
            start_s = max(self._free_s, now_s)
            self._free_s = start_s + size / self._bytes_per_s
        if start_s > now_s:
            self._stopped.wait(start_s - now_s)


class Listener:
    """Where one rank is called by those that send to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(path)
        self._socket.listen(128)

    def accept(
        self, name: str, callers: Sequence[int], deadline_s: float
    ) -> dict[int, "ShardStream"]:
        """A stream from each caller. Raises TransferError if one does not call in time."""
        found: dict[int, ShardStream] = {}
        try:
            while len(found) < len(callers):
                missing = sorted(set(callers) - set(found))
                self._socket.settimeout(_left_s(deadline_s, f"rank {missing[0]} did not call"))
                try:
                    caller, _ = self._socket.accept()
                except TimeoutError:
                    continue
                except OSError as error:
                    raise TransferError(f"waiting for rank {missing[0]}: {error}") from None
                stream = ShardStream(caller, deadline_s)
                try:
                    rank = stream.greeted(name)
                except TransferError:
                    stream.close()
                    raise
                if rank not in missing:
                    stream.close()
                    continue
                found[rank] = stream
        except TransferError:
            for stream in found.values():
                stream.close()
            raise
        return found

    def close(self) -> None:
        """Nobody can call any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class ShardStream:
    """One direction between two ranks. Errors and deadlines are ``TransferError``."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self._socket = connection
        self._deadline_s = deadline_s
        connection.settimeout(None)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    @classmethod
    def call(cls, path: str, name: str, rank: int, deadline_s: float) -> "ShardStream":
        """To the rank that listens at ``path``, which may be about to."""
        while True:
            left_s = _left_s(deadline_s, f"nobody listens at {path}")
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(left_s)
                connection.connect(path)
            except OSError:
                connection.close()
                time.sleep(_POLL_S)
                continue
            stream = cls(connection, deadline_s)
            try:
                stream.give(memoryview(_HELLO.pack(rank, len(name.encode())) + name.encode()))
            except TransferError:
                stream.close()
                raise
            return stream

    def greeted(self, name: str) -> int:
        """The rank of who calls for this transfer, or -1 for whoever calls for another."""
        rank, length = _HELLO.unpack(self.take(_HELLO.size))
        if length > _MAX_NAME_BYTES or self.take(length) != name.encode():
            return -1
        return int(rank)

    def send(self, number: int, data: memoryview, throttle: Throttle) -> None:
        """One operation's bytes."""
        self.give(memoryview(_HEAD.pack(number, len(data))))
        step = throttle.chunk_bytes
        for start in range(0, len(data), step):
            part = data[start : start + step]
            throttle.wait(len(part))
            self.give(part)

    def receive(self, number: int, data: memoryview) -> None:
        """One operation's bytes, into ``data``, all of it."""
        told, size = _HEAD.unpack(self.take(_HEAD.size))
        if (told, size) != (number, len(data)):
            raise TransferError(
                f"operation {told} of {size} bytes came, not {number} of {len(data)}"
            )
        self._fill(data)

    def give(self, data: memoryview) -> None:
        """All of it."""
        try:
            while data:
                self._limit(socket.SO_SNDTIMEO, "not all could be sent")
                with contextlib.suppress(BlockingIOError):
                    data = data[self._socket.send(data) :]
        except OSError as error:
            raise TransferError(f"sending: {error}") from None

    def take(self, size: int) -> bytes:
        """That many bytes."""
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def give_descriptor(self, descriptor: int) -> None:
        """An open file, for the other side to have as well."""
        try:
            self._limit(socket.SO_SNDTIMEO, "a file could not be handed over")
            socket.send_fds(self._socket, [b"\0"], [descriptor])
        except OSError as error:
            raise TransferError(f"handing over a file: {error}") from None

    def take_descriptor(self) -> int:
        """What ``give_descriptor`` gave; the caller closes it."""
        try:
            self._limit(socket.SO_RCVTIMEO, "a file did not come")
            _, found, _, _ = socket.recv_fds(self._socket, 1, 1)
        except OSError as error:
            raise TransferError(f"taking over a file: {error}") from None
        if len(found) != 1:
            raise TransferError("the sender hung up")
        os.set_inheritable(found[0], False)
        return found[0]

    def _fill(self, data: memoryview) -> None:
        try:
            while data:
                self._limit(socket.SO_RCVTIMEO, "not all came")
                with contextlib.suppress(BlockingIOError):
                    size = self._socket.recv_into(data[:_CHUNK_BYTES], flags=socket.MSG_WAITALL)
                    if size == 0:
                        raise TransferError("the sender hung up")
                    data = data[size:]
        except OSError as error:
            raise TransferError(f"receiving: {error}") from None

    def _limit(self, option: int, what: str) -> None:
        """Have the kernel end the next call at the deadline (it then says that it would block)."""
        left_s = _left_s(self._deadline_s, what)
        whole_s = int(left_s)
        # No time at all would mean no limit.
        rest_us = max(1, int((left_s - whole_s) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(whole_s, rest_us))

    def close(self) -> None:
        """Hang up; whoever waits on either side is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _left_s(deadline_s: float, what: str) -> float:
    """Seconds to the deadline (monotonic clock). Raises TransferError past it."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TransferError(f"{what} within the deadline")
    return left_s
