"""The ways between a gateway process and the hub, as the process has them.

Beside the server a process connects to the hub's socket. On another node the hub calls the process,
through the node's hatch: so the server needs no port, and nothing but the token of the node. Then
both send lines: a number, a space, a message. An answer has the number of its question.
"""

import asyncio
import contextlib
import itertools
from typing import Final, Protocol

from oserve.gateway.process.messages import MESSAGE_PATH
from oserve.wire import UpstreamPool
from oserve.wire.client import post

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
"""The longest message: a table of a large cluster is a few MiB."""


class HubLine(Protocol):
    """A way to the hub."""

    async def ask(self, message: bytes, limit_s: float | None) -> bytes:
        """The hub's answer. Raises OSError (ConnectionError, TimeoutError) if there is none."""
        ...

    async def close(self) -> None:
        """Ask no more."""
        ...


class SocketLine:
    """Connects to the hub's Unix socket; see ``HubLine``."""

    def __init__(self, unix_socket: str) -> None:
        self._pool = UpstreamPool(unix_socket=unix_socket)

    async def ask(self, message: bytes, limit_s: float | None) -> bytes:
        """See ``HubLine.ask``."""
        _, body = await post(self._pool, MESSAGE_PATH, message, timeout_s=limit_s)
        return body

    async def close(self) -> None:
        """See ``HubLine.close``."""
        self._pool.close_idle()


class CalledLine:
    """Waits for the hub's call; a new call takes the place of the one before. See ``HubLine``."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = itertools.count(1)

    async def listen(self, unix_socket: str) -> None:
        """Wait for calls there."""
        self._server = await asyncio.start_unix_server(
            self._called, unix_socket, limit=MAX_LINE_BYTES
        )

    async def ask(self, message: bytes, limit_s: float | None) -> bytes:
        """See ``HubLine.ask``. A hub that is late is hung up on, so that it calls again."""
        writer = self._writer
        # uvloop raises RuntimeError for a write to a connection that has been aborted.
        if writer is None or writer.is_closing():
            raise ConnectionError("the hub has not called")
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            writer.write(framed(number, message))
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            writer.transport.abort()
            raise
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """See ``HubLine.close``."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.transport.abort()

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._hung_up()
        self._writer = writer
        # ValueError: a line without a number, or too long.
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                number, message = parted(line)
                answer = self._asked.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(message)
        if self._writer is writer:
            self._writer = None
            self._hung_up()
        writer.transport.abort()

    def _hung_up(self) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the hub has hung up"))


def framed(number: int, message: bytes) -> bytes:
    """A line; ``message`` is JSON in one line."""
    return b"%d %b\n" % (number, message)


def parted(line: bytes) -> tuple[int, bytes]:
    """Number and message of a line. Raises ValueError if it has none."""
    number, _, message = line.rstrip(b"\n").partition(b" ")
    return int(number), message
