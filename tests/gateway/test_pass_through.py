"""What a client gets of a stream does not depend on how the server wrote it."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oserve.gateway.stream.answer import read_answer, shown, trouble_of, usage_in, usage_of
from oserve.gateway.stream.pass_through import PassThrough
from oserve.gateway.stream.replay_buffer import ReplayBudget, ReplayBuffer
from oserve.wire import Dechunker, chunk
from oserve.wire.events import EventReader
from oserve.wire.framing import LAST_CHUNK

IDS = st.one_of(st.none(), st.lists(st.integers(0, 2**31), max_size=4))
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ['"usage":{', "\n\ndata: [DONE]\n\n", "[DONE]", '"token_ids":[1,2]', "\\u0022"]
    ),
)


@st.composite
def events(draw: st.DrawFn) -> dict[str, Any]:
    """An event in the form of an answer, or something like it."""
    event: dict[str, Any] = {"id": "1", "object": draw(st.sampled_from(["text_completion", "x"]))}
    if draw(st.integers(0, 9)):
        choices = []
        for index in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
            choice: dict[str, Any] = {"index": index, "text": draw(TEXTS)}
            choice["finish_reason"] = draw(st.sampled_from([None, None, "stop", "length"]))
            if draw(st.booleans()):
                choice["prompt_token_ids"] = draw(IDS)
            if draw(st.booleans()):
                choice["token_ids"] = draw(IDS)
            if draw(st.booleans()):
                choice["more"] = {"usage": {"prompt_tokens": 1}, "error": 1, "token_ids": [9, 9]}
            choices.append(choice)
        event["choices"] = choices
    if draw(st.booleans()):
        event["usage"] = draw(st.sampled_from([None, {"prompt_tokens": 3, "completion_tokens": 2}]))
    if draw(st.integers(0, 9)) == 0:
        event["prompt_token_ids"] = draw(IDS)
    if draw(st.integers(0, 9)) == 0:
        event["error"] = None
    return event


def expected(event: dict[str, Any], *, hide_usage: bool, hide_ids: bool) -> dict[str, Any] | None:
    """What the client is to get of an event, from its meaning alone."""
    told: dict[str, Any] = json.loads(json.dumps(event))
    if hide_usage and told.get("usage") is not None:
        if not told.get("choices"):
            return None
        del told["usage"]
    if hide_ids:
        for item in (told, *told.get("choices", ())):
            for name in ("token_ids", "prompt_token_ids"):
                if item.get(name) is not None:
                    item[name] = None
    return told


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    points = sorted({min(mark, len(data)) for mark in marks} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(points)]


def passed(passing: PassThrough, pieces: list[bytes], *, chunked: bool) -> bytes:
    """The client's body, its chunks taken off."""
    told = b""
    for piece in pieces:
        told += passing.take(piece, chunked=chunked)
    told += passing.end()
    return Dechunker().feed(told)


def heard(body: bytes) -> list[Any]:
    reader = EventReader()
    found = [event.data for event in reader.feed(body)]
    assert reader.end() is None
    assert b"\r" not in body
    return [
        data.decode() if data == b"[DONE]" else json.loads(data)
        for data in found
        if data is not None
    ]


@given(
    st.lists(st.one_of(events(), st.none()), max_size=8),
    st.sampled_from(["vllm", "spaces", "ascii"]),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.sampled_from(["whole", "several", "any", "none"]),
    st.lists(st.integers(0, 2000), max_size=10),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_fast_way_and_the_slow_way_tell_the_same(
    told: list[dict[str, Any] | None],
    style: str,
    end: bytes,
    chunks: str,
    marks: list[int],
    hide_usage: bool,
    keeps: bool,
    shows_ids: bool,
) -> None:
    blocks = []
    for event in told:
        if event is None:
            blocks.append(b": ping" + end * 2)
            continue
        tight = {"separators": (",", ":")} if style == "vllm" else {}
        text = json.dumps(event, ensure_ascii=style == "ascii", **tight)  # type: ignore[arg-type]
        blocks.append(b"data: " + text.encode() + end * 2)
    blocks.append(b"data: [DONE]" + end * 2)
    payload = b"".join(blocks)
    if chunks == "none":
        pieces = cut(payload, marks)
    else:
        cuts = blocks if chunks in {"whole", "several"} else [p for p in cut(payload, marks) if p]
        body = b"".join(map(chunk, cuts)) + LAST_CHUNK
        pieces = [*map(chunk, cuts), LAST_CHUNK] if chunks == "whole" else cut(body, marks)
    kept = ReplayBuffer(ReplayBudget(1 << 20, 1 << 20)) if keeps else None
    passing = PassThrough(hide_usage=hide_usage, replay=kept, shows_ids=shows_ids or not keeps)
    hide_ids = keeps and not shows_ids
    # Where the client's body is in chunks, so is what it gets of a body without.
    got = heard(passed(passing, pieces, chunked=chunks != "none"))
    wanted = [
        item
        for event in told
        if event is not None
        and (item := expected(event, hide_usage=hide_usage, hide_ids=hide_ids)) is not None
    ]
    assert got == [*wanted, "[DONE]"]
    assert passing.done
    assert passing.events == sum(bool(event and event.get("choices")) for event in told)
    counts = [event["usage"] for event in told if event and event.get("usage")]
    assert usage_of(passing.usage).output_tokens == (2 if counts else None)
    if kept is not None:
        everything = [json.loads(data) for data in kept._events]
        assert everything == [event for event in told if event is not None]
        assert kept.done


def test_vllms_form_passes_as_the_bytes_it_came_in() -> None:
    text = b'{"id":"c","choices":[{"index":0,"text":" a","finish_reason":null,"token_ids":[1234]}]}'
    piece = chunk(b"data: " + text + b"\n\n")
    for kept, shows, after in (
        (None, True, piece),
        (ReplayBuffer(ReplayBudget(9999, 9999)), True, piece),
        (ReplayBuffer(ReplayBudget(9999, 9999)), False, piece.replace(b"[1234]", b"null  ")),
    ):
        passing = PassThrough(hide_usage=True, replay=kept, shows_ids=shows)
        # The first is read the slow way: it might begin with a byte order mark.
        assert passing.take(piece, chunked=True)
        for count in (1, 3):
            assert passing.take(piece * count, chunked=True) == after * count


@pytest.mark.parametrize("end", [b"\n\n", b" \n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("name", [b"data: ", b"data:"])
def test_trouble_is_held_back_until_it_is_let_through(end: bytes, name: bytes) -> None:
    trouble = b'{"error": {"message": "died", "code": 500}}'
    for before in range(3):
        texts = [b'{"choices": [{"text": "a"}]}'] * before + [trouble, b"[DONE]"]
        passing = PassThrough(hide_usage=True)
        told = passing.take(b"".join(name + text + end for text in texts), chunked=False)
        assert told.count(b"choices") == before
        assert b"died" not in told
        assert passing.trouble is not None
        assert passing.trouble.status == 500
        assert passing.take(b": more" + end, chunked=False) == b""
        rest = Dechunker().feed(passing.forward_error())
        assert rest.index(b"died") < rest.index(b"[DONE]") < rest.index(b"more")


@pytest.mark.parametrize(
    ("text", "status", "of_client"),
    [
        ('{"error":{"message":"logprobs","type":"BadRequestError","code":400}}', 400, True),
        ('{"error": {"message": "died", "type": "InternalServerError", "code": 500}}', 500, False),
        ('{"error":{"message":"m","type":"invalid_request_error","code":"context"}}', 400, True),
        ('{"error":{"message":"m","type":"x","code":"context_length_exceeded"}}', 400, True),
        ('{"error":{"message":"m","type":"server_error","code":null}}', 500, False),
        ('{"error":{"message":"m","code":"429"}}', 429, False),
        ('{"error":{"message":"m","http_status_code":422}}', 422, True),
        ('{"error":"Input validation error","error_type":"validation"}', 400, True),
        ('{"error":"Request failed during generation","error_type":"generation"}', 500, False),
        ('{"error":"Model is overloaded","error_type":"overloaded"}', 429, False),
        ('{"object":"error","message":"old","type":"BadRequestError","code":400}', 400, True),
        ('{"object":"error","message":"old","code":500}', 500, False),
        ('{"error":{}}', 500, False),
        ('{"error":true}', 500, False),
        ('{"choices":[{"finish_reason": "abort"}]}', 503, False),
    ],
)
def test_errors_of_all_forms_are_told_apart(text: str, status: int, of_client: bool) -> None:
    answer = read_answer(text.encode())
    assert answer is not None
    trouble = trouble_of(answer)
    assert trouble is not None
    assert (trouble.status, trouble.of_client) == (status, of_client)


@pytest.mark.parametrize(
    "text",
    [
        '{"choices":[]}',
        '{"error":null}',
        '{"choices":[{"text":"\\"error\\":{"}]}',
        '{"choices":[{"finish_reason":5,"text":"abort"}],"usage":3}',
        '{"choices":"x","object":1}',
        '{"choices":[1,null]}',
    ],
)
def test_what_is_no_error(text: str) -> None:
    answer = read_answer(text.encode())
    assert answer is not None
    assert trouble_of(answer) is None


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"7", b"{", b"\xff", b"[" * 9999, b'"x"'])
def test_what_is_no_answer_means_nothing(text: bytes) -> None:
    assert read_answer(text) is None


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "usage",
                        "error",
                        "object",
                        "token_ids",
                        "prompt_token_ids",
                        "x",
                        "prompt_tokens",
                        "finish_reason",
                        "code",
                        "type",
                        "message",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
@example({"usage": math.inf})
def test_no_json_makes_it_stumble(value: Any) -> None:
    text = json.dumps(value).encode()
    answer = read_answer(text)
    if answer is None:
        assert not isinstance(value, dict)
        return
    trouble_of(answer)
    usage_of(answer.usage)
    for hide in (False, True):
        told = shown(text, answer, hide_usage=hide, hide_ids=hide)
        if told is not None and hide:
            fields = json.loads(told)
            assert fields.get("usage") is None
            assert fields.get("prompt_token_ids") is None
    got = passed(PassThrough(hide_usage=True), [b"data: " + text + b"\n\n"], chunked=False)
    assert got == b"" or got.startswith(b"data: ") or isinstance(value, dict)


def test_usage_in_the_tail_of_a_long_answer() -> None:
    for text in (
        b'..."usage": {"prompt_tokens" : 12, "x": {"y": 1}, "completion_tokens": 3}}',
        b'"usage":{"completion_tokens":3,"prompt_tokens":12}',
    ):
        usage = usage_in(text)
        assert (usage.prompt_tokens, usage.output_tokens) == (12, 3)
    assert usage_in(b"nothing").prompt_tokens is None
