"""Streams go on: whatever befalls a replica, the client reads what an undisturbed run says."""

import asyncio
import itertools
import json
import random
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.conftest import Front, Make, table_of, table_replica, until
from oserve.core import ReplicaPhase
from oserve.gateway.records import RecordStore, read_records
from oserve.gateway.settings import GatewaySettings, MoveSettings
from oserve.sim import EmulatedEngine, EngineSpeed, Mishap
from oserve.sim.tokenizer_stub import BabblingTokenizer
from oserve.wire.caches import FIELD, CacheFolder, own_name, taken_name, taking

TEXT: dict[str, Any] = {"model": "emulated", "prompt": "once upon a time", "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "emulated",
    "messages": [{"role": "user", "content": "once upon a time"}],
    "temperature": 0,
}
PATHS = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}


def engines(count: int = 3, **options: Any) -> list[EmulatedEngine]:
    return [EmulatedEngine(tokenizer=BabblingTokenizer(), **options) for _ in range(count)]


async def stream(front: Front, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream that must end well."""
    lines = await front.lines(path, {**body, "stream": True})
    assert lines[-1] == b"data: [DONE]", lines[-1]
    return [json.loads(line[6:]) for line in lines[:-1]]


def heard(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream, however it was cut into events."""
    told: dict[str, Any] = {"text": "", "ids": [], "logprobs": [], "end": [], "usage": []}
    told["heads"] = {(event["object"], event["created"], event["model"]) for event in events}
    told["names"] = len({event["id"] for event in events})
    told["roles"] = 0
    for event in events:
        if not event["choices"]:
            told["usage"].append(event["usage"])
            continue
        (choice,) = event["choices"]
        delta = choice.get("delta", {})
        told["roles"] += "role" in delta
        told["text"] += choice.get("text") or delta.get("content") or ""
        told["ids"] += choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        if "content" in logprobs:
            told["logprobs"] += logprobs["content"]
        elif logprobs:
            told["logprobs"] += list(zip(*(logprobs[key] for key in sorted(logprobs)), strict=True))
        if choice["finish_reason"] is not None:
            told["end"].append((choice["finish_reason"], choice.get("stop_reason")))
    return told


def wishes(draw: random.Random, *, chat: bool) -> dict[str, Any]:
    """A request at random."""
    body: dict[str, Any] = {"max_tokens": draw.randint(1, 60)}
    if draw.random() < 0.5:
        body["stop"] = draw.choice(["STOP", ["end\nx", "OP", "zz"], ["本 a", " the end"], "éa"])
        body["include_stop_str_in_output"] = draw.random() < 0.3
        body["min_tokens"] = draw.randint(0, 20)
    if draw.random() < 0.2:
        body["stop_token_ids"] = [draw.randrange(16)]
    if draw.random() < 0.4:
        most = draw.randint(0, 2)
        body |= {"logprobs": True, "top_logprobs": most} if chat else {"logprobs": most}
    if draw.random() < 0.5:
        body["stream_options"] = {
            "include_usage": True,
            "continuous_usage_stats": draw.random() < 0.5,
        }
    if draw.random() < 0.2:
        body["return_token_ids"] = True
    if draw.random() < 0.3:
        body["stream_interval"] = draw.randint(2, 5)
    return body


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("speed", [EngineSpeed(), EngineSpeed(tpot_s=1e-6)])
async def test_the_client_reads_what_an_undisturbed_run_says(
    make_front: Make, path: str, speed: EngineSpeed
) -> None:
    calm = await make_front(*engines(1, speed=speed))
    rough = await make_front(*engines(3, speed=speed))
    draw = random.Random(len(path))
    moved = 0
    for number in range(120):
        chat = "chat" in path
        body = {**PATHS[path], **wishes(draw, chat=chat)}
        body["messages" if chat else "prompt"] = (
            [{"role": "user", "content": f"a {number}"}] if chat else f"a {number}"
        )
        for engine in rough.engines:
            engine.mishaps.clear()
        hows = ["break", "torn", "abort", "error"]
        mishaps = [Mishap(after=draw.randint(0, 40), how=draw.choice(hows)) for _ in range(2)]
        first, second = draw.sample(rough.engines, 2)
        first.mishaps.append(mishaps[0])
        second.mishaps.append(mishaps[1])
        expected = heard(await stream(calm, path, body))
        got = heard(await stream(rough, path, body))
        assert got == expected, (number, body, mishaps)
        moved += not (first.mishaps and second.mishaps)
    assert moved > 50


@pytest.mark.parametrize("path", PATHS)
async def test_every_cut_of_one_answer(make_front: Make, path: str) -> None:
    calm = await make_front(*engines(1))
    rough = await make_front(*engines(2))
    body = {**PATHS[path], "max_tokens": 25, "stop": ["never said"], "logprobs": 1}
    if "chat" in path:
        body |= {"logprobs": True, "top_logprobs": 1}
    expected = heard(await stream(calm, path, body))
    for after, how in itertools.product(range(25), ("break", "torn", "abort")):
        for engine in rough.engines:
            engine.mishaps.clear()
        rough.engines[0].mishaps.append(Mishap(after=after, how=how))
        assert heard(await stream(rough, path, body)) == expected, (after, how)


@pytest.mark.parametrize("included", [False, True])
async def test_a_stop_string_may_span_the_seam(make_front: Make, included: bool) -> None:
    calm = await make_front(*engines(1))
    rough = await make_front(*engines(2))
    body = {**TEXT, "max_tokens": 30, "include_stop_str_in_output": included}
    whole = heard(await stream(calm, "/v1/completions", body))["text"]
    stops = [whole[at : at + 6] for at in range(4, 24, 4) if whole.find(whole[at : at + 6]) == at]
    assert len(stops) > 2
    for stop, after in itertools.product(stops, range(1, 16)):
        wish = {**body, "stop": [stop]}
        expected = heard(await stream(calm, "/v1/completions", wish))
        assert expected["end"] == [("stop", stop)]
        rough.engines[0].mishaps.append(Mishap(after=after))
        assert heard(await stream(rough, "/v1/completions", wish)) == expected, (stop, after)
        rough.engines[0].mishaps.clear()


async def test_token_ids_are_shown_to_those_only_who_ask(make_front: Make) -> None:
    front = await make_front(*engines(2))
    for path, body in PATHS.items():
        for limit in (1, 12):
            front.engines[0].mishaps.append(Mishap(after=5))
            data = b"\n".join(
                await front.lines(path, {**body, "stream": True, "max_tokens": limit})
            )
            assert b'token_ids":[' not in data
            assert b'token_ids":null' in data
            assert b"usage" not in data
            front.engines[0].mishaps.clear()


async def test_whole_answers_are_computed_again(make_front: Make) -> None:
    calm = await make_front(*engines(1))
    rough = await make_front(*engines(2))
    for path, body in PATHS.items():
        wish = {**body, "max_tokens": 30}
        _, _, expected = await calm.post(path, wish)
        for how in ("break", "abort"):
            rough.engines[0].mishaps.append(Mishap(after=7, how=how))
            _, headers, got = await rough.post(path, wish)
            rough.engines[0].mishaps.clear()
            assert got["choices"] == expected["choices"]
            assert got["usage"] == expected["usage"]
            assert headers["x-oserve-replica"] in {"r0", "r1"}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"presence_penalty": 0.5}),
        ("/v1/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/completions", {"structured_outputs": {"regex": "a+"}}),
        ("/v1/completions", {"n": 2}),
        ("/v1/completions", {"bad_words": ["x y"]}),
        ("/v1/completions", {"nobody_knows": 1}),
        ("/v1/completions", {"echo": True}),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        ),
    ],
)
async def test_state_that_cannot_be_carried_ends_in_the_usual_error(
    make_front: Make, path: str, more: dict[str, Any]
) -> None:
    front = await make_front(*engines(2))
    for engine in front.engines:
        engine.mishaps.append(Mishap(after=5))
    lines = await front.lines(path, {**PATHS[path], "stream": True, "max_tokens": 20, **more})
    assert json.loads(lines[-1][6:])["error"]["code"] == "replica_failed"
    # Neutral values keep nobody.
    front = await make_front(*engines(2))
    front.engines[0].mishaps.append(Mishap(after=5))
    calm = {"n": 1, "presence_penalty": 0.0, "response_format": None, "echo": False, "tools": None}
    await stream(front, path, {**PATHS[path], "max_tokens": 20, **calm})


async def test_what_is_past_the_bound_is_not_carried(make_front: Make) -> None:
    for move in (
        MoveSettings(max_stream_bytes=2000),
        MoveSettings(max_bytes=0),
        MoveSettings(max_moves=0),
    ):
        settings = GatewaySettings(port=0, shutdown_grace_s=0.0, move=move)
        front = await make_front(*engines(2), settings=settings)
        body = {**TEXT, "max_tokens": 40}
        assert len(heard(await stream(front, "/v1/completions", body))["text"]) > 20
        for engine in front.engines:
            engine.mishaps.append(Mishap(after=30))
        lines = await front.lines("/v1/completions", {**body, "stream": True})
        assert b'"error"' in lines[-1]
        assert b'token_ids":[' not in b"".join(lines)


async def test_moves_are_counted_and_bounded(make_front: Make, tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records.sqlite", max_records=100)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, move=MoveSettings(max_moves=2))
    front = await make_front(*engines(5), settings=settings, records=store)
    body = {**TEXT, "max_tokens": 40}
    front.engines[0].mishaps.append(Mishap(after=8))
    for engine in front.engines[1:2]:
        engine.mishaps.append(Mishap(after=8, how="abort"))
    for _ in range(3):
        await stream(front, "/v1/completions", body)
    for engine in front.engines:
        engine.mishaps.append(Mishap(after=3))
    lines = await front.lines("/v1/completions", {**body, "stream": True})
    assert b'"error"' in lines[-1]
    _, metrics = await front.get("/metrics")
    assert b'oserve_requests_moved_total{reason="lost",way="replay"}' in metrics
    assert all(count == 0 for _, count in front.gateway.runner.outstanding().values())
    await front.gateway.close()
    rows = list(read_records(tmp_path / "records.sqlite"))
    assert [row.output_tokens for row in rows[:3]] == [40, 40, 40]
    assert sum(row.moves for row in rows) >= 3
    assert rows[-1].moves == 2


async def test_nobody_can_take_it(make_front: Make) -> None:
    """The last replica goes, or the others hold no such context: the error of always."""
    for count, lengths in ((1, 8192), (2, 20)):
        front = await make_front(*engines(count), max_model_len=lengths)
        for engine in front.engines:
            engine.mishaps.append(Mishap(after=25))
        lines = await front.lines("/v1/completions", {**TEXT, "stream": True, "max_tokens": 30})
        assert json.loads(lines[-1][6:])["error"]["code"] == "replica_failed"


async def test_a_stream_waits_for_a_place(make_front: Make) -> None:
    slow = EngineSpeed(tpot_s=0.002)
    front = await make_front(*engines(2, speed=slow), max_inflight=1)
    settings_queue = front.gateway.runner
    wishes_ = [{**TEXT, "prompt": f"p {n}", "max_tokens": 60} for n in range(2)]
    tasks = [asyncio.ensure_future(stream(front, "/v1/completions", wish)) for wish in wishes_]
    await until(lambda: all(engine.running for engine in front.engines))
    await front.engines[0].stop()
    await until(lambda: settings_queue.queued)
    told = [heard(await task) for task in tasks]
    assert [item["end"] for item in told] == [[("length", None)]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
async def test_a_replica_hands_over(make_front: Make, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    calm = await make_front(*engines(1))
    front = await make_front(*engines(2, speed=EngineSpeed(ttft_s=0.01, tpot_s=0.01)))
    wish = {**PATHS[path], "max_tokens": 80, "ignore_eos": True}
    expected = heard(await stream(calm, path, wish))
    tasks = [asyncio.ensure_future(stream(front, path, wish)) for _ in range(9)]
    whole = asyncio.ensure_future(front.post(path, wish))
    await until(lambda: all(engine.running for engine in front.engines))
    front.gateway.runner.hand_over("r0", 0.0)
    await until(lambda: front.engines[0].running == 0)
    for task in tasks:
        assert heard(await task) == expected
    assert (await whole)[0] == 200
    assert len(front.engines[0].seen) > 0
    # It gets no more.
    seen = len(front.engines[0].seen)
    await stream(front, path, wish)
    assert len(front.engines[0].seen) == seen


async def test_a_long_one_hands_over_with_its_cache(make_front: Make, tmp_path: Path) -> None:
    # Computing the prompt again takes longer than moving what was computed.
    costs = {"prefill_s_per_token": 0.1}
    front = await make_front(*engines(2, speed=EngineSpeed(tpot_s=0.01)), **costs)
    table = front.gateway.runner.table
    ends = [replace(item.endpoint, caches=str(tmp_path)) for item in table.replicas]
    replicas = [replace(r, endpoint=end) for r, end in zip(table.replicas, ends, strict=True)]
    front.gateway.runner.update(replace(table, replicas=tuple(replicas)))
    wish = {**TEXT, "max_tokens": 80, "ignore_eos": True}
    expected = heard(await stream(front, "/v1/completions", wish))
    # What others computed cannot be asked for.
    status, _, _ = await front.post("/v1/completions", {**wish, FIELD: taking("0" * 32)})
    assert status == 400
    for engine in front.engines:
        assert all(not taken_name(body[FIELD]) for body in engine.seen)
        engine.seen.clear()
    tasks = [asyncio.ensure_future(stream(front, "/v1/completions", wish)) for _ in range(2)]
    active = front.gateway.runner.active
    await until(lambda: len(active) == 2 and all(item.committed for item in active.values()))
    front.gateway.runner.hand_over("r0", 0.0)
    assert [heard(await task) for task in tasks] == [expected] * 2
    (given,) = [own_name(body[FIELD]) for body in front.engines[0].seen]
    asked = CacheFolder(str(tmp_path))
    assert asked.asked(given)
    assert not asked.asked(given)
    *_, last = front.engines[1].seen
    assert taken_name(last[FIELD]) == given
    assert own_name(last[FIELD]) not in {"", given}
    metrics = (await front.get("/metrics"))[1].decode()
    assert 'oserve_requests_moved_total{reason="handed_over",way="move"} 1' in metrics


@pytest.mark.slow
async def test_short_requests_drain_and_drains_end(make_front: Make) -> None:
    front = await make_front(*engines(2, speed=EngineSpeed(tpot_s=0.001)))
    wish = {**TEXT, "max_tokens": 30, "ignore_eos": True}
    tasks = [asyncio.ensure_future(stream(front, "/v1/completions", wish)) for _ in range(4)]
    await until(lambda: all(engine.running for engine in front.engines))
    front.gateway.runner.hand_over("r0", 600.0)
    await asyncio.gather(*tasks)
    assert "moved_total{" not in (await front.get("/metrics"))[1].decode()
    move = MoveSettings(drain_limit_s=0.0)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, move=move)
    front = await make_front(*engines(2, speed=EngineSpeed(tpot_s=0.01)), settings=settings)
    wish["max_tokens"] = 200
    tasks = [asyncio.ensure_future(stream(front, "/v1/completions", wish)) for _ in range(4)]
    await until(lambda: all(engine.running for engine in front.engines))
    table = front.gateway.runner.table
    draining = replace(table.replicas[0], phase=ReplicaPhase.DRAINING)
    front.gateway.runner.update(replace(table, replicas=(draining, *table.replicas[1:])))
    await until(lambda: front.engines[0].running == 0)
    told = [heard(await task) for task in tasks]
    assert all(item == told[0] for item in told)


async def test_sampled_streams_go_on_without_a_seam(make_front: Make) -> None:
    front = await make_front(*engines(2))
    for after in range(1, 20):
        front.engines[0].mishaps.append(Mishap(after=after))
        for seed in (None, 7):
            wish = {**TEXT, "temperature": 0.8, "seed": seed, "max_tokens": 30}
            wish["stream_options"] = {"include_usage": True}
            told = heard(await stream(front, "/v1/completions", wish))
            assert told["usage"][0]["completion_tokens"] == 30
            assert "once" not in told["text"]
        front.engines[0].mishaps.clear()


async def test_a_replica_that_tells_no_ids_is_left_alone(make_front: Make) -> None:
    front = await make_front(*engines(2), returns_token_ids=False)
    front.engines[0].mishaps.append(Mishap(after=5))
    front.engines[1].mishaps.append(Mishap(after=5))
    lines = await front.lines("/v1/completions", {**TEXT, "stream": True, "max_tokens": 9})
    assert b'"error"' in lines[-1]
    assert all("return_token_ids" not in body for body in front.engines[0].seen)


async def test_a_replica_on_its_way_is_waited_for(make_front: Make) -> None:
    front = await make_front(*engines(1), expected=True)
    late = EmulatedEngine(tokenizer=BabblingTokenizer())
    front.engines.append(late)
    port = await late.start()
    front.engines[0].mishaps.append(Mishap(after=6))
    task = asyncio.ensure_future(stream(front, "/v1/completions", {**TEXT, "max_tokens": 20}))
    await until(lambda: front.gateway.runner.queued)
    front.gateway.runner.update(table_of(table_replica("r9", f"http://127.0.0.1:{port}")))
    assert heard(await task)["end"] == [("length", None)]


async def test_records_of_an_earlier_version_gain_the_column(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE requests (arrival_s REAL, prompt_tokens INTEGER, output_tokens INTEGER,"
            " workload_type TEXT, replica TEXT, ttft_s REAL, tpot_s REAL, e2e_s REAL, status TEXT)"
        )
        row = (1.0, 4, 3, "all", "r0", 0.1, 0.01, 0.4, "completed")
        old.execute("INSERT INTO requests VALUES (?,?,?,?,?,?,?,?,?)", row)
    old.close()
    (kept,) = read_records(path)
    store = RecordStore(path, max_records=10)
    store.put(msgspec.structs.replace(kept, moves=2))
    store.close()
    assert [record.moves for record in read_records(path)] == [0, 2]
