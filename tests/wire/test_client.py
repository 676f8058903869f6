"""Whole answers over a Unix socket, from wire's own server."""

import asyncio
from pathlib import Path

import pytest

from oserve.wire import Exchange, ServerLimits, UpstreamPool, serve
from oserve.wire.client import post
from oserve.wire.framing import LAST_CHUNK, chunk
from oserve.wire.server import HttpServer

CHUNKED = ((b"transfer-encoding", b"chunked"),)


async def served(path: Path) -> HttpServer:
    """Echoes a body; in chunks, never, or not at all, as the path says."""

    def handle(exchange: Exchange) -> None:
        if exchange.path == b"/chunks":
            exchange.start(201, CHUNKED, chunk(exchange.body))
            exchange.write(chunk(exchange.body) + LAST_CHUNK)
            exchange.finish()
        elif exchange.path == b"/broken":
            exchange.abort()
        elif exchange.path != b"/never":
            exchange.respond(200, exchange.body)

    def refuse(exchange: Exchange, status: int, _message: str) -> None:
        exchange.respond(status, b"", close=True)

    return await serve(handle, refuse=refuse, limits=ServerLimits(), unix_socket=str(path))


async def test_answers_come_whole_over_one_connection(tmp_path: Path) -> None:
    server = await served(tmp_path / "s")
    pool = UpstreamPool(unix_socket=str(tmp_path / "s"))
    for number in range(3):
        body = b"%d" % number
        assert await post(pool, b"/", body, timeout_s=5.0) == (200, body)
        assert await post(pool, b"/chunks", body, timeout_s=None) == (201, body * 2)
    assert len(pool._all) == 1
    pool.close_idle()
    await server.close()


async def test_what_cannot_be_reached_or_breaks_off_is_a_connection_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="cannot connect"):
        await post(UpstreamPool(unix_socket=str(tmp_path / "none")), b"/", b"", timeout_s=5.0)
    server = await served(tmp_path / "s")
    pool = UpstreamPool(unix_socket=str(tmp_path / "s"))
    with pytest.raises(ConnectionError, match="broke"):
        await post(pool, b"/broken", b"", timeout_s=5.0)
    await server.close()


async def test_a_call_that_is_given_up_closes_its_connection(tmp_path: Path) -> None:
    server = await served(tmp_path / "s")
    pool = UpstreamPool(unix_socket=str(tmp_path / "s"))
    with pytest.raises(TimeoutError):
        await post(pool, b"/never", b"", timeout_s=0.01)
    call = asyncio.ensure_future(post(pool, b"/never", b"", timeout_s=None))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(50):
        await asyncio.sleep(0)
    assert not pool._idle
    await server.close()
