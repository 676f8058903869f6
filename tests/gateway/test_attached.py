"""Servers that others run, whatever they send: nothing is lost, leaked or believed for ever."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.conftest import Front, Make, table_of, table_replica, until
from oserve.control.dispatch.breaker import BreakerPolicy, Breakers
from oserve.core import Endpoint
from oserve.engines.attached import AttachedProbe
from oserve.engines.probe import Probe
from oserve.gateway.upstream_request import address_of
from oserve.sim import DIALECTS, EmulatedEngine, Mishap
from oserve.wire import Exchange

TEXT: dict[str, Any] = {"model": "emulated", "prompt": "hello there", "max_tokens": 5}
TLS = Path(__file__).parent / "tls"
DIALECT = {dialect.name: dialect for dialect in DIALECTS}


def statuses(front: Front) -> dict[str, float]:
    """Ended requests by status."""
    return {
        name: value[0]
        for name, value in front.gateway.runner.metrics.snapshot()["oserve_requests"].items()
    }


def first_tokens(front: Front) -> float:
    """How many first tokens were timed."""
    found = front.gateway.runner.metrics.snapshot()["oserve_time_to_first_token_seconds"]
    return sum(sum(values[:-1]) for values in found.values())


def attach(front: Front, **fields: Any) -> None:
    """Make the replicas attached ones, with more in their endpoints."""
    table = front.gateway.runner.table
    own = {name: fields.pop(name) for name in ("model", "stream_options") if name in fields}
    replicas = [
        replace(item, attached=True, endpoint=replace(item.endpoint, **fields), **own)
        for item in table.replicas
    ]
    front.gateway.runner.update(replace(table, replicas=tuple(replicas)))


async def test_virtual_hosts_paths_headers_and_keys(make_front: Make) -> None:
    engine = EmulatedEngine(dialect=DIALECT["torchserve"], api_key="secret")
    front = await make_front(engine)
    address = front.gateway.runner.table.replicas[0].endpoint.url.removeprefix("http://")
    engine.hosts = frozenset({address})
    url = f"http://{address}/predictions/emulated/1.0"
    mine = {"user-agent": "mine", "authorization": "Bearer client", "x-other": "1"}
    for path in (url, url + "/v1"):
        attach(front, url=path, api_key="secret", headers=(("X-Team", "a b"), ("User-Agent", "us")))
        assert (await front.post("/v1/completions?x=1", TEXT, headers=mine))[0] == 200
    route, head = engine.heads[-1]
    assert route == b"/predictions/emulated/1.0/v1/completions"
    assert head[b"host"] == address.encode()
    assert (head[b"x-team"], head[b"user-agent"]) == (b"a b", b"us")
    assert head[b"authorization"] == b"Bearer secret"
    assert b"x-other" not in head


@pytest.mark.parametrize("status", [401, 403, 404, 405, 429, 500, 503])
@pytest.mark.parametrize("streams", [False, True])
async def test_one_that_fails_at_once_draws_little(
    make_front: Make, status: int, streams: bool
) -> None:
    bad, good = EmulatedEngine(), EmulatedEngine()
    bad.status = status
    front = await make_front(bad, good)
    attach(front)
    # However long the test takes, the back-off is not over.
    front.gateway.runner.machine.fleet.breakers = Breakers(BreakerPolicy(first_s=1e6, most_s=1e6))
    for _ in range(30):
        if streams:
            lines = await front.lines("/v1/completions", {**TEXT, "stream": True})
            assert lines[-1] == b"data: [DONE]"
        else:
            got, headers, _ = await front.post("/v1/completions", TEXT)
            assert (got, headers["x-oserve-replica"]) == (200, "r1")
    assert 1 <= len(bad.seen) <= 3
    assert len(good.seen) == 30
    assert statuses(front) == {"completed": 30.0}
    assert (
        front.gateway.runner.machine.fleet.breakers.report(0.0)["r0"][0]
        == f"it answered with status {status}"
    )
    # It is tried again when its time has come, and trusted again when it answers.
    bad.status = 0
    front.gateway.runner.machine.fleet.breakers = Breakers(BreakerPolicy(first_s=0.0))
    front.gateway.runner.machine.fleet.breakers.failed("r0", 0.0, "x", at_once=True)
    answered = {
        (await front.post("/v1/completions", TEXT))[1]["x-oserve-replica"] for _ in range(4)
    }
    assert "r0" in answered
    assert front.gateway.runner.machine.fleet.breakers.report(0.0) == {}


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [(401, 502, "replica_failed"), (404, 502, "replica_failed"), (429, 429, 429), (500, 500, 500)],
)
async def test_with_nobody_else_it_is_asked_all_the_same(
    make_front: Make, status: int, told: int, code: object
) -> None:
    engine = EmulatedEngine()
    engine.status, engine.extra = status, ((b"retry-after", b"7"),)
    front = await make_front(engine)
    attach(front)
    for number in range(5):
        got, headers, body = await front.post("/v1/completions", TEXT)
        assert (got, body["error"]["code"]) == (told, code)
        assert len(engine.seen) == number + 1
        if status == 429:
            assert headers["retry-after"] == "7"
    engine.status = 0
    assert (await front.post("/v1/completions", TEXT))[0] == 200


async def test_an_engine_of_ours_refuses_what_all_would(make_front: Make) -> None:
    """A 404 of an own engine is the client's to hear, and no reason to leave the engine alone."""
    front = await make_front(EmulatedEngine(), EmulatedEngine())
    for engine in front.engines:
        engine.status = 404
    for _ in range(4):
        assert (await front.post("/v1/completions", TEXT))[0] == 404
    assert sum(len(engine.seen) for engine in front.engines) == 4


async def test_a_server_that_is_down_costs_one_try(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    front.gateway.runner.machine.fleet.breakers = Breakers(BreakerPolicy(first_s=1e6, most_s=1e6))
    table = front.gateway.runner.table
    down = table_replica("a", "http://127.0.0.1:1", attached=True)
    front.gateway.runner.update(table_of(down, *table.replicas))
    for _ in range(10):
        assert (await front.post("/v1/completions", TEXT))[1]["x-oserve-replica"] == "r0"
    retried = front.gateway.runner.metrics.snapshot()["oserve_requests_retried"]
    assert retried == {"a": [1.0]}


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
async def test_one_without_stream_options_is_asked_without(
    make_front: Make, options: dict[str, bool] | None
) -> None:
    engine = EmulatedEngine(dialect=DIALECT["sse-starlette"])
    front = await make_front(engine)
    attach(front)
    body = {**TEXT, "stream": True} | ({} if options is None else {"stream_options": options})
    for _ in range(3):
        lines = await front.lines("/v1/completions", body)
        assert lines[-1] == b"data: [DONE]"
    assert ["stream_options" in seen for seen in engine.seen] == [True, False, False, False]
    assert statuses(front) == {"completed": 3.0}
    # One of which the plan says so is never asked with them.
    engine = EmulatedEngine(dialect=DIALECT["sse-starlette"])
    front = await make_front(engine)
    attach(front, stream_options=False)
    await front.lines("/v1/completions", body)
    assert ["stream_options" in seen for seen in engine.seen] == [False]


async def test_requests_under_way_are_asked_without_stream_options_as_well(
    make_front: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EmulatedEngine()
    held: list[Exchange] = []
    generate = engine._generate

    def hold(exchange: Exchange, *, chat: bool) -> None:
        held.append(exchange)

    monkeypatch.setattr(engine, "_generate", hold)
    front = await make_front(engine)
    attach(front)
    body = {**TEXT, "stream": True}
    calls = [asyncio.ensure_future(front.lines("/v1/completions", body)) for _ in range(3)]
    await until(lambda: len(held) == 3)
    monkeypatch.setattr(engine, "_generate", generate)
    refusal = b'{"error": {"message": "stream_options: unknown"}}'
    for exchange in held:
        exchange.respond(400, refusal)
    for call in calls:
        assert (await call)[-1] == b"data: [DONE]"
    assert statuses(front) == {"completed": 3.0}
    assert ["stream_options" in seen for seen in engine.seen] == [False] * 3
    # One that was asked without them and still speaks of them is believed.
    monkeypatch.setattr(engine, "_generate", hold)
    refused = asyncio.ensure_future(front.post("/v1/completions", body))
    await until(lambda: len(held) == 4)
    held[-1].respond(400, refusal)
    assert (await refused)[0] == 400


async def test_options_that_make_no_sense_teach_nothing(make_front: Make) -> None:
    engine = EmulatedEngine(dialect=DIALECT["sse-starlette"])
    front = await make_front(engine)
    attach(front)
    odd = {**TEXT, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert (await front.post("/v1/completions", odd))[0] == 400
    assert len(engine.seen) == 1


async def test_tokenize_is_renamed(make_front: Make) -> None:
    engine = EmulatedEngine(model="theirs")
    front = await make_front(engine)
    attach(front, model="theirs")
    for body in ({"model": "emulated", "prompt": "a b c"}, {"prompt": "a b c"}):
        status, _, answer = await front.post("/tokenize", body)
        assert (status, answer["count"]) == (200, 3)
    # A server without that route is no worse a server.
    bare = EmulatedEngine(dialect=DIALECT["tgi"])
    port = await bare.start()
    front.engines.append(bare)
    table = front.gateway.runner.table
    other = table_replica("a", f"http://127.0.0.1:{port}", attached=True)
    front.gateway.runner.update(table_of(other, *table.replicas))
    assert (await front.post("/tokenize", {"prompt": "a b"}))[0] == 200
    assert front.gateway.runner.machine.fleet.breakers.report(0.0) == {}
    front.gateway.runner.update(table_of(other))
    assert (await front.post("/tokenize", {"prompt": "a b"}))[0] == 404


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("dialect", ["vllm", "sse-starlette", "tgi", "odd chunks"])
async def test_an_error_event_that_blames_the_request_is_the_clients(
    make_front: Make, after: int, dialect: str
) -> None:
    engines = [EmulatedEngine(dialect=DIALECT[dialect]) for _ in range(2)]
    front = await make_front(*engines)
    attach(front, stream_options=False)
    for engine in engines:
        engine.mishaps.append(Mishap(after=after, how="refuse"))
    lines = await front.lines("/v1/completions", {**TEXT, "stream": True})
    assert lines[-1] == b"data: [DONE]"
    assert b"logprobs is too large" in b"".join(lines)
    assert sum(len(engine.seen) for engine in engines) == 1
    assert statuses(front) == {"client_error": 1.0}
    assert front.gateway.runner.metrics.snapshot()["oserve_requests_moved"] == {}


@pytest.mark.parametrize("dialect", ["vllm", "sse-starlette", "tgi", "no chunks"])
async def test_an_error_event_that_blames_the_server_is_tried_elsewhere(
    make_front: Make, dialect: str
) -> None:
    engines = [EmulatedEngine(dialect=DIALECT[dialect]) for _ in range(2)]
    front = await make_front(*engines, returns_token_ids=False)
    attach(front, stream_options=False)
    engines[0].mishaps.append(Mishap(after=0, how="error"))
    lines = await front.lines("/v1/completions", {**TEXT, "stream": True})
    assert b"engine died" not in b"".join(lines)
    assert statuses(front) == {"completed": 1.0}
    for engine in engines:
        engine.mishaps.append(Mishap(after=2, how="error"))
    lines = await front.lines("/v1/completions", {**TEXT, "stream": True})
    assert b"engine died" in b"".join(lines)
    assert statuses(front) == {"completed": 1.0, "failed": 1.0}


WHOLE = b'{"choices":[{"text":"hi","finish_reason":"stop"}],"usage": {"completion_tokens" : 3}}'
EVENTS = b'data: {"choices":[{"text":"hi"}]}\n\ndata: [DONE]\n\n'


def sized(head: bytes, body: bytes) -> bytes:
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


RawFront = Callable[[bytes], Awaitable[Front]]


@pytest.fixture
async def raw_front(make_front: Make) -> AsyncIterator[RawFront]:
    """Gateways before servers that say the same bytes to everything."""
    servers: list[asyncio.Server] = []

    async def make(answer: bytes) -> Front:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(answer)
            writer.close()

        servers.append(await asyncio.start_server(talk, "127.0.0.1", 0))
        port = servers[-1].sockets[0].getsockname()[1]
        front = await make_front()
        front.gateway.runner.update(
            table_of(table_replica("raw", f"http://127.0.0.1:{port}", attached=True))
        )
        return front

    yield make
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 \r\n",
        b"HTTP/1.1 200\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 O K \xe9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type:application/json\r\nX-Empty:\r\n",
    ],
)
async def test_heads_that_are_legal_if_odd(raw_front: RawFront, head: bytes) -> None:
    front = await raw_front(sized(head, WHOLE))
    status, headers, body = await front.post("/v1/completions", TEXT)
    assert status == 200
    assert body == json.loads(WHOLE)
    assert "connection" not in headers or headers["connection"] != "close"
    made = front.gateway.runner.metrics.snapshot()["oserve_output_tokens"]
    assert made == {"short": [3.0]}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 +200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\nset-cookie: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE[:-3],
        b"x" * 70_000,
    ],
)
async def test_answers_that_are_broken_are_told_as_such(raw_front: RawFront, answer: bytes) -> None:
    front = await raw_front(answer)
    for streams in (False, True):
        status, _, body = await front.post("/v1/completions", {**TEXT, "stream": streams})
        assert (status, body["error"]["code"]) == (502, "replica_failed")
    assert front.gateway.runner.outstanding()["raw"] == (0.0, 0)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"content-type: text/event-stream\r\n", "text/event-stream"),
        (b"content-type: Text/Event-Stream;charset=utf-8\r\n", "Text/Event-Stream;charset=utf-8"),
        (b"", "text/event-stream; charset=utf-8"),
        (b"content-type: application/json\r\n", "text/event-stream; charset=utf-8"),
    ],
)
async def test_streams_of_any_content_type(raw_front: RawFront, head: bytes, kind: str) -> None:
    for answer in (
        b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + EVENTS,
        sized(b"HTTP/1.1 200 OK\r\n" + head, EVENTS),
    ):
        front = await raw_front(answer)
        async with front.session.post(
            front.url + "/v1/completions", json={**TEXT, "stream": True}
        ) as got:
            assert await got.read() == EVENTS
            assert got.headers["content-type"] == kind
        assert statuses(front) == {"completed": 1.0}


async def test_a_whole_answer_to_a_request_for_a_stream_passes_whole(raw_front: RawFront) -> None:
    front = await raw_front(sized(b"HTTP/1.1 200 OK\r\n", WHOLE))
    status, _, body = await front.post("/v1/completions", {**TEXT, "stream": True})
    assert (status, body) == (200, json.loads(WHOLE))
    assert first_tokens(front) == 1


@pytest.mark.parametrize("status", [400, 500])
async def test_an_error_that_comes_whole_is_no_first_token(
    raw_front: RawFront, status: int
) -> None:
    front = await raw_front(sized(b"HTTP/1.1 %d No\r\n" % status, b"{}"))
    assert (await front.post("/v1/completions", {**TEXT, "stream": True}))[0] == status
    assert first_tokens(front) == 0


async def test_an_answer_that_no_client_saw_begin_is_no_first_token(raw_front: RawFront) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"
    front = await raw_front(head)
    table = front.gateway.runner.table
    front.gateway.runner.update(replace(table, expected=True))
    call = asyncio.ensure_future(front.post("/v1/completions", {**TEXT, "stream": True}))
    # It waits for a replica that is expected.
    await until(lambda: front.gateway.runner.queued)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    await until(lambda: statuses(front))
    assert statuses(front) == {"disconnected": 1.0}
    assert first_tokens(front) == 0


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (b"", b""),
        (b": ping\n\n", b""),
        (b'data: {"choices":[{"text":"hi"}]}\n\n', b"hi"),
        (b'data: {"choices":[{"text":"hi"}]}\n\ndata: {"choi', b"hi"),
    ],
)
async def test_a_stream_that_stops_short_is_told_as_such(
    raw_front: RawFront, events: bytes, text: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    front = await raw_front(head + events)
    async with front.session.post(
        front.url + "/v1/completions", json={**TEXT, "stream": True}
    ) as got:
        body = await got.read()
    assert text in body
    assert b"[DONE]" not in body
    assert b"replica_failed" in body
    assert statuses(front) == {"failed": 1.0}


@pytest.mark.parametrize(
    ("kind", "flood"),
    [(b"", b" \n" * 1_000_000), (b"content-type: text/event-stream\r\n", b": ping\n\n" * 200_000)],
)
async def test_what_comes_before_an_answer_has_a_bound(
    raw_front: RawFront, kind: bytes, flood: bytes
) -> None:
    front = await raw_front(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n" + flood + EVENTS)
    status, _, body = await front.post("/v1/completions", {**TEXT, "stream": True})
    assert (status, body["error"]["code"]) == (502, "replica_failed")
    assert "sends nothing but" in body["error"]["message"]
    assert front.gateway.runner.outstanding()["raw"] == (0.0, 0)


async def test_the_last_event_may_lack_its_empty_line(raw_front: RawFront) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    front = await raw_front(head + EVENTS.rstrip())
    assert (await front.lines("/v1/completions", {**TEXT, "stream": True}))[-1] == b"data: [DONE]"


def test_endpoints_of_all_kinds_have_an_address() -> None:
    for url, host, port, authority, prefix in (
        ("http://h", "h", 80, b"h", b""),
        ("https://h/v1", "h", 443, b"h", b""),
        ("http://h:81/a/v1", "h", 81, b"h:81", b"/a"),
        ("http://[::1]:82/a/b", "::1", 82, b"[::1]:82", b"/a/b"),
    ):
        found = address_of(Endpoint(url=url))
        assert (found.host, found.port, found.authority, found.prefix) == (
            host,
            port,
            authority,
            prefix,
        )
        assert found.tls is url.startswith("https")


async def test_https_with_an_authority_of_its_own(make_front: Make) -> None:
    """An HTTPS server in front of an engine: known authorities only, by its own name."""
    engine = EmulatedEngine()
    front = await make_front(engine)
    plain = int(front.gateway.runner.table.replicas[0].endpoint.url.rpartition(":")[2])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")

    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
        writer.transport.abort()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection("127.0.0.1", plain)
        await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    for host, ca_file, status in (
        ("127.0.0.1", str(TLS / "cert.pem"), 200),
        ("localhost", str(TLS / "cert.pem"), 200),
        ("127.0.0.1", "", 502),
    ):
        url = f"https://{host}:{port}"
        attach(front, url=url, ca_file=ca_file)
        got, _, body = await front.post("/v1/completions", TEXT)
        assert got == status, body
        async with Probe(Endpoint(url=url, ca_file=ca_file), timeout_s=30) as probe:
            found = await AttachedProbe(
                probe, Endpoint(url=url, ca_file=ca_file), "emulated"
            ).whole()
        assert bool(found.trouble) is (status != 200)
    assert "certificate" in body["error"]["message"].lower()
    server.close()
    for writer in writers:
        writer.transport.abort()
