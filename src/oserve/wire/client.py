"""A whole request and its whole answer, for calls between OServe's processes."""

import asyncio

from oserve.wire.framing import dechunk
from oserve.wire.response import ResponseHead
from oserve.wire.upstream import UpstreamConnection, UpstreamPool

_MAX_ANSWER_BYTES = 256 * 1024 * 1024


class _Collector:
    """Keeps the answer until it is whole; see ``Sink``."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._connection: UpstreamConnection | None = None
        self._head: ResponseHead | None = None
        self._parts: list[bytes] = []
        self._left_bytes = _MAX_ANSWER_BYTES

    @property
    def cancelled(self) -> bool:
        return self.answer.done()

    def attached(self, connection: UpstreamConnection) -> None:
        self._connection = connection

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_data(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self.drop()
            self.on_error(f"its answer is larger than {_MAX_ANSWER_BYTES} bytes")
            return
        self._parts.append(data)

    def on_end(self) -> None:
        head, body = self._head, b"".join(self._parts)
        if head is not None and not self.answer.done():
            self.answer.set_result((head.status, dechunk(body) if head.chunked else body))

    def on_error(self, reason: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionError(reason))

    def crashed(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def drop(self) -> None:
        """Give the request up."""
        if self._connection is not None:
            self._connection.abort()


async def post(
    pool: UpstreamPool, path: bytes, body: bytes, *, timeout_s: float | None
) -> tuple[int, bytes]:
    """Status and body of the answer to a POST of JSON.

    Raises ConnectionError if the server cannot be reached or breaks off, and TimeoutError.
    """
    collector = _Collector()
    head = b"POST %b HTTP/1.1\r\nhost: oserve\r\ncontent-type: application/json\r\n" % path
    pool.send(head + b"content-length: %d\r\n\r\n%b" % (len(body), body), collector)
    try:
        async with asyncio.timeout(timeout_s):
            return await collector.answer
    finally:
        if not collector.answer.done() or collector.answer.cancelled():
            collector.answer.cancel()
            collector.drop()
