"""TLS on a plain transport: what is written arrives, in order, whole, whoever ends first."""

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from hatches import IDENTITY, LIMIT_S
from oserve.nodes.hatch_identity import make_identity, serving_context
from oserve.wire.hatch import pinned_context
from oserve.wire.tls import TlsLayer


@dataclass
class Side(asyncio.Protocol):
    """The protocol above TLS; it pauses after each piece if ``slow``."""

    slow: bool = False
    got: bytearray = field(default_factory=bytearray)
    transport: Any = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    full: bool = False
    failure: OSError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        if self.slow:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.transport.resume_reading)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def failed(self, error: OSError) -> None:
        self.failure = error
        self.lost.set()


@pytest.fixture
async def joined() -> AsyncIterator[Callable[..., Any]]:
    """Joins a client and a server over a socket pair; their layers."""
    layers: list[TlsLayer] = []

    async def join(
        client: Side, server: Side, trusted: str = IDENTITY.certificate
    ) -> tuple[TlsLayer, TlsLayer]:
        loop = asyncio.get_running_loop()
        ends = socket.socketpair()
        near = TlsLayer(pinned_context(trusted), client, client.failed)
        far = TlsLayer(serving_context(IDENTITY), server, server.failed, server_side=True)
        layers.extend((near, far))
        for end, layer in zip(ends, (near, far), strict=True):
            end.setblocking(False)
            await loop.connect_accepted_socket(lambda layer=layer: layer, end)  # type: ignore[misc]
        async with asyncio.timeout(LIMIT_S):
            while not all(s.transport or s.failure for s in (client, server)):  # noqa: ASYNC110
                await asyncio.sleep(0)
        return near, far

    yield join
    for layer in layers:
        layer.abort()


async def until_lost(*sides: Side) -> None:
    async with asyncio.timeout(LIMIT_S):
        for side in sides:
            await side.lost.wait()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("ending", [0, 1])
async def test_all_that_was_written_before_the_end_arrives(
    joined: Callable[..., Any], slow: bool, ending: int
) -> None:
    sides = [Side(slow=slow), Side(slow=slow)]
    await joined(*sides)
    source = random.Random(0)
    sent = [bytearray(), bytearray()]
    for _ in range(200):
        for number, side in enumerate(sides):
            data = source.randbytes(source.choice([1, 300, 16_384, 20_000]))
            side.transport.write(data)
            sent[number] += data
        if source.random() < 0.2:
            await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT_S):
        while len(sides[ending].got) < len(sent[1 - ending]):  # noqa: ASYNC110
            await asyncio.sleep(0)
    # The other side may still be reading.
    sides[ending].transport.close()
    assert sides[ending].transport.is_closing()
    sides[ending].transport.write(b"too late")
    await until_lost(*sides)
    assert [side.got for side in sides] == sent[::-1]


async def test_a_reader_that_waits_fills_the_writer(joined: Callable[..., Any]) -> None:
    client, server = Side(), Side()
    await joined(client, server)
    client.transport.pause_reading()
    size = 0
    async with asyncio.timeout(LIMIT_S):
        while not server.full:
            server.transport.write(bytes(100_000))
            size += 100_000
            await asyncio.sleep(0)
        server.transport.close()
        for _ in range(20):
            await asyncio.sleep(0)
        # It does not see the end before it has read what comes before.
        assert not client.lost.is_set()
        client.transport.resume_reading()
        await client.lost.wait()
    assert len(client.got) == size


async def test_another_certificate_is_refused_before_the_protocol_hears_of_it(
    joined: Callable[..., Any],
) -> None:
    client, server = Side(), Side()
    await joined(client, server, trusted=make_identity("other").certificate)
    await until_lost(client)
    assert isinstance(client.failure, ssl.SSLCertVerificationError)
    assert client.transport is None
    async with asyncio.timeout(LIMIT_S):
        await server.lost.wait()
    assert not server.got


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n" * 20])
async def test_what_is_no_tls_fails(data: bytes) -> None:
    server = Side()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    layer = TlsLayer(serving_context(IDENTITY), server, server.failed, server_side=True)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: layer, theirs)
    ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
    await until_lost(server)
    assert isinstance(server.failure, OSError)
    assert server.transport is None
    ours.close()


async def test_a_connection_that_is_cut_ends_both(joined: Callable[..., Any]) -> None:
    client, server = Side(), Side()
    near, _ = await joined(client, server)
    client.transport.write(b"before")
    near.plain.close()  # without a word of TLS
    await until_lost(client, server)
    assert server.got == b"before"


async def test_records_that_are_broken_end_it(joined: Callable[..., Any]) -> None:
    client, server = Side(), Side()
    near, _ = await joined(client, server)
    near.plain.write(b"\x17\x03\x03\x00\x20" + bytes(32))
    await until_lost(client, server)
    assert not server.got
