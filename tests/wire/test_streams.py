"""Requests byte by byte, beside uvicorn with either of its parsers: where ours differs is decided.

Two readers of one stream of bytes that disagree on where a request ends let one client speak for
another, so whatever is read in two ways is refused, and the connection closed.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from oserve.wire import Exchange, ServerLimits
from oserve.wire.connection import Connections, ServerConnection
from oserve.wire.head import origin_form
from oserve.wire.known import KnownHeads
from wire.streams import (
    AMBIGUOUS,
    CHUNKS,
    GET,
    NEXT,
    STREAMS,
    Heard,
    Made,
    Memory,
    get,
    heard,
    post,
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def ours(found: Heard, known: KnownHeads | None = None) -> asyncio.Protocol:
    def handle(exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0].decode()
        found.asked.append((exchange.method.decode(), path, exchange.body))
        exchange.respond(200, b"ok")

    def refuse(exchange: Exchange, status: int, message: str) -> None:
        exchange.respond(status, message.encode(), close=True)

    connections = Connections(handle, refuse, ServerLimits())
    if known is not None:
        connections.known = known
    return ServerConnection(connections)


def uvicorns(protocol: Any) -> Made:
    def make(found: Heard) -> asyncio.Protocol:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
            found.asked.append((scope["method"], scope["path"], body))
            headers = [(b"content-length", b"2")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"ok"})

        config = Config(app, log_config=None, access_log=False, ws="none", lifespan="off")
        config.load()
        loop = asyncio.get_running_loop()
        made: asyncio.Protocol = protocol(
            config=config, server_state=ServerState(), app_state={}, _loop=loop
        )
        return made

    return make


# What ours makes of it, and why that is better than what another makes of it.
_LF = "400, closed", "a line ends in CR LF; who reads on past a bare one sees other fields"
_LENGTH = "400, closed", "two readers may take it for two lengths"
_CODING = "501, closed", "a coding that is not undone here (RFC 9112, 6.1)"
_ESCAPED = "200", "only escapes of characters that need none are undone (RFC 3986, 2.3); 404 later"
_ABSOLUTE = "200", "the path is what counts, whatever the host (RFC 9112, 3.2.2)"
_FORM = "400, closed", "no form of a target that is served (RFC 9112, 3.2)"
_HOST = "400, closed", "exactly one valid Host field is a must (RFC 9112, 3.2)"
_ONE = "400, closed", "who else reads the request may take the other one"
_SP = "400, closed", "white space where there must be none"
_IGNORED = "200 200", "an upgrade is ignored (RFC 9110, 7.8), the body is still a body"

DECIDED: dict[str, tuple[str, str]] = {
    "an empty line first": ("200", "at least one should be ignored (RFC 9112, 2.2)"),
    "empty lines between": ("200 200", "at least one should be ignored (RFC 9112, 2.2)"),
    "expect without a body": ("200", "there is nothing to ask for"),
    "expect of HTTP/1.0": ("200, closed", "HTTP/1.0 has no interim answers"),
    "1.0 keep-alive": ("200 200, closed", "asked for, and framed by a length, it can stay open"),
    "1.0 chunked": ("400, closed", "faulty framing by RFC 9112, 6.1"),
    "1.2": ("400, closed", "there is no such version"),
    "2.0": ("505, closed", "another protocol"),
    "the preface of HTTP/2": ("400, closed", "another protocol"),
    "size with very many zeros": ("200", "it is 3, for everybody; the head's limit holds here too"),
    "space after the size": _SP,
    "a size of 68 bits": ("400, closed", "nobody waits for so much"),
    "bare LF at the end": _LF,
    "a trailer with a length": _LENGTH,
    "length, then coding": _LENGTH,
    "coding, then length": _LENGTH,
    "two equal lengths": _LENGTH,
    "a list of equal lengths": _LENGTH,
    "space before the name": _SP,
    "gzip, chunked": _CODING,
    "identity": _CODING,
    "identity, then chunked": _CODING,
    "a coding that looks like it": _CODING,
    "a quoted coding": _CODING,
    "a coding with a parameter": _CODING,
    "bare LF everywhere": _LF,
    "bare LF after a field": _LF,
    "bare LF at the end of the head": _LF,
    "bare CR at line ends": ("400, closed", "it is no line end"),
    "a control character in a value": ("400, closed", "not allowed (RFC 9110, 5.5)"),
    "a folded field": ("400, closed", "may be refused (RFC 9112, 5.2), and is read in two ways"),
    "a folded field at the end": ("400, closed", "may be refused (RFC 9112, 5.2)"),
    "two hosts": _HOST,
    "two equal hosts": _HOST,
    "no host": _HOST,
    "a host that is none": _HOST,
    "a host with a user": _HOST,
    "two authorizations": _ONE,
    "two content types": _ONE,
    "garbage behind a request": ("200 400, closed", "what was asked first is answered first"),
    "garbage behind a body": ("200 400, closed", "what was asked first is answered first"),
    "absolute": _ABSOLUTE,
    "absolute with a port": _ABSOLUTE,
    "absolute of https": _ABSOLUTE,
    "absolute in capitals": _ABSOLUTE,
    "absolute, another host": _ABSOLUTE,
    "absolute without a path": _ABSOLUTE,
    "absolute, query only": _ABSOLUTE,
    "absolute without a host": _FORM,
    "absolute with a user": _FORM,
    "absolute of ftp": _FORM,
    "authority": ("501, closed", "a proxy's method"),
    "get of a star": _FORM,
    "no slash": _FORM,
    "an escaped slash": _ESCAPED,
    "an escaped space": _ESCAPED,
    "an escaped line end": _ESCAPED,
    "an escaped NUL": _ESCAPED,
    "a fragment": _FORM,
    "two spaces": ("200", "method and target are the same for everybody"),
    "a target that is too long": ("431, closed", "a head has 32 KiB"),
    "too many fields": ("431, closed", "a head has 32 KiB"),
    "a value that is too long": ("431, closed", "a head has 32 KiB"),
    "a small method": ("400, closed", "methods are of capitals; there is no such one"),
    "an unknown method": ("400, closed", "to the parser it may be anything"),
    "h2c get": _IGNORED,
    "h2c post": _IGNORED,
    "h2c post in chunks": _IGNORED,
    "an upgrade to something else": _IGNORED,
    "h2c post, ambiguous": _LENGTH,
}


async def test_where_ours_differs_from_uvicorn_is_decided() -> None:
    made = [ours, uvicorns(H11Protocol), uvicorns(HttpToolsProtocol)]
    found = {name: [await heard(make, [data]) for make in made] for name, data in STREAMS.items()}
    differs = {name for name, (own, *others) in found.items() if any(own != it for it in others)}
    assert differs == set(DECIDED)
    assert {name: str(found[name][0]) for name in DECIDED} == {
        name: verdict for name, (verdict, _) in DECIDED.items()
    }


async def test_how_the_bytes_are_cut_makes_no_difference() -> None:
    for name, data in STREAMS.items():
        whole = await heard(ours, [data])
        bytewise = [data[at : at + 1] for at in range(len(data))]
        assert await heard(ours, bytewise) == whole, name


async def test_heads_that_were_read_before_make_no_difference() -> None:
    known = KnownHeads()
    cold = {name: await heard(ours, [data]) for name, data in STREAMS.items()}
    for _ in range(2):
        for name, data in STREAMS.items():
            assert await heard(lambda found: ours(found, known), [data]) == cold[name], name
    assert known.get(GET) is not None
    # A longer body than the head tells, a shorter one, and one that comes later.
    head = post(b"content-length: 3\r\n", b"")
    for pieces in (
        [head + b"abc"],
        [head + b"ab"],
        [head + b"abcd"],
        [head, b"abc"],
        [head + NEXT],
    ):
        for _ in range(2):
            warm = await heard(lambda found: ours(found, known), pieces)
            assert warm == await heard(ours, pieces)


@given(
    st.lists(st.sampled_from(sorted({**CHUNKS, **AMBIGUOUS, "": GET}.values())), max_size=4),
    st.lists(st.integers(0, 2000), max_size=6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_known_heads_never_change_where_a_request_ends(
    streams: list[bytes], marks: list[int]
) -> None:
    """Of streams run together, however cut, after each of them was read alone."""

    async def play() -> None:
        known = KnownHeads()
        for stream in streams:
            await heard(lambda found: ours(found, known), [stream])
        pieces = _cut(b"".join(streams), marks)
        assert await heard(lambda found: ours(found, known), pieces) == await heard(ours, pieces)

    asyncio.run(play())


def _cut(data: bytes, marks: Sequence[int]) -> list[bytes]:
    points = sorted({mark % (len(data) + 1) for mark in marks} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(points)]


@given(
    st.lists(st.sampled_from(sorted({**CHUNKS, **AMBIGUOUS}.values())), max_size=3),
    st.lists(st.integers(0, 2000), max_size=6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_behind_a_refusal_nothing_is_heard(streams: list[bytes], marks: list[int]) -> None:
    """Of streams run together, however cut, the answers are those of each, up to a refusal."""

    async def play() -> None:
        expected: list[int] = []
        for stream in streams:
            alone = await heard(ours, [stream])
            expected += alone.told
            if alone.closed or not alone.told:
                break
        got = await heard(ours, _cut(b"".join(streams), marks))
        assert got.told[: len(expected)] == expected
        assert all(status == 200 for status in got.told[:-1])

    asyncio.run(play())


@given(st.lists(st.binary(max_size=200), max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_answered_or_waited_for(pieces: list[bytes], after: bool) -> None:
    async def play() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, it: faults.append(it))
        found = await heard(ours, [GET, *pieces] if after else pieces)
        assert not faults
        assert all(status in {200, 400, 431, 501, 505} for status in found.told)
        assert found.closed is any(status >= 400 for status in found.told) or found.asked

    asyncio.run(play())


@given(st.binary(max_size=60))
def test_a_target_read_again_is_the_same(target: bytes) -> None:
    path = origin_form(target, b"GET")
    assert path == b"" or origin_form(path, b"GET") == path


async def test_what_a_handler_raises_ends_its_own_request() -> None:
    def broken(found: Heard) -> asyncio.Protocol:
        def handle(exchange: Exchange) -> None:
            found.asked.append(("", exchange.path.decode(), b""))
            if exchange.path == b"/next":
                exchange.respond(200, b"ok")
                return
            exchange.on_pause = exchange.on_disconnect = lambda *_: 1 / 0  # type: ignore[assignment]
            raise KeyError("secret")

        def refuse(exchange: Exchange, status: int, message: str) -> None:
            exchange.respond(status, message.encode())

        return ServerConnection(Connections(handle, refuse, ServerLimits()))

    found = await heard(broken, [GET + NEXT])
    assert found.told == [500, 200]


async def test_what_the_end_of_a_request_raises_is_told_to_the_log_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.disable(logging.NOTSET)
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, it: faults.append(it))

    def leaving(found: Heard) -> asyncio.Protocol:
        def handle(exchange: Exchange) -> None:
            nothing: dict[str, None] = {}
            exchange.on_disconnect = lambda: nothing["a user's text"]

        return ServerConnection(Connections(handle, lambda *_: None, ServerLimits()))

    await heard(leaving, [GET])
    assert not faults
    assert "KeyError" in caplog.text
    assert "a user's text" not in caplog.text


async def test_a_request_that_expects_is_asked_for_its_body_in_its_turn() -> None:
    """Never in the middle of the answer before it."""
    held: list[Exchange] = []

    def slow(found: Heard) -> asyncio.Protocol:
        def handle(exchange: Exchange) -> None:
            found.asked.append(("", exchange.path.decode(), exchange.body))
            if exchange.path == b"/next":
                held.append(exchange)
                exchange.start(200, ((b"transfer-encoding", b"chunked"),))
                asyncio.get_running_loop().call_later(0, exchange.finish)
            else:
                exchange.respond(201, b"ok")

        return ServerConnection(Connections(handle, lambda *_: None, ServerLimits()))

    expects = post(b"expect: 100-continue\r\ncontent-length: 3\r\n", b"")
    found = await heard(slow, [NEXT + expects, b"abc"])
    # The body came before it was asked for.
    assert found.told == [200, 201]
    found = await heard(slow, [NEXT + expects])
    assert found.told == [200, 100]


async def test_who_sends_much_and_reads_nothing_is_read_no_further() -> None:
    """Requests that wait for their turn are few, however small they are."""
    found = Heard()
    connection = ours(found)
    paused: list[bool] = []

    class Full(Memory):
        def pause_reading(self) -> None:
            paused.append(True)

        def resume_reading(self) -> None:
            paused.append(False)

        def write(self, data: Any) -> None:
            if not self.sent:
                connection.pause_writing()
            super().write(data)

    connection.connection_made(Full())
    connection.data_received(get() * 30)
    for _ in range(40):
        await asyncio.sleep(0)
    assert paused == [True] * 26
    assert len(found.asked) == 1
    connection.resume_writing()
    for _ in range(80):
        await asyncio.sleep(0)
    assert paused[-1] is False
    assert len(found.asked) == 30
    connection.connection_lost(None)
