"""A load client that costs little: closed loop on bare sockets, whole answers counted.

Every answer is checked: status 200 and, for a stream, ``[DONE]`` and the right number of chunks.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import cast

from oserve.wire import dechunk

_TIME = re.compile(rb'"t":(\d+),')
_TOKEN = b'"text":'


@dataclass
class Result:
    """Latencies in seconds: of whole answers, and of single chunks on their way."""

    answers: int = 0
    failed: int = 0
    chunks: int = 0
    wall_s: float = 0.0
    answer_s: list[float] = field(default_factory=list)
    chunk_s: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """Sends one request after another until told to stop."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._started_s = 0.0
        self._tail = b""
        self._parts: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        if not self._load.take():
            self._transport.close()
            return
        self._tail = b""
        self._parts = []
        self._started_s = time.perf_counter()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        load = self._load
        if load.timed:
            now_ns = time.monotonic_ns()
            stamps = _TIME.findall(data)
            load.result.chunk_s.extend((now_ns - int(stamp)) / 1e9 for stamp in stamps)
        self._parts.append(data)
        self._tail = (self._tail + data)[-400:]
        ended = self._tail.endswith(b"0\r\n\r\n") if load.stream else self._tail.endswith(b"}}")
        if ended:
            self._finish()

    def _finish(self) -> None:
        result = self._load.result
        whole = b"".join(self._parts)
        seen = whole.count(_TOKEN)
        if seen != self._load.chunks and self._load.stream:
            # A router may cut chunks anew, in the middle of the word that is counted.
            seen = dechunk(whole.partition(b"\r\n\r\n")[2]).count(_TOKEN)
        good = seen == self._load.chunks and (not self._load.stream or b"[DONE]" in self._tail)
        result.answers += good
        result.failed += not good
        result.chunks += seen
        result.answer_s.append(time.perf_counter() - self._started_s)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Load:
    """``total`` requests over ``connections``; ``chunks`` expected in each answer."""

    def __init__(
        self, port: int, *, total: int, stream: bool, chunks: int, step_us: int, timed: bool
    ) -> None:
        body = (
            b'{"model":"bench","prompt":"one two three four five six","max_tokens":%d,"stream":%b,'
            b'"ignore_eos":true,"step_us":%d}' % (chunks, b"true" if stream else b"false", step_us)
        )
        self.request = (
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json"
            b"\r\ncontent-length: %d\r\n\r\n" % (port, len(body)) + body
        )
        self.stream = stream
        self.chunks = chunks
        self.timed = timed
        self.result = Result()
        self._port = port
        self._left = total

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0

    async def run(self, connections: int) -> Result:
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()
        made = [
            (await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port))[1]
            for _ in range(connections)
        ]
        await asyncio.gather(*(connection.done for connection in made))
        self.result.wall_s = time.perf_counter() - started_s
        return self.result
