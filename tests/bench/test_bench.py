"""The bench counts what is complete, and nothing else, as complete."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from typer.testing import CliRunner

from oserve.cli import app
from oserve.cli.load import Replay, new_session
from oserve.cli.target import BenchTarget, calibrated_writer, find_target
from oserve.core import OServeError
from oserve.sim import EmulatedEngine
from oserve.traces import OutcomeStatus, TraceRequest, synthesise

Answer = Callable[[web.StreamResponse, int], Awaitable[None]]
Serve = Callable[[Answer], Awaitable[str]]


def event(text: str | None, reason: str | None = None, **more: object) -> bytes:
    choices = [] if text is None else [{"text": text, "finish_reason": reason}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return event(None, usage={"prompt_tokens": 3, "completion_tokens": tokens})


async def whole(out: web.StreamResponse, tokens: int) -> None:
    for index in range(tokens):
        await out.write(event("x", "length" if index == tokens - 1 else None))
    await out.write(usage(tokens) + b"data: [DONE]\n\n")


async def no_done(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x", "length") + usage(tokens))


async def no_reason(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x") + usage(tokens) + b"data: [DONE]\n\n")


async def too_few(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x", "stop") + usage(tokens - 1) + b"data: [DONE]\n\n")


async def no_usage(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x", "length") + b"data: [DONE]\n\n")


async def error_event(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x") + b'data: {"error": {"message": "boom"}}\n\n')


async def rubbish(out: web.StreamResponse, tokens: int) -> None:
    await out.write(b"data: {\n\n")


async def breaks_off(out: web.StreamResponse, tokens: int) -> None:
    await out.write(event("x"))
    raise ConnectionResetError


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def start(answer: Answer) -> str:
        async def completions(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            out = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await out.prepare(request)
            await answer(out, body["max_tokens"])
            return out

        async def models(_: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "m", "max_model_len": 4096}]})

        application = web.Application()
        application.router.add_post("/v1/completions", completions)
        application.router.add_get("/v1/models", models)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def replay(url: str, count: int = 3) -> Replay:
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=4)] * count
    async with new_session() as session:
        target = await find_target(session, url, model="", api_key="", chat=False, timeout_s=10.0)
        writer = await calibrated_writer(session, target, seed=0)
        run = Replay(session, target, writer, max_concurrency=2, progress=lambda: None)
        await run.run(trace, speed=1.0)
    return run


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (whole, OutcomeStatus.COMPLETED, ""),
        (no_done, OutcomeStatus.TRUNCATED, "[DONE]"),
        (no_reason, OutcomeStatus.TRUNCATED, "finish reason"),
        (too_few, OutcomeStatus.TRUNCATED, "tokens"),
        (no_usage, OutcomeStatus.TRUNCATED, "usage"),
        (error_event, OutcomeStatus.FAILED, "boom"),
        (rubbish, OutcomeStatus.FAILED, "bad event"),
        (breaks_off, OutcomeStatus.TRUNCATED, "connection"),
    ],
)
async def test_only_complete_streams_count(
    serve: Serve, answer: Answer, status: OutcomeStatus, words: str
) -> None:
    run = await replay(await serve(answer))
    assert [item.status for item in run.outcomes] == [status] * 3
    assert all(words in item.error for item in run.outcomes)


async def test_status_errors_are_failures(serve: Serve) -> None:
    url = await serve(whole)
    async with new_session() as session:
        target = BenchTarget(url=url + "/nowhere", model="m", max_model_len=0)
        writer = await calibrated_writer(session, target, seed=0)
        run = Replay(session, target, writer, max_concurrency=2, progress=lambda: None)
        await run.run([TraceRequest(arrival_s=0, prompt_tokens=1, output_tokens=1)], speed=1.0)
    assert run.outcomes[0].status is OutcomeStatus.FAILED
    assert "404" in run.outcomes[0].error


async def test_prompts_have_about_the_length_asked_for() -> None:
    engine = EmulatedEngine()
    url = f"http://127.0.0.1:{await engine.start()}"
    async with new_session() as session:
        target = await find_target(session, url, model="", api_key="", chat=True, timeout_s=5.0)
        writer = await calibrated_writer(session, target, seed=0)
    await engine.stop()
    assert target.max_model_len == 8192
    for tokens in (1, 10, 500):
        assert len(writer.write(tokens).split()) == tokens
    assert writer.write(50) != writer.write(50)


async def test_a_wrong_model_and_a_dead_url_are_told(serve: Serve) -> None:
    url = await serve(whole)
    async with new_session() as session:
        for place, model in ((url, "other"), ("http://127.0.0.1:9", "")):
            with pytest.raises(OServeError):
                await find_target(
                    session, place, model=model, api_key="", chat=False, timeout_s=5.0
                )


@pytest.mark.parametrize(
    "words",
    [
        ["bench"],
        ["bench", "x.csv", "--synthetic", "1:1"],
        ["bench", "none.csv"],
        ["bench", "--synthetic", "fast"],
        ["bench", "--synthetic", "1:0"],
        ["bench", "--synthetic", "1:1", "--speed", "0"],
        ["bench", "--synthetic", "5:5", "--classes", "9,3"],
        ["bench", "--synthetic", "5:5", "--url", "http://127.0.0.1:9"],
    ],
)
def test_bad_input_is_an_error_with_place_and_remedy(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, OServeError)
    assert result.exception.remedy


@pytest.mark.slow
def test_the_command_reports_json_and_draws(tmp_path: Path) -> None:
    async def emulated(stop: asyncio.Event, ready: asyncio.Future[int]) -> None:
        engine = EmulatedEngine()
        ready.set_result(await engine.start())
        await stop.wait()
        await engine.stop()

    async def run() -> dict[str, object]:
        stop = asyncio.Event()
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(emulated(stop, ready))
        url = f"http://127.0.0.1:{await ready}"
        words = ["bench", "--synthetic", "40:1", "--url", url, "--json", "--slo-ttft-ms", "900"]
        words += ["--plot", str(tmp_path / "run.png"), "--speed", "5"]
        result = await asyncio.to_thread(CliRunner().invoke, app, words)
        stop.set()
        await serving
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    report = asyncio.run(run())
    expected = len(list(synthesise(rate_rps=40, duration_s=1, seed=0)))
    assert report["sent"] == report["completed"] == expected
    assert report["failed"] == report["truncated"] == 0
    assert set(report["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99", "max"}  # type: ignore[call-overload]
    assert report["slo_attainment"] == 1.0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
