"""Bytes between workers: a Unix socket for each pair of ranks and direction.

The sockets lie in the engines' private folders, so that no other user can listen or connect.
Closing a socket from another thread wakes a thread that waits on it.

A rank of another node is called through the hatch of this one: its address is then
``NODE:NAME@PATH``, with the path of this node's ``out.sock``. The hatch takes the line
``NODE NAME``, answers ``ok`` or ``no REASON``, and relays. Either rank can have its hatch work on
its memory instead (``relay_orders``): the sender by ``order_send``, the receiver by ``order_take``.

Calls block in the kernel, which keeps the deadline and transfers whole chunks. A call that returned
after each buffer would wait for the interpreter's lock each time, and in an engine that serves that
wait takes many times as long as the copy.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final

from oserve.engines.weights.relay_orders import SEND, TAKE, FileRange, Order, passed

_CHUNK_BYTES = 16 << 20
_BUFFER_BYTES = 4 << 20
_POLL_S = 0.02
# A hatch says at once that a rank does not listen yet; asking again costs two machines a greeting.
_FAR_POLL_S = 0.2
_MAX_LINE_BYTES = 512
# The caller's rank, and the length of the transfer's name that follows.
_HELLO = struct.Struct("!II")
_MAX_NAME_BYTES = 256
_LENGTH = struct.Struct("!Q")
_MAX_MESSAGE_BYTES = 1 << 30
# The number of a part, and its length in bytes.
_HEAD = struct.Struct("!QQ")
# The kernel's struct timeval: seconds and microseconds.
_TIME = struct.Struct("@ll")


OUT_SOCKET: Final = "out.sock"
"""Where a node's hatch takes connections to ranks of other nodes, in the folder of its engines."""


class TransferError(Exception):
    """A transfer that cannot go on; the text says why."""


def far_address(node: str, name: str, out_socket: str) -> str:
    """The address of a rank on another node; ``name`` is its socket's behind that node's hatch."""
    return f"{node}:{name}@{out_socket}"


def addresses_from(own: int, paths: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """What rank ``own`` calls the ranks by, given each rank's path and node, by number.

    A rank's path is ``FOLDER/ENGINE/wN.sock``; ``out.sock`` lies in the folder of its node.
    """
    out = os.path.join(os.path.dirname(os.path.dirname(paths[own])), OUT_SOCKET)
    return [
        path if node == nodes[own] else far_address(node, "/".join(path.rsplit("/", 2)[1:]), out)
        for path, node in zip(paths, nodes, strict=True)
    ]


class Throttle:
    """Limits the threads of one worker to ``bytes_per_s`` in all (0: no limit) until ``stopped``.

    ``chunk_bytes``: what to send in one call. ``limits``: whether there is a limit to wait for.
    """

    def __init__(self, bytes_per_s: float, stopped: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self.limits = bytes_per_s > 0
        most = int(bytes_per_s / 10) if self.limits else _CHUNK_BYTES
        self.chunk_bytes = max(1, min(_CHUNK_BYTES, most))
        self._stopped = stopped
        self._lock = threading.Lock()
        self._free_s = time.monotonic()

    def wait(self, size: int) -> None:
        """Wait until that many bytes may be sent."""
        if not self.limits:
            return
        with self._lock:
            now_s = time.monotonic()
            start_s = max(self._free_s, now_s)
            self._free_s = start_s + size / self._bytes_per_s
        if start_s > now_s:
            self._stopped.wait(start_s - now_s)


class Listener:
    """The socket at which other ranks connect to this one."""

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
        """A stream from each caller. Raises TransferError if one does not connect in time."""
        found: dict[int, ShardStream] = {}
        try:
            while len(found) < len(callers):
                missing = sorted(set(callers) - set(found))
                self._socket.settimeout(_left_s(deadline_s, f"rank {missing[0]} did not connect"))
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
        """Accept no more connections."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


class ShardStream:
    """One direction between two ranks. Errors and deadlines are ``TransferError``.

    ``far``: the rank that was called is on another node, so that no memory can be shown to it.
    """

    def __init__(self, connection: socket.socket, deadline_s: float, *, far: bool = False) -> None:
        self.far = far
        self._socket = connection
        self._deadline_s = deadline_s
        connection.settimeout(None)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    @classmethod
    def call(cls, address: str, name: str, rank: int, deadline_s: float) -> "ShardStream":
        """Connect to the rank at ``address``, which may not listen yet. Raises TransferError.

        ``address``: the path of its socket, or a ``far_address``.
        """
        route, far, path = ("", "", address)
        if not address.startswith("/"):
            route, far, path = address.partition("@")
        why = ""
        while True:
            left_s = _left_s(deadline_s, f"no rank listens at {address}{why}")
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(left_s)
                connection.connect(path)
                if far:
                    _relayed(connection, route)
            except OSError as error:
                connection.close()
                if far:
                    why = f" ({error})"
                time.sleep(_FAR_POLL_S if far else _POLL_S)
                continue
            stream = cls(connection, deadline_s, far=bool(far))
            try:
                stream.give(memoryview(_HELLO.pack(rank, len(name.encode())) + name.encode()))
            except TransferError:
                stream.close()
                raise
            return stream

    def greeted(self, name: str) -> int:
        """The caller's rank; -1 if it calls for another transfer."""
        rank, length = _HELLO.unpack(self.take(_HELLO.size))
        if length > _MAX_NAME_BYTES or self.take(length) != name.encode():
            return -1
        return int(rank)

    def send(self, number: int, data: memoryview, throttle: Throttle) -> None:
        """Send one part's bytes."""
        self.give_head(number, len(data))
        step = throttle.chunk_bytes
        for start in range(0, len(data), step):
            part = data[start : start + step]
            throttle.wait(len(part))
            self.give(part)

    def receive(self, number: int, data: memoryview) -> None:
        """Receive one part's bytes into the whole of ``data``."""
        self.take_head(number, len(data))
        self._fill(data)

    def give(self, data: memoryview) -> None:
        """Send raw bytes, all of them."""
        try:
            while data:
                self._limit(socket.SO_SNDTIMEO, "not all could be sent")
                with contextlib.suppress(BlockingIOError):
                    data = data[self._socket.send(data) :]
        except OSError as error:
            raise TransferError(f"sending: {error}") from None

    def take(self, size: int) -> bytes:
        """Receive that many raw bytes."""
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def order_send(
        self, number: int, descriptor: int, place: FileRange, throttle: Throttle
    ) -> None:
        """As ``send``, of bytes of a file: this node's hatch reads them from there.

        They may not have been read when this returns.
        """
        self.give_head(number, place.size)
        pieces = place.cut(throttle.chunk_bytes) if throttle.limits else [place]
        for piece in pieces:
            throttle.wait(piece.size)
            self._order(descriptor, Order(SEND, [piece]))

    def order_take(self, descriptor: int, parts: Sequence[FileRange | int]) -> None:
        """Have this node's hatch write the parts that come next into a file.

        ``parts``: where they belong, or for those that are to come here their sizes. The other
        rank must not have begun to send them. Their heads come here.
        """
        ranges: list[FileRange] = []
        waiting = 0
        for part in parts:
            waiting += _HEAD.size
            if isinstance(part, int):
                waiting += part
                continue
            ranges += [passed(waiting), part]
            waiting = 0
        self._order(descriptor, Order(TAKE, ranges))

    def take_head(self, number: int, size: int) -> None:
        """Receive the head of one part. Raises TransferError if it is of another."""
        told, comes = _HEAD.unpack(self.take(_HEAD.size))
        if (told, comes) != (number, size):
            raise TransferError(f"part {told} of {comes} bytes came, not part {number} of {size}")

    def give_head(self, number: int, size: int) -> None:
        """Send the head of one part."""
        self.give(memoryview(_HEAD.pack(number, size)))

    def _order(self, descriptor: int, order: Order) -> None:
        self.give_descriptor(descriptor)
        self.give(memoryview(order.encode()))

    def give_message(self, message: bytes) -> None:
        """Send bytes with their length before them."""
        self.give(memoryview(_LENGTH.pack(len(message)) + message))

    def take_message(self) -> bytes:
        """Receive what ``give_message`` sent."""
        (size,) = _LENGTH.unpack(self.take(_LENGTH.size))
        if size > _MAX_MESSAGE_BYTES:
            raise TransferError(f"a message of {size} bytes came")
        return self.take(size)

    def give_descriptor(self, descriptor: int) -> None:
        """Pass an open file to the other process."""
        try:
            self._limit(socket.SO_SNDTIMEO, "a file could not be passed on")
            socket.send_fds(self._socket, [b"\0"], [descriptor])
        except OSError as error:
            raise TransferError(f"passing on a file: {error}") from None

    def take_descriptor(self) -> int:
        """Receive the file of ``give_descriptor``; the caller closes it."""
        try:
            self._limit(socket.SO_RCVTIMEO, "a file did not come")
            _, found, _, _ = socket.recv_fds(self._socket, 1, 1)
        except OSError as error:
            raise TransferError(f"receiving a file: {error}") from None
        if len(found) != 1:
            raise TransferError("the sender closed the connection")
        os.set_inheritable(found[0], False)
        return found[0]

    def _fill(self, data: memoryview) -> None:
        try:
            while data:
                self._limit(socket.SO_RCVTIMEO, "not all came")
                with contextlib.suppress(BlockingIOError):
                    size = self._socket.recv_into(data[:_CHUNK_BYTES], flags=socket.MSG_WAITALL)
                    if size == 0:
                        raise TransferError("the sender closed the connection")
                    data = data[size:]
        except OSError as error:
            raise TransferError(f"receiving: {error}") from None

    def _limit(self, option: int, what: str) -> None:
        """Have the kernel end the next call at the deadline (with ``BlockingIOError``)."""
        left_s = _left_s(self._deadline_s, what)
        whole_s = int(left_s)
        # Zero would mean no limit.
        rest_us = max(1, int((left_s - whole_s) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(whole_s, rest_us))

    def close(self) -> None:
        """Close; a thread that waits on either side gets an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _relayed(connection: socket.socket, route: str) -> None:
    """Have the hatch relay to ``NODE:NAME``. Raises ConnectionError with its reason."""
    node, _, name = route.partition(":")
    connection.sendall(f"{node} {name}\n".encode())
    line = b""
    # A hatch sends no more than this line before it is sent more.
    while not line.endswith(b"\n") and len(line) <= _MAX_LINE_BYTES:
        data = connection.recv(_MAX_LINE_BYTES)
        if not data:
            raise ConnectionError("this node's hatch closed the connection")
        line += data
    if line != b"ok\n":
        raise ConnectionError(line.decode(errors="replace").strip().removeprefix("no "))


def _left_s(deadline_s: float, what: str) -> float:
    """Seconds to the deadline (monotonic clock). Raises TransferError past it."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TransferError(f"{what} within the deadline")
    return left_s
