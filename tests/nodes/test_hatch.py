"""The hatch: who is let in, to what, and what gets through."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hatches import IDENTITY, LIMIT_S, RunningHatch, opened, running_hatch
from oserve.core import HatchAddress
from oserve.nodes.hatch_identity import make_identity
from oserve.nodes.hatch_messages import (
    HatchLimits,
    HatchReport,
    ReportQuery,
    ask_hatch,
    tell_peers,
)
from oserve.wire.hatch import (
    HatchError,
    HatchRefusedError,
    answer_line,
    fetch_certificate,
    fingerprint_of,
    open_hatch,
    pinned_context,
)


@pytest.fixture
async def hatch(tmp_path: Path) -> AsyncIterator[RunningHatch]:
    async with running_hatch(tmp_path) as one:
        yield one


@contextlib.asynccontextmanager
async def listening(
    hatch: RunningHatch, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]
) -> AsyncIterator[str]:
    """A socket behind the hatch; its name."""
    name = "e-1/api.sock"
    server = await asyncio.start_unix_server(serve, str(hatch.listener(name)))  # type: ignore[arg-type]
    yield name
    server.close()


async def raw(hatch: RunningHatch) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TLS connection to the hatch, before the greeting."""
    context = pinned_context(hatch.address.certificate)
    return await asyncio.open_connection(
        hatch.address.host, hatch.address.port, ssl=context, server_hostname="h"
    )


async def refused(hatch: RunningHatch) -> dict[str, int]:
    report = await ask_hatch(hatch.address, ReportQuery(), timeout_s=LIMIT_S)
    assert isinstance(report, HatchReport)
    return report.refused


async def test_bytes_go_both_ways_and_ends_are_told(hatch: RunningHatch) -> None:
    heard = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first\n")  # as a keeper, which speaks before it is spoken to
        writer.write(await reader.readline())
        heard.set_result(await reader.read())
        writer.close()

    async with listening(hatch, serve) as name:
        reader, writer = await opened(hatch.address, name)
        assert await reader.readline() == b"first\n"
        writer.write(b"second\n")
        assert await reader.readline() == b"second\n"
        writer.write(b"third")
        writer.close()
        assert await heard == b"third"


async def test_all_that_was_sent_before_an_end_arrives(hatch: RunningHatch) -> None:
    data = bytes(range(256)) * 20_000

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()

    async with listening(hatch, serve) as name:
        reader, writer = await opened(hatch.address, name)
        assert await reader.read() == data
        writer.close()


async def test_a_slow_reader_stops_the_sender(hatch: RunningHatch) -> None:
    """No side holds more than its buffers, however much the other has."""
    whole = 32 << 20
    written = 0
    stuck = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        while written < whole:
            writer.write(bytes(1 << 20))
            written += 1 << 20
            draining = asyncio.ensure_future(writer.drain())
            if not (await asyncio.wait({draining}, timeout=0.2))[0]:
                stuck.set()
            await draining
        writer.close()

    async with listening(hatch, serve) as name:
        reader, writer = await opened(hatch.address, name)
        await asyncio.wait_for(stuck.wait(), LIMIT_S)
        assert written < whole
        got = 0
        while data := await reader.read(1 << 20):
            got += len(data)
        assert got == whole
        writer.close()


async def test_the_echo_answers_itself(hatch: RunningHatch) -> None:
    reader, writer = await opened(hatch.address, "echo")
    data = bytes(range(256)) * 8_000
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    writer.close()


async def test_a_wrong_token_and_a_replayed_line_are_cut_off(
    hatch: RunningHatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "oserve.hatch")
    stranger = replace(hatch.address, token="not it")
    with pytest.raises(HatchError, match="does not know the token"):
        await opened(stranger, "echo")
    # A line that was right on one connection is wrong on the next.
    reader, writer = await raw(hatch)
    line = answer_line(hatch.address.token, await reader.readline(), "echo")
    writer.write(line)
    assert await reader.readline() == b"ok\n"
    other_reader, other = await raw(hatch)
    await other_reader.readline()
    other.write(line)
    with contextlib.suppress(ConnectionResetError):
        assert await other_reader.read() == b""
    assert await refused(hatch) == {"wrong token, or a line of another connection": 2}
    assert "127.0.0.1: wrong token" in caplog.text
    assert hatch.address.token not in caplog.text
    writer.close()
    other.close()


async def test_a_stranger_in_the_place_of_the_hatch_is_not_spoken_to(hatch: RunningHatch) -> None:
    other = replace(hatch.address, certificate=make_identity("n").certificate)
    with pytest.raises(HatchError, match="another certificate"):
        await opened(other, "echo")
    with pytest.raises(HatchError, match="cannot be read"):
        await opened(replace(hatch.address, certificate="nonsense"), "echo")
    # Certificates by fingerprint, for those who have no other word of it.
    known = fingerprint_of(hatch.address.certificate)
    told = ":".join(known[n : n + 2] for n in range(0, 64, 2)).upper()
    found = await fetch_certificate("127.0.0.1", hatch.address.port, told, timeout_s=LIMIT_S)
    assert fingerprint_of(found) == known
    with pytest.raises(HatchError, match="another certificate"):
        await fetch_certificate("127.0.0.1", hatch.address.port, known[::-1], timeout_s=LIMIT_S)


NOWHERE = (
    "../keeper.sock",
    "e/../keeper.sock",
    "/etc/passwd",
    "e/api.sock/..",
    "e//api.sock",
    "./api.sock",
    "../api.sock",
    "e/f/api.sock",
    "e/w0.sock/",
    "e/wx.sock",
    "e/w.sock",
    "e/API.sock",
    "keeper.sock ",
    "",
    "hatch.json",
    "out.sock",
    "e/api.sock\0",
)


async def test_other_names_lead_nowhere(hatch: RunningHatch) -> None:
    for name in NOWHERE:
        with pytest.raises(HatchRefusedError, match="no such name"):
            await opened(hatch.address, name)
    assert await refused(hatch) == {"there is no such name": len(NOWHERE)}


async def test_a_name_without_a_listener_says_that_the_node_lives(hatch: RunningHatch) -> None:
    for name in ("gone-1/api.sock", "keeper.sock"):
        with pytest.raises(HatchRefusedError, match="nothing listens there"):
            await opened(hatch.address, name)
    assert await refused(hatch) == {}


async def test_what_is_no_hatch_or_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        address = HatchAddress(
            host="127.0.0.1", port=port, certificate=IDENTITY.certificate, token=IDENTITY.token
        )
        with pytest.raises(HatchError, match=r"no answer within 0\.05 s"):
            await open_hatch(address, "echo", timeout_s=0.05)
    with pytest.raises(HatchError, match="cannot be reached: Connection refused") as caught:
        await opened(address, "echo")
    assert str(port) not in str(caught.value)


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), LIMIT_S)


async def test_silent_clients_are_cut_off(tmp_path: Path) -> None:
    async with running_hatch(tmp_path, HatchLimits(answer_s=0.2)) as hatch:
        # One that says nothing at all, and one in the middle of TLS.
        silent, plain = await asyncio.open_connection("127.0.0.1", hatch.address.port)
        halting, begun = await asyncio.open_connection("127.0.0.1", hatch.address.port)
        begun.write(b"\x16\x03")
        for reader in (silent, halting):
            await ended(reader)
        for writer in (plain, begun):
            writer.close()
        assert hatch.hatch._admission.refused == {"it was silent for too long": 2}


async def test_nonsense_is_cut_off(hatch: RunningHatch) -> None:
    talker, talking = await raw(hatch)
    talking.write(b"x" * 4096)
    stranger, speaking = await asyncio.open_connection("127.0.0.1", hatch.address.port)
    speaking.write(b"GET / HTTP/1.1\r\n\r\n")
    eager, hurrying = await raw(hatch)
    line = answer_line(hatch.address.token, await eager.readline(), "echo")
    hurrying.write(line + b"more")
    for reader, writer in ((talker, talking), (stranger, speaking), (eager, hurrying)):
        await ended(reader)
        writer.close()
    assert await refused(hatch) == {
        "its line is too long": 1,
        "no TLS, or the certificate was not accepted": 1,
        "it did not wait for the answer": 1,
    }


async def test_a_flood_of_greetings_keeps_nobody_out(tmp_path: Path) -> None:
    limits = HatchLimits(greetings=8, refusals_per_s=1000, answer_s=LIMIT_S)
    async with running_hatch(tmp_path, limits) as hatch:
        flood = [await asyncio.open_connection("127.0.0.1", hatch.address.port) for _ in range(40)]
        reader, writer = await opened(hatch.address, "echo")
        writer.write(b"x\n")
        assert await reader.readline() == b"x\n"
        found = await refused(hatch)
        assert set(found) == {"too many greetings at once"}
        assert found.popitem()[1] >= 32
        for _, one in flood:
            one.close()
        writer.close()


async def test_one_that_is_cut_off_in_the_middle_of_tls_is_closed(tmp_path: Path) -> None:
    async with running_hatch(tmp_path, HatchLimits(greetings=1, answer_s=LIMIT_S)) as hatch:
        halting, begun = await asyncio.open_connection("127.0.0.1", hatch.address.port)
        begun.write(b"\x16\x03")
        # It waits behind the first byte of the other, and then takes its place.
        _, writer = await opened(hatch.address, "echo")
        await ended(halting)
        writer.close()
        begun.close()


async def test_an_address_that_is_refused_too_often_is_not_heard(tmp_path: Path) -> None:
    async with running_hatch(tmp_path, HatchLimits(refusals_per_s=3, answer_s=LIMIT_S)) as hatch:
        # Until the second is over, which the loop's clock tells.
        hatch.hatch._loop = _Frozen(hatch.hatch._loop)  # type: ignore[assignment]
        stranger = replace(hatch.address, token="not it")
        for _ in range(3):
            with pytest.raises(HatchError, match="token"):
                await opened(stranger, "echo")
        with pytest.raises(HatchError):
            await opened(hatch.address, "echo")
        hatch.hatch._loop.at_s += 1.0  # type: ignore[attr-defined]
        _, writer = await opened(hatch.address, "echo")
        writer.close()


class _Frozen:
    """An event loop whose clock stands still."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.at_s = loop.time()

    def time(self) -> float:
        return self.at_s

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


async def test_too_many_connections_are_told(tmp_path: Path) -> None:
    async with running_hatch(tmp_path, HatchLimits(connections=2, answer_s=LIMIT_S)) as hatch:
        held = [await opened(hatch.address, "echo") for _ in range(2)]
        with pytest.raises(HatchRefusedError, match="too many connections"):
            await opened(hatch.address, "echo")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        # The hatch learns of the end soon, not at once.
        async with asyncio.timeout(LIMIT_S):
            while True:
                with contextlib.suppress(HatchRefusedError):
                    _, writer = await opened(hatch.address, "echo")
                    break
        writer.close()


async def test_control_lines(hatch: RunningHatch) -> None:
    await tell_peers(hatch.address, {"other": hatch.address}, timeout_s=LIMIT_S)
    reply = await ask_hatch(hatch.address, ReportQuery(), timeout_s=LIMIT_S)
    assert isinstance(reply, HatchReport)
    assert (reply.node, reply.open, reply.refused) == (hatch.folder.name, 1, {})
    reader, writer = await opened(hatch.address, "hatch-control")
    writer.write(b'{"type":"Unknown"}\n{"type":"Peers","peers":{"a b":{}}}\n')
    for _ in range(2):
        assert b'"type":"Rejected"' in await reader.readline()
    writer.close()


async def test_old_tls_is_refused(hatch: RunningHatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", hatch.address.port, ssl=context)
