"""What HTTP clients do at the edges, and what becomes of refusals, as vLLM or the RFCs have it."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.conftest import Front, Make, until
from oserve.gateway.http.errors import bad_request, unavailable
from oserve.gateway.settings import GatewaySettings
from oserve.sim import EmulatedEngine, EngineSpeed
from oserve.wire import Exchange

TEXT = {"model": "emulated", "prompt": "hello there", "max_tokens": 3}
BODY = json.dumps(TEXT).encode()
FIELDS = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(BODY)


async def talk(front: Front, data: bytes, answers: int = 1) -> list[tuple[int, bytes]]:
    """Send raw bytes; status and body of so many answers, each of which has a length."""
    port = int(front.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    found = []
    for _ in range(answers):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        found.append((int(head[9:12]), await reader.readexactly(length)))
    writer.close()
    return found


def post(target: bytes, more: bytes = b"", host: bytes = b"x") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: %b\r\n" % (target, host) + FIELDS + more + b"\r\n" + BODY


async def test_an_upgrade_to_h2c_is_answered_once_in_http_1_1(make_front: Make) -> None:
    """As Java's HttpClient asks of every server it does not know."""
    front = await make_front(EmulatedEngine())
    wish = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    first, second = await talk(
        front, post(b"/v1/completions", wish) + post(b"/tokenize"), answers=2
    )
    assert first[0] == 200
    assert json.loads(first[1])["choices"][0]["text"] == " t1 t2 t3"
    assert json.loads(second[1])["count"] == 2


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/v1/completions", 200),
        (b"http://another:9/v1/completions?a=b", 200),
        (b"HTTPS://x/v1/completions", 200),
        (b"/v1/%63ompletions", 200),
        (b"/%761/completions?x", 200),
        (b"/v1%2Fcompletions", 404),
        (b"/v1/../v1/completions", 404),
        (b"ftp://x/v1/completions", 400),
        (b"/v1/completions#x", 400),
    ],
)
async def test_targets_of_every_form(make_front: Make, target: bytes, status: int) -> None:
    front = await make_front(EmulatedEngine())
    assert (await talk(front, post(target)))[0][0] == status


async def test_no_spelling_of_a_path_passes_the_guard(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(), api_keys=frozenset({"right"}))
    for target in (b"/v1/completions", b"/v1/%63ompletions", b"http://x/v1/completions"):
        assert (await talk(front, post(target)))[0][0] == 401


async def test_head_and_options(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    for path, allowed in (("/health", "GET, HEAD, OPTIONS"), ("/v1/completions", "POST, OPTIONS")):
        async with front.session.options(front.url + path) as answer:
            assert answer.status == 200
            assert answer.headers["allow"] == allowed
            assert await answer.read() == b""
    async with front.session.head(front.url + "/v1/models") as answer:
        assert answer.status == 200
        assert int(answer.headers["content-length"]) > 0
    async with front.session.head(front.url + "/v1/completions") as answer:
        assert answer.status == 405
        assert answer.headers["allow"] == "POST, OPTIONS"
    async with front.session.options(front.url + "/nowhere") as answer:
        assert answer.status == 404
    assert (await talk(front, b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n"))[0][0] == 200


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 400),
        ("text/plain", 400),
        ("multipart/form-data; boundary=x", 400),
        ("", 400),
    ],
)
async def test_a_body_is_json_or_refused_as_by_vllm(
    make_front: Make, given: str, status: int
) -> None:
    front = await make_front(EmulatedEngine())
    for path in ("/v1/completions", "/tokenize"):
        async with front.session.post(
            front.url + path, data=BODY, headers={"content-type": given}
        ) as answer:
            assert answer.status == status


async def test_no_name_is_the_model_that_is_there(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine, model="its-own")
    for name in ("", None, "emulated"):
        status, _, _ = await front.post("/v1/completions", {**TEXT, "model": name})
        assert status == 200
    assert [body["model"] for body in engine.seen] == ["its-own"] * 3
    assert (await front.post("/tokenize", {"model": "other", "prompt": "a"}))[0] == 404


class Listening(EmulatedEngine):
    """Keeps the headers of what it is asked, and tells its load where that is wished for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[bytes, bytes]] = []

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        self.asked.append(exchange.headers)
        load = ((b"endpoint-load-metrics", b"TEXT named_metrics.x=1"),)
        exchange.respond(200, b'{"choices":[],"usage":{"prompt_tokens":1}}', headers=load)
        del chat


async def test_which_headers_reach_an_engine(make_front: Make) -> None:
    engine = Listening()
    front = await make_front(engine)
    given = {
        "endpoint-load-metrics-format": "TEXT",
        "traceparent": "00-1-2-01",
        "x-session-id": "s",
        "x-data-parallel-rank": "1",
        "x-vllm-priority": "-100",
        "x-request-id": "mine",
        "cookie": "secret",
        "authorization": "Bearer client",
    }
    _, headers, _ = await front.post("/v1/completions", TEXT, headers=given)
    assert headers["endpoint-load-metrics"] == "TEXT named_metrics.x=1"
    (head,) = engine.asked
    passed = {"endpoint-load-metrics-format", "traceparent", "x-session-id", "x-request-id"}
    assert passed <= {name.decode() for name in head}
    assert not given.keys() - passed & {name.decode() for name in head}


async def test_a_priority_in_a_header_outdoes_that_in_the_body(make_front: Make) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.05))
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0)
    front = await make_front(engine, settings=settings, max_inflight=1)
    order: list[str] = []

    async def call(name: str, **headers: str) -> None:
        await front.post("/v1/completions", {**TEXT, "priority": 0}, headers=headers)
        order.append(name)

    calls = [asyncio.ensure_future(call("first"))]
    await until(lambda: front.gateway.runner.outstanding()["r0"][1])
    for name, priority in (("late", "10"), ("nonsense", "high"), ("soon", "-10")):
        calls.append(asyncio.ensure_future(call(name, **{"x-vllm-priority": priority})))
        waiting = len(calls) - 1
        await until(lambda waiting=waiting: front.gateway.runner.queued == waiting)  # type: ignore[misc]
    await asyncio.gather(*calls)
    assert order == ["first", "soon", "nonsense", "late"]


class Refusing(EmulatedEngine):
    """Says of every request that it is at fault, in words that look like trouble of its own."""

    def __init__(self, answer: Callable[[Exchange], None]) -> None:
        super().__init__()
        self.asked = 0
        self._say = answer

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        self.asked += 1
        self._say(exchange)


WORDS = b'{"error":{"message":"bad \\"finish_reason\\"","x":{"finish_reason":"abort"}}}'


def whole(exchange: Exchange) -> None:
    exchange.respond(400, WORDS)


def cut(exchange: Exchange) -> None:
    exchange.start(400, ((b"content-length", b"99999"),))
    exchange.write(WORDS)
    exchange.finish(close=True)


@pytest.mark.parametrize("say", [whole, cut])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_is_not_asked_again(
    make_front: Make, say: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Refusing(say), Refusing(say)
    front = await make_front(*engines)
    status, _, answer = await front.post("/v1/completions", {**TEXT, "stream": stream})
    assert status == 400
    assert answer["error"]["message"]
    assert sum(engine.asked for engine in engines) == 1
    metrics = (await front.get("/metrics"))[1].decode()
    assert 'oserve_requests_total{status="client_error"} 1.0' in metrics
    assert "moves on" not in caplog.text


async def test_the_log_says_moves_on_only_of_what_does(
    make_front: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def lose(front: Front, call: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.ensure_future(call())
        await until(lambda: front.engines[0].running)
        await front.engines[0].stop()
        await task
        assert all(count == 0 for _, count in front.gateway.runner.outstanding().values())

    slow = EngineSpeed(ttft_s=0.05, tpot_s=0.01)
    front = await make_front(EmulatedEngine(speed=slow))
    await lose(front, lambda: front.post("/v1/completions", TEXT))
    stuck = {**TEXT, "max_tokens": 500, "stream": True, "n": 2}
    front = await make_front(EmulatedEngine(speed=slow))
    await lose(front, lambda: front.lines("/v1/completions", stuck))
    assert "moves on" not in caplog.text
    front = await make_front(EmulatedEngine(speed=slow), EmulatedEngine(), max_inflight=64)
    await lose(front, lambda: front.post("/v1/completions", TEXT))
    assert caplog.text.count("moves on from replica r0") == 1


def test_an_error_says_what_it_is() -> None:
    assert str(bad_request("no", code="odd")) == "400 odd: no"
    assert str(unavailable("later")) == "503 no_capacity: later"
