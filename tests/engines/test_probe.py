"""Asking servers."""

from pathlib import Path

from aiohttp import web

from oserve.core import Endpoint, EngineWork
from oserve.engines.probe import EngineLoad, Probe, ServedModel, base_url, parse_load

METRICS = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 2.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 40.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 40.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 2.0"""


def test_load_is_read_from_metrics() -> None:
    assert parse_load(METRICS) == EngineLoad(running=5, waiting=4, kv_cache_usage=0.25, tokens=42)
    assert parse_load("") == EngineLoad()
    assert parse_load("\nvllm:num_requests_running{ broken") == EngineLoad()
    assert parse_load("\nvllm:num_requests_running 2") == EngineLoad(running=2)


def test_what_an_engine_has_done_is_read_from_metrics() -> None:
    page = """
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 7.0
vllm:iteration_tokens_total_count{engine="0"} 50.0
vllm:iteration_tokens_total_sum{engine="0"} 1100.0
vllm:generation_tokens_total{engine="0"} 300.0
vllm:inter_token_latency_seconds_count{engine="0"} 290.0
vllm:inter_token_latency_seconds_sum{engine="0"} 5.8
"""
    assert parse_load(page).work == EngineWork(
        steps=50, prompt_tokens=800, prompts=10, output_tokens=300, gaps=290, gap_s=5.8
    )
    assert parse_load(page).tokens == 300
    assert parse_load(page.replace("50.0", "0.0")).work is None


def test_base_url_is_the_root() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert base_url(url) == "http://h:1"


async def test_answers_and_silence(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    seen = []

    async def models(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": "m", "max_model_len": 9}, {"id": "n"}]})

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=METRICS)

    async def sleeping(request: web.Request) -> web.Response:
        return web.Response(status=statuses.pop(0))

    statuses = [200, 500, 404]
    app = web.Application()
    app.router.add_get("/is_sleeping", sleeping)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    async with Probe(Endpoint(unix_socket=path, api_key="k"), timeout_s=5) as probe:
        assert not await probe.healthy()
        assert await probe.models() is None
        assert await probe.load() is None
        assert await probe.alive() is False
        await runner.setup()
        await web.UnixSite(runner, path).start()
        assert await probe.healthy()  # there is no /health here: its models will do
        assert await probe.models() == (
            ServedModel(name="m", max_model_len=9),
            ServedModel(name="n"),
        )
        load = await probe.load()
        assert load is not None
        assert load.running == 5
        assert not await probe.complete("m", "hi", 1, 5)
        # Whoever cannot pass the question on has not failed to answer it.
        assert [await probe.alive() for _ in range(3)] == [True, False, None]
    assert seen[0] == "Bearer k"
    await runner.cleanup()
