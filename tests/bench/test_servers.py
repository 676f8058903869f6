"""The bench against servers of other makes: what they leave out is learned and no failure."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from oserve.cli.load import Replay, new_session
from oserve.cli.prompts import PromptWriter
from oserve.cli.target import BenchTarget, calibrated_writer, find_target, warmed_up
from oserve.core import OServeError
from oserve.traces import FailureKind, OutcomeStatus, Slo, TraceRequest, summarise


@dataclass
class Make:
    """How a server speaks. ``fails`` answers the n-th request after the first otherwise."""

    line: bytes = b"\n"
    done: bool = True
    usage: bool = True
    unknown: tuple[str, ...] = ()
    models: list[dict[str, Any]] | None = field(default_factory=lambda: [{"id": "m"}])
    stops_at: int = 1 << 30
    reasoning: int = 0
    status: int = 200
    error: bool = False
    path: str = ""
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        for name in self.unknown:
            if name in body:
                return web.json_response({"detail": f"unknown field {name}"}, status=422)
        if self.status != 200:
            return web.json_response({"error": {"message": "refused"}}, status=self.status)
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(request)
        if self.error:
            await self._write(out, {"error": {"message": "no"}})
            return out
        count = min(body["max_tokens"], self.stops_at)
        reason = "length" if count == body["max_tokens"] else "stop"
        for at in range(count):
            text: dict[str, Any] = {"text": "x"}
            if "messages" in body:
                text = {"delta": {"reasoning" if at < self.reasoning else "content": "x"}}
            ended = reason if at == count - 1 else None
            await self._write(out, {"choices": [{**text, "finish_reason": ended}]})
        if self.usage and "stream_options" in body:
            words = len(str(body.get("prompt") or body["messages"][0]["content"]).split())
            counts = {"prompt_tokens": 2 * words, "completion_tokens": count}
            await self._write(out, {"choices": [], "usage": counts})
        if self.done:
            await out.write(b"data: [DONE]\n\n".replace(b"\n", self.line))
        return out

    async def _write(self, out: web.StreamResponse, event: dict[str, Any]) -> None:
        text = b"data: " + json.dumps(event).encode() + b"\n\n"
        await out.write(text.replace(b"\n", self.line))

    async def list_models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        if self.models is None:
            raise web.HTTPNotFound
        return web.json_response({"data": self.models})


Start = Callable[[Make], Awaitable[str]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    runners: list[web.AppRunner] = []

    async def begin(make: Make) -> str:
        application = web.Application()
        application.router.add_post(make.path + "/v1/completions", make.complete)
        application.router.add_post(make.path + "/v1/chat/completions", make.complete)
        application.router.add_get(make.path + "/v1/models", make.list_models)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        return f"127.0.0.1:{runner.addresses[0][1]}{make.path}"

    yield begin
    for runner in runners:
        await runner.cleanup()


async def run(
    url: str, *, model: str = "", chat: bool = False, key: str = "", count: int = 2
) -> tuple[BenchTarget, Replay]:
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=6)] * count
    async with new_session() as session:
        target = await find_target(
            session, url, model=model, api_key=key, chat=chat, timeout_s=10.0
        )
        target, _ = await warmed_up(session, target, seed=0)
        writer = PromptWriter.measured([], seed=0)
        replay = Replay(session, target, writer, max_concurrency=2, progress=lambda: None)
        await replay.run(trace, speed=1.0)
    return target, replay


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (Make(line=b"\r\n", models=[{"id": "m", "max_model_len": 4096}]), 0),
        (Make(line=b"\r"), 1),
        (Make(done=False), 2),
        (Make(usage=False), 2),
        (Make(unknown=("stream_options",)), 2),
        (Make(unknown=("ignore_eos",), stops_at=5), 1),
        (Make(unknown=("ignore_eos", "stream_options"), done=False), 3),
        (Make(models=None), 1),
        (Make(models=[]), 1),
        (Make(path="/llm/1.0"), 1),
        (Make(key="secret"), 1),
    ],
)
async def test_every_make_is_measured(start: Start, make: Make, notes: int) -> None:
    target, replay = await run(await start(make) + "/v1/", model="m", key=make.key)
    assert [item.status for item in replay.outcomes] == [OutcomeStatus.COMPLETED] * 2
    assert [item.output_tokens for item in replay.outcomes] == [min(6, make.stops_at)] * 2
    assert len(target.dialect.notes) == notes
    assert not any(name in make.bodies[-1] for name in make.unknown)


async def test_what_a_server_was_seen_to_do_it_is_held_to(start: Start) -> None:
    make = Make(models=[{"id": "m", "max_model_len": 4096}])
    url = await start(make)
    for name, wrong in (("done", False), ("usage", False), ("stops_at", 5)):
        async with new_session() as session:
            target = await find_target(
                session, url, model="", api_key="", chat=False, timeout_s=10.0
            )
            target, _ = await warmed_up(session, target, seed=0)
            usual = getattr(make, name)
            setattr(make, name, wrong)
            writer = PromptWriter.measured([], seed=0)
            replay = Replay(session, target, writer, max_concurrency=1, progress=lambda: None)
            await replay.run([TraceRequest(arrival_s=0, prompt_tokens=5, output_tokens=6)], speed=1)
            setattr(make, name, usual)
        assert replay.outcomes[0].status is OutcomeStatus.TRUNCATED, name


async def test_reasoning_is_reported_apart(start: Start) -> None:
    _, replay = await run(await start(Make(reasoning=3)), chat=True)
    for item in replay.outcomes:
        assert item.first_answer_s is not None
        assert item.ttft_s <= item.first_answer_s <= item.e2e_s
        assert len(item.itl_s) == 5
    summary = summarise(replay.outcomes, Slo())
    assert summary.first_answer_s is not None
    assert summary.first_answer_s.p50 >= summary.ttft_s.p50
    _, replay = await run(await start(Make()), chat=True)
    assert summarise(replay.outcomes, Slo()).first_answer_s is None


async def test_prompts_are_measured_by_usage_where_there_is_no_tokenizer(start: Start) -> None:
    url = await start(Make())
    async with new_session() as session:
        target = await find_target(session, url, model="", api_key="", chat=False, timeout_s=5.0)
        assert not (await calibrated_writer(session, target, seed=0)).calibrated
        _, length = await warmed_up(session, target, seed=0)
    assert length is not None
    assert len(PromptWriter.measured([length], seed=0).write(50).split()) == 25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Make(status=400), "status 400 to /v1/completions: refused"),
        (Make(status=404), "status 404"),
        (Make(error=True), "no"),
        (Make(key="secret"), "API key"),
        (Make(models=[]), "has no model"),
        (Make(models=None), "OpenAI's form"),
        (Make(models=[{"name": "m"}]), "OpenAI's form"),
    ],
)
async def test_a_server_that_refuses_the_first_request_ends_it(
    start: Start, make: Make, words: str
) -> None:
    with pytest.raises(OServeError) as caught:
        await run(await start(make))
    assert words in caught.value.message
    assert caught.value.place.startswith("http://127.0.0.1")


@pytest.mark.parametrize(
    ("status", "kind"), [(429, FailureKind.CLIENT_ERROR), (503, FailureKind.SERVER_ERROR)]
)
async def test_failures_are_counted_by_kind(start: Start, status: int, kind: FailureKind) -> None:
    _, replay = await run(await start(Make(status=status)), count=3)
    summary = summarise(replay.outcomes, Slo())
    assert summary.failures == {kind.value: 3}
    assert {item.error for item in replay.outcomes} == {f"status {status}: refused"}


async def test_a_dead_port_says_so() -> None:
    with pytest.raises(OServeError, match=r"refused|connect call failed") as caught:
        await run("127.0.0.1:9")
    assert caught.value.place == "http://127.0.0.1:9"
