"""Forms other than OpenAI's completions: passed on, typed, ordered, counted; their errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.conftest import Make
from oserve.core import FinishStatus
from oserve.gateway.http.api_form import AUXILIARY, FORMS
from oserve.gateway.http.body import parse_body
from oserve.gateway.http.prompt import prompt_size
from oserve.gateway.records import RecordStore, read_records
from oserve.sim import EmulatedEngine, EngineSpeed

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ASKED = {
    MESSAGES: {"max_tokens": 5, "messages": [{"role": "user", "content": "hello there"}]},
    RESPONSES: {"max_output_tokens": 5, "input": "hello there"},
}
TEXT = " t1 t2 t3 t4 t5"


def body_of(path: str, **more: Any) -> dict[str, Any]:
    return {"model": "emulated", **ASKED[path], **more}


def text_of(path: str, answer: dict[str, Any]) -> str:
    found = answer["content"] if path == MESSAGES else answer["output"][0]["content"]
    return str(found[0]["text"])


def deltas(lines: list[bytes]) -> str:
    """The text of a stream of typed events."""
    events = [json.loads(line.partition(b"data: ")[2]) for line in lines]
    found = [event["delta"] for event in events if event["type"].endswith("delta")]
    return "".join(item if isinstance(item, str) else item.get("text", "") for item in found)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_whole_answers_and_streams_are_the_replicas(make_front: Make, path: str) -> None:
    front = await make_front(EmulatedEngine())
    status, headers, answer = await front.post(path, body_of(path))
    assert (status, text_of(path, answer)) == (200, TEXT)
    assert headers["x-oserve-workload-type"] == "short"
    lines = await front.lines(path, body_of(path, stream=True))
    assert lines[0].startswith(b"event: ")
    assert deltas(lines) == TEXT
    assert not any(line.startswith(b"data: [DONE]") for line in lines)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_they_used_is_recorded(
    make_front: Make, tmp_path: Path, path: str, stream: bool
) -> None:
    store = RecordStore(tmp_path / "records.sqlite", max_records=1000)
    front = await make_front(EmulatedEngine(), records=store)
    await front.lines(path, body_of(path, stream=stream))
    await front.gateway.close()
    [row] = read_records(tmp_path / "records.sqlite")
    assert row.status == FinishStatus.COMPLETED
    assert row.output_tokens == 5


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_only_completions_get_fields_that_ask_for_more(make_front: Make, path: str) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine)
    await front.lines(path, body_of(path, stream=True))
    assert not {"stream_options", "return_token_ids"} & engine.seen[0].keys()
    priority = engine.seen[0]["priority"]
    _, headers = engine.heads[-1]
    # vLLM reads a priority of Anthropic's form from the header alone.
    given = headers.get(b"x-vllm-priority")
    assert given == (b"%d" % priority if path == MESSAGES else None)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_a_refusal_before_the_first_event_is_retried_elsewhere(
    make_front: Make, path: str
) -> None:
    bad, good = EmulatedEngine(), EmulatedEngine()
    bad.status = 503
    front = await make_front(bad, good)
    for _ in range(4):
        assert deltas(await front.lines(path, body_of(path, stream=True))) == TEXT


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_a_stream_whose_replica_dies_ends_with_an_error_of_its_form(
    make_front: Make, path: str
) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(tpot_s=0.001))
    front = await make_front(engine)
    limit = "max_tokens" if path == MESSAGES else "max_output_tokens"
    long = body_of(path, stream=True, **{limit: 20_000})
    async with front.session.post(front.url + path, json=long) as answer:
        await answer.content.readuntil(b"delta")
        await engine.stop()
        text = await answer.read()
    last = text.rstrip().rpartition(b"\n\n")[2]
    assert last.startswith(b"event: error\ndata: ")
    error = json.loads(last.partition(b"data: ")[2])
    assert error["type"] == "error"
    assert "r0" in (error["error"] if path == MESSAGES else error)["message"]


async def test_errors_have_the_form_of_the_api(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    status, _, error = await front.post(MESSAGES, {**body_of(MESSAGES), "model": "other"})
    assert (status, error["type"], error["error"]["type"]) == (404, "error", "not_found_error")
    status, _, error = await front.post(MESSAGES, {**body_of(MESSAGES), "stream": "perhaps"})
    assert (status, error["error"]["type"]) == (400, "invalid_request_error")
    status, _, error = await front.post(RESPONSES, {**body_of(RESPONSES), "model": "other"})
    assert (status, error["error"]["code"]) == (404, "model_not_found")
    assert (await front.get("/v1/responses/resp_1"))[0] == 404


async def test_a_key_in_anthropics_header_is_accepted(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(), api_keys=frozenset({"a-key"}))
    status, _, error = await front.post(MESSAGES, body_of(MESSAGES))
    assert (status, error["error"]["type"]) == (401, "authentication_error")
    keyed = {"x-api-key": "a-key"}
    status, _, answer = await front.post(MESSAGES, body_of(MESSAGES), headers=keyed)
    assert (status, text_of(MESSAGES, answer)) == (200, TEXT)
    wrong = {"x-api-key": "a-key", "authorization": "Bearer other"}
    assert (await front.post(MESSAGES, body_of(MESSAGES), headers=wrong))[0] == 401


async def test_batches_scores_and_counts_come_from_a_replica(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine)
    chat = [{"role": "user", "content": "hello"}]
    batch = {"messages": [chat, chat], "max_tokens": 3, "stream": True}
    status, _, answer = await front.post("/v1/chat/completions/batch", batch)
    assert (status, len(answer["choices"])) == (200, 2)
    scoring = {"query": "is it", "items": ["a", "b", "c"], "label_token_ids": [1, 2]}
    status, _, answer = await front.post("/generative_scoring", scoring)
    assert (status, len(answer["data"])) == (200, 3)
    status, _, answer = await front.post("/v1/messages/count_tokens", {"messages": chat})
    assert status == 200
    assert answer["input_tokens"] > 0


async def test_invocations_are_completions(make_front: Make) -> None:
    engine = EmulatedEngine()
    front = await make_front(engine)
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    _, _, answer = await front.post("/invocations", chat)
    assert answer["object"] == "chat.completion"
    lines = await front.lines("/invocations", {"prompt": "hello", "max_tokens": 2, "stream": True})
    assert lines[-1] == b"data: [DONE]"
    assert [path for path, _ in engine.heads] == [b"/v1/chat/completions", b"/v1/completions"]


async def test_what_the_gateway_answers_itself(make_front: Make) -> None:
    front = await make_front(EmulatedEngine())
    assert (await front.get("/ping"))[0] == 200
    assert json.loads((await front.get("/load"))[1]) == {"server_load": 0}
    _, listed = await front.get("/v1/models")
    [entry] = json.loads(listed)["data"]
    status, one = await front.get(f"/v1/models/{entry['id']}")
    assert (status, json.loads(one)) == (200, entry)
    assert (await front.get("/v1/models/other"))[0] == 404
    _, document = await front.get("/openapi.json")
    paths = json.loads(document)["paths"]
    assert {path.decode() for path in (*FORMS, *AUXILIARY)} <= paths.keys()


def test_the_prompt_is_what_the_form_says() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "A" * 9000}}
    content = [{"type": "text", "text": "What is this?"}, image]
    body = {"system": "Be brief. " * 50, "messages": [{"role": "user", "content": content}]}
    size = prompt_size(parse_body(json.dumps(body).encode(), FORMS[MESSAGES.encode()]))
    assert size.parts == 1
    assert size.text_bytes["system"] > 500
    assert size.text_bytes["messages"] < 200
    other = {"input": "word " * 100, "instructions": None, "messages": "not a part"}
    size = prompt_size(parse_body(json.dumps(other).encode(), FORMS[RESPONSES.encode()]))
    assert size.text_bytes.keys() == {"input"}
