"""Between the two processes of a hatch: connections one way, counts and refusals the other.

A socket pair that keeps messages whole. The second process ends with the first, and the first when
the second is gone: whoever holds the hatch starts both again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

import msgspec

_log = logging.getLogger("oserve.hatch")

_MAX_MESSAGE_BYTES: Final = 128 * 1024


class BulkCounts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Totals of the second process. Bytes by node, of connections opened to that node."""

    open: int = 0
    accepted: int = 0
    sent_bytes: dict[str, int] = {}
    received_bytes: dict[str, int] = {}


class BulkRefusal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The second process has refused a connection."""

    peer: str
    reason: str


_EVENTS: Final = msgspec.json.Decoder(BulkCounts | BulkRefusal)


class FarEnd:
    """The second process's end of the channel; calls block, from any thread."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def next(self) -> tuple[socket.socket, str] | None:
        """The next connection and the address of its caller; ``None`` at the end."""
        while True:
            data, files = b"", list[int]()
            # A process that was killed leaves a reset, not an end.
            with contextlib.suppress(ConnectionError):
                data, files, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE_BYTES, 1)
            if not data:
                return None
            if len(files) == 1:
                return socket.socket(fileno=files[0]), data.decode(errors="replace")

    def tell(self, event: BulkCounts | BulkRefusal) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._channel.send(msgspec.json.encode(event))


class NearEnd:
    """The first process's end; calls never block.

    ``refused`` is told refusals, with address and reason; ``lost``: the second process is gone.
    """

    def __init__(
        self,
        channel: socket.socket,
        loop: asyncio.AbstractEventLoop,
        refused: Callable[[str, str], None],
        lost: Callable[[], None],
    ) -> None:
        self.counts = BulkCounts()
        self._channel = channel
        self._loop = loop
        self._refused = refused
        self._lost = lost
        channel.setblocking(False)
        loop.add_reader(channel.fileno(), self._readable)

    def pass_on(self, connection: socket.socket, peer: str) -> bool:
        """Hand a connection over; whether the other process can take it now."""
        try:
            socket.send_fds(self._channel, [peer.encode()], [connection.fileno()])
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the second process."""
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()

    def _readable(self) -> None:
        try:
            data = self._channel.recv(_MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._channel.fileno())
            self._lost()
            return
        match _EVENTS.decode(data):
            case BulkCounts() as counts:
                self.counts = counts
            case BulkRefusal(peer=peer, reason=reason):
                self._refused(peer, reason)


def fork_with_channel(run: Callable[[FarEnd], None]) -> socket.socket:
    """Fork a process that does ``run`` and ends; the channel to it. Call before any thread."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        far.close()
        return near
    near.close()
    # Whoever holds the hatch signals the first process; this one ends with the channel.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    status = 1
    try:
        run(FarEnd(far))
        status = 0
    except Exception:  # no caller is above a forked process
        _log.exception("the relay of weights failed")
    finally:
        os._exit(status)
