"""The gateway as a client sees it, in front of emulated engines."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.conftest import Make, table_of, table_replica, until
from oserve.core import FinishStatus, ReplicaPhase
from oserve.gateway.records import RecordStore, read_records
from oserve.gateway.settings import GatewaySettings, OrderSettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.sim import EmulatedEngine, EngineSpeed
from oserve.wire import Exchange

CHAT = {"model": "emulated", "messages": [{"role": "user", "content": "hello there"}]}
TEXT = {"model": "emulated", "prompt": "hello there", "max_tokens": 5}
JSON = b"content-type: application/json\r\n"


async def test_answers_pass_through_whole(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    status, headers, body = await front.post("/v1/completions", TEXT)
    assert status == 200
    assert body["choices"][0]["text"] == " t1 t2 t3 t4 t5"
    assert body["usage"]["completion_tokens"] == 5
    assert headers["x-oserve-replica"] == "r0"
    assert headers["x-oserve-plan-id"] == "p1"
    assert headers["x-oserve-workload-type"] == "short"
    assert headers["x-request-id"]


@pytest.mark.parametrize("speed", [EngineSpeed(), EngineSpeed(ttft_s=0.002, tpot_s=0.001)])
@pytest.mark.parametrize("usage", [None, True, False])
async def test_streams_are_complete_and_show_usage_only_if_asked(
    make_front: Make, speed: EngineSpeed, usage: bool | None
) -> None:
    front = await make_front(EmulatedEngine(speed=speed))
    body = {**CHAT, "stream": True, "max_tokens": 7}
    if usage is not None:
        body["stream_options"] = {"include_usage": usage}
    lines = await front.lines("/v1/chat/completions", body)
    assert lines[-1] == b"data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-1]]
    texts = [event["choices"][0]["delta"]["content"] for event in events if event["choices"]]
    assert "".join(texts) == " t1 t2 t3 t4 t5 t6 t7"
    assert any("usage" in event for event in events) is bool(usage)


async def test_unknown_fields_reach_the_engine_and_priority_is_set(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine)
    await front.post("/v1/completions", {**TEXT, "top_k": 3, "ignore_eos": True, "priority": 2})
    await front.post("/v1/completions", {**TEXT, "prompt": "word " * 500})
    first, second = engine.seen
    assert first["top_k"] == 3
    assert first["ignore_eos"] is True
    assert isinstance(first["priority"], int)
    assert second["priority"] > first["priority"] - 2000


async def test_fcfs_sends_no_order_by_length(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine, accepts_priority=False)
    await front.post("/v1/completions", TEXT)
    assert "priority" not in engine.seen[0]


async def test_token_prompts_are_counted_exactly(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    _, headers, _ = await front.post("/v1/completions", {**TEXT, "prompt": list(range(513))})
    assert headers["x-oserve-workload-type"] == "long"
    _, headers, _ = await front.post("/v1/completions", {**TEXT, "prompt": list(range(512))})
    assert headers["x-oserve-workload-type"] == "short"


async def test_request_id_is_echoed(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    _, headers, body = await front.post("/v1/completions", TEXT, headers={"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    assert body["id"] == "mine-1"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", {**TEXT, "model": "other"}, 404, "model_not_found"),
        ("/v1/completions", {**TEXT, "max_tokens": "many"}, 400, None),
        ("/v1/completions", [1, 2], 400, None),
        ("/nowhere", TEXT, 404, "not_found"),
        ("/collective_rpc", TEXT, 404, "not_found"),
        ("/pause", TEXT, 404, "not_found"),
    ],
)
async def test_errors_have_openai_form(
    make_front: Make, path: str, body: object, status: int, code: str | None
) -> None:
    front = await make_front(EmulatedEngine())
    got, headers, answer = await front.post(path, body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == code
    assert headers["x-request-id"]


async def test_malformed_json_is_refused(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    for body in (b"{", b"", b"\xff\xfe", b"[" * 10_000, b"null"):
        async with front.session.post(front.url + "/v1/completions", data=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_engine_errors_pass_unwrapped(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    status, _, body = await front.post("/v1/completions", {**TEXT, "max_tokens": -1})
    assert status == 400
    assert body["error"]["type"] == "BadRequestError"


async def test_large_bodies_are_refused_before_they_are_read(make_front: Make) -> None:
    settings = GatewaySettings(port=0, max_body_bytes=1000, shutdown_grace_s=0.0)
    front = await make_front(EmulatedEngine(), settings=settings)
    body = io.BytesIO(b"x" * 5_000_000)
    async with front.session.post(front.url + "/v1/completions", data=body) as answer:
        assert answer.status == 413
        assert "1000 bytes" in (await answer.json())["error"]["message"]

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    async with front.session.post(front.url + "/v1/completions", data=pieces()) as answer:
        assert answer.status == 413
    assert (await front.post("/v1/completions", TEXT))[0] == 200


async def test_api_keys_guard_everything_but_health(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(), api_keys=frozenset({"right"}))
    assert (await front.post("/v1/completions", TEXT))[0] == 401
    wrong = {"authorization": "Bearer wrong"}
    assert (await front.post("/v1/completions", TEXT, headers=wrong))[0] == 401
    right = {"authorization": "Bearer right"}
    assert (await front.post("/v1/completions", TEXT, headers=right))[0] == 200
    assert (await front.get("/v1/models"))[0] == 401
    assert (await front.get("/health"))[0] == 200


async def test_health_tells_whether_a_replica_can_serve(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    assert (await front.get("/health"))[0] == 200
    assert (await front.get("/live"))[0] == 200
    loading = table_replica("r0", "http://127.0.0.1:1", phase=ReplicaPhase.DRAINING)
    front.gateway.runner.update(table_of(loading))
    assert (await front.get("/health"))[0] == 503
    status, headers, _ = await front.post("/v1/completions", TEXT)
    assert status == 503
    assert int(headers["retry-after"]) > 0


async def test_a_dead_replica_costs_no_unanswered_request(make_front: Make) -> None:
    slow = EngineSpeed(ttft_s=1.0, tpot_s=0.01)
    engines = EmulatedEngine(speed=slow), EmulatedEngine(speed=slow)
    front = await make_front(*engines)
    calls = [front.post("/v1/completions", TEXT) for _ in range(6)]
    streams = [front.lines("/v1/completions", {**TEXT, "stream": True}) for _ in range(6)]
    tasks = [asyncio.ensure_future(call) for call in calls]
    stream_tasks = [asyncio.ensure_future(stream) for stream in streams]
    await until(lambda: engines[0].running >= 6 and engines[1].running >= 6)
    await engines[0].stop()
    for status, headers, _ in await asyncio.gather(*tasks):
        assert status == 200
        assert headers["x-oserve-replica"] == "r1"
    for lines in await asyncio.gather(*stream_tasks):
        assert lines[-1] == b"data: [DONE]"


class Failing(EmulatedEngine):
    """Answers every generation with the same error."""

    def _generate(self, exchange: Exchange, *, chat: bool) -> None:
        self.seen.append({})
        exchange.respond(500, b'{"error": {"message": "engine died", "code": 500}}')


async def test_an_error_of_the_engine_moves_the_request_on(make_front: Make) -> None:
    failing = Failing()
    front = await make_front(failing, EmulatedEngine(), expected=True)
    for _ in range(4):
        status, headers, _ = await front.post("/v1/completions", TEXT)
        assert (status, headers["x-oserve-replica"]) == (200, "r1")
    assert failing.seen


async def test_with_nobody_else_the_engines_error_passes_through(make_front: Make) -> None:
    front = await make_front(Failing(), expected=True)
    status, _, body = await front.post("/v1/completions", TEXT)
    assert status == 500
    assert body["error"]["message"] == "engine died"


@pytest.mark.slow
async def test_a_slow_reader_leaves_no_paused_connection_behind(make_front: Make) -> None:
    engine = EmulatedEngine(keep_bodies=False)
    front = await make_front(engine)
    port = int(front.url.rsplit(":", 1)[1])
    body = json.dumps({**TEXT, "stream": True, "max_tokens": 30_000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + JSON + b"content-length: %d\r\n\r\n"
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(head % len(body) + body)
        await reader.readexactly(1)
        await asyncio.sleep(0.05)
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text = text[-100:] + await reader.read(1 << 16)
        writer.close()
        assert (await front.post("/v1/completions", TEXT))[0] == 200


async def test_a_broken_stream_ends_in_an_error_event_without_done(make_front: Make) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(tpot_s=0.02))
    front = await make_front(engine)
    body = {**TEXT, "stream": True, "max_tokens": 500}
    async with front.session.post(front.url + "/v1/completions", json=body) as answer:
        seen = await answer.content.readany()
        await engine.stop()
        seen += await answer.content.read()
    assert b"[DONE]" not in seen
    last = json.loads(seen.strip().rsplit(b"data: ", 1)[1])
    assert last["error"]["code"] == "replica_failed"


async def test_a_client_that_goes_away_frees_the_engine(make_front: Make) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(tpot_s=0.02))
    front = await make_front(engine)
    body = {**TEXT, "stream": True, "max_tokens": 5000}
    async with front.session.post(front.url + "/v1/completions", json=body) as answer:
        await answer.content.readany()
        answer.close()
    await until(lambda: engine.aborted > 0)
    assert engine.running == 0


@pytest.mark.slow
async def test_past_the_queue_comes_429(make_front: Make) -> None:
    settings = GatewaySettings(port=0, max_queued=2, shutdown_grace_s=0.0)
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.5))
    front = await make_front(engine, settings=settings, max_inflight=1)
    results = await asyncio.gather(*(front.post("/v1/completions", TEXT) for _ in range(8)))
    codes = sorted(status for status, _, _ in results)
    assert codes == [200, 200, 200, 429, 429, 429, 429, 429]
    assert all("retry-after" in headers for status, headers, _ in results if status == 429)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "short_first"), [("priority", True), ("fcfs", False)])
async def test_short_prompts_pass_long_ones_in_the_queue(
    make_front: Make, policy: str, short_first: bool
) -> None:
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, order=OrderSettings(policy=policy))
    # Longer than any pause of a busy machine, or the first would end before the others wait.
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=1.5))
    front = await make_front(engine, settings=settings, max_inflight=1)
    ended: list[str] = []

    async def call(name: str, words: int) -> None:
        await front.post("/v1/completions", {**TEXT, "prompt": "a " * words})
        ended.append(name)

    first = asyncio.ensure_future(call("first", 1))
    await until(lambda: engine.running > 0)
    long = asyncio.ensure_future(call("long", 3000))
    await until(lambda: front.gateway.runner.queued > 0)
    await asyncio.gather(first, long, call("short", 1))
    assert ended == (["first", "short", "long"] if short_first else ["first", "long", "short"])


async def test_waits_for_a_replica_on_its_way(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine)
    table = front.gateway.runner.table
    front.gateway.runner.update(replace(table, replicas=(), expected=True))
    waiting = asyncio.ensure_future(front.post("/v1/completions", TEXT))
    await until(lambda: front.gateway.runner.queued > 0)
    # What counts tokens does not wait.
    status, _, body = await front.post("/tokenize", {"model": "emulated", "prompt": "a"})
    assert (status, body["error"]["message"]) == (503, "No replica can serve now")
    front.gateway.runner.update(table)
    assert (await waiting)[0] == 200


async def test_metrics_and_records_tell_what_happened(make_front: Make, tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.sqlite", max_records=1000)
    front = await make_front(EmulatedEngine(), records=store)
    for _ in range(3):
        await front.lines("/v1/completions", {**TEXT, "stream": True})
    await front.post("/v1/completions", {**TEXT, "max_tokens": -1})
    front.gateway.runner.snapshot = ClusterSnapshot(
        gauges=[("oserve_joules_per_output_token", [], 1.5)],
        counters={"oserve_energy_joules": {"nvml\tserving": [22.5]}},
    )
    _, text = await front.get("/metrics")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert samples["oserve_requests_total", (("status", "completed"),)] == 3
    assert samples["oserve_requests_total", (("status", "client_error"),)] == 1
    assert samples["oserve_output_tokens_total", (("workload_type", "short"),)] == 15
    joules = samples["oserve_energy_joules_total", (("source", "nvml"), ("state", "serving"))]
    assert joules == 15 * samples["oserve_joules_per_output_token", ()]
    await front.gateway.close()
    rows = list(read_records(tmp_path / "records.sqlite"))
    assert [row.status for row in rows] == [FinishStatus.COMPLETED] * 3 + [
        FinishStatus.CLIENT_ERROR
    ]
    assert all(row.output_tokens == 5 and row.prompt_tokens == 2 for row in rows[:3])
    assert all(row.ttft_s is not None and row.ttft_s <= row.e2e_s for row in rows[:3])


async def test_raw_http_edges(make_front: Make) -> None:
    """HTTP/1.0, pipelining and rubbish, over a bare socket."""
    front = await make_front(EmulatedEngine())
    port = int(front.url.rsplit(":", 1)[1])
    body = json.dumps({**TEXT, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.%d\r\nhost: x\r\n" + JSON + b"content-length: %d\r\n\r\n"

    async def talk(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer

    old = await talk(head % (0, len(body)) + body)
    assert b"transfer-encoding" not in old
    assert old.count(b"data: ") == 6
    assert old.endswith(b"data: [DONE]\n\n")
    close = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    both = await talk(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" + close)
    assert both.count(b"HTTP/1.1 200") == 2
    assert b"400" in (await talk(b"rubbish\r\n\r\n")).split(b"\r\n")[0]
    assert b"431" in (await talk(b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000)).split(b"\r\n")[0]
    assert (
        b"405" in (await talk(b"PUT /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))[:20]
    )


@pytest.mark.slow
async def test_a_slow_reader_is_cut_off_and_blocks_nobody(make_front: Make) -> None:
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, stall_timeout_s=0.2)
    engine = EmulatedEngine(keep_bodies=False)
    front = await make_front(engine, settings=settings)
    port = int(front.url.rsplit(":", 1)[1])
    body = json.dumps({**TEXT, "stream": True, "max_tokens": 200_000}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + JSON + b"content-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await reader.readexactly(1)
    assert (await front.post("/v1/completions", TEXT))[0] == 200
    await until(lambda: not front.gateway.runner.active)
    writer.close()


async def test_openai_client_works_unchanged(make_front: Make) -> None:
    import openai  # noqa: PLC0415 - slow to import

    front = await make_front(EmulatedEngine())
    client = openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="none")
    models = await client.models.list()
    assert [model.id for model in models.data] == ["emulated"]
    messages = [{"role": "user", "content": "hi"}]
    chat = await client.chat.completions.create(model="emulated", messages=messages, max_tokens=3)
    assert chat.choices[0].message.content == " t1 t2 t3"
    stream = await client.chat.completions.create(
        model="emulated", messages=messages, max_tokens=3, stream=True
    )
    pieces = [event.choices[0].delta.content async for event in stream]
    assert "".join(pieces) == " t1 t2 t3"
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=messages)
    await client.close()
