"""A load client that costs little: bare sockets, whole answers counted, a closed or an open loop.

Every answer is checked: status 200 and, for a stream, ``[DONE]`` and the right number of chunks.
"""

import asyncio
import random
import re
import time
from dataclasses import dataclass, field
from typing import Protocol, cast

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


@dataclass(frozen=True)
class Ask:
    """A request, and what its answer must be. ``timed``: each chunk tells when it was written."""

    request: bytes
    stream: bool
    chunks: int
    timed: bool = False


def ask(
    port: int, *, stream: bool = False, chunks: int = 1, step_us: int = 0, timed: bool = False
) -> Ask:
    """A completion of so many chunks, one each ``step_us`` (0: as fast as the backend can)."""
    body = (
        b'{"model":"bench","prompt":"one two three four five six","max_tokens":%d,"stream":%b,'
        b'"ignore_eos":true,"step_us":%d}' % (chunks, b"true" if stream else b"false", step_us)
    )
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json"
        b"\r\ncontent-length: %d\r\n\r\n" % (port, len(body))
    )
    return Ask(head + body, stream, chunks, timed)


class Load(Protocol):
    """What connections work for."""

    result: Result

    def ready(self, connection: "Connection") -> None:
        """The connection is idle."""

    async def run(self) -> Result: ...


class Connection(asyncio.Protocol):
    """Sends one request at a time and checks its answer."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._ask = Ask(b"", stream=False, chunks=0)
        self._started_s = 0.0
        self._tail = b""
        self._parts: list[bytes] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._load.ready(self)

    def send(self, wanted: Ask, started_s: float) -> None:
        """Send a request whose latency counts from ``started_s`` on."""
        self._ask = wanted
        self._tail = b""
        self._parts = []
        self._started_s = started_s
        if self._transport is not None:
            self._transport.write(wanted.request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ask.timed:
            now_ns = time.monotonic_ns()
            stamps = _TIME.findall(data)
            self._load.result.chunk_s.extend((now_ns - int(stamp)) / 1e9 for stamp in stamps)
        self._parts.append(data)
        self._tail = (self._tail + data)[-400:]
        if self._tail.endswith(b"0\r\n\r\n" if self._ask.stream else b"}}"):
            self._finish()

    def _finish(self) -> None:
        result, wanted = self._load.result, self._ask
        whole = b"".join(self._parts)
        seen = whole.count(_TOKEN)
        if seen != wanted.chunks and wanted.stream:
            # A router may cut chunks anew, in the middle of the word that is counted.
            seen = dechunk(whole.partition(b"\r\n\r\n")[2]).count(_TOKEN)
        good = seen == wanted.chunks and (not wanted.stream or b"[DONE]" in self._tail)
        result.answers += good
        result.failed += not good
        result.chunks += seen
        result.answer_s.append(time.perf_counter() - self._started_s)
        self._load.ready(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


class ClosedLoad:
    """``total`` equal requests over ``connections``: each sends the next when one is answered."""

    def __init__(self, port: int, wanted: Ask, *, total: int, connections: int) -> None:
        self.result = Result()
        self._port = port
        self._ask = wanted
        self._left = total
        self._connections = connections

    def ready(self, connection: Connection) -> None:
        """The connection is idle."""
        self._left -= 1
        if self._left < 0:
            connection.close()
        else:
            connection.send(self._ask, time.perf_counter())

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()
        made = [
            (await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port))[1]
            for _ in range(self._connections)
        ]
        await asyncio.gather(*(connection.closed for connection in made))
        self.result.wall_s = time.perf_counter() - started_s
        return self.result


class SteadyLoad:
    """Requests drawn from ``mix``, arriving as a Poisson process whether or not others are done."""

    def __init__(
        self, port: int, mix: list[Ask], *, rate_per_s: float, seconds: float, seed: int = 1
    ) -> None:
        self.result = Result()
        self._port = port
        draw = random.Random(seed)
        self._arrivals: list[tuple[float, Ask]] = []
        at_s = draw.expovariate(rate_per_s)
        while at_s < seconds:
            self._arrivals.append((at_s, draw.choice(mix)))
            at_s += draw.expovariate(rate_per_s)
        self._idle: list[Connection] = []
        self._left = len(self._arrivals)
        self._made: set[asyncio.Task[object]] = set()
        self._waiting: list[tuple[Ask, float]] = []
        self._ended = asyncio.Event()

    def ready(self, connection: Connection) -> None:
        """The connection is idle."""
        self._idle.append(connection)
        self._left = len(self._arrivals) - self.result.answers - self.result.failed
        if not self._left:
            self._ended.set()
        elif self._waiting:
            self._idle.pop().send(*self._waiting.pop(0))

    def _arrive(self, wanted: Ask) -> None:
        now_s = time.perf_counter()
        if self._idle:
            self._idle.pop().send(wanted, now_s)
            return
        self._waiting.append((wanted, now_s))
        loop = asyncio.get_running_loop()
        made = loop.create_task(
            loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        )
        self._made.add(made)

    async def run(self) -> Result:
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()
        for at_s, wanted in self._arrivals:
            loop.call_later(at_s, self._arrive, wanted)
        await self._ended.wait()
        self.result.wall_s = time.perf_counter() - started_s
        await asyncio.gather(*self._made)
        for connection in self._idle:
            connection.close()
        await asyncio.gather(*(connection.closed for connection in self._idle))
        return self.result
