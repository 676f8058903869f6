"""What one stream comes to, whatever server wrote it and however it was cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.cli.answers import USUAL, ApiDialect, BenchAnswer, error_message
from oserve.traces import FailureKind, OutcomeStatus

LOOSE = ApiDialect(done=False, usage=False, exact=False)


def event(delta: object, reason: str | None = None, **more: object) -> bytes:
    return (
        b"data: "
        + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}], **more}).encode()
    )


def usage(tokens: int, **details: int) -> bytes:
    counts = {"prompt_tokens": 3, "completion_tokens": tokens}
    told = {**counts, "completion_tokens_details": details or None}
    return b"data: " + json.dumps({"choices": [], "usage": told}).encode()


def heard(*events: bytes, line: bytes = b"\n", last: bytes = b"\n\n") -> BenchAnswer:
    """Events come a second apart, the first at 1 s."""
    answer = BenchAnswer()
    for at, one in enumerate(events, start=1):
        ending = last if at == len(events) else b"\n\n"
        answer.feed((one + ending).replace(b"\n", line), float(at))
    answer.end(float(len(events)))
    return answer


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_output_and_no_answer(name: str) -> None:
    answer = heard(
        event({"role": "assistant", "content": ""}),
        event({name: "hm"}),
        event({name: "so", "content": None}),
        event({"content": "Yes"}),
        event({"content": "."}, "length"),
        usage(4, reasoning_tokens=2),
        b"data: [DONE]",
    )
    assert answer.verdict(4, USUAL) == (OutcomeStatus.COMPLETED, "")
    assert (answer.first_s, answer.first_answer_s, answer.last_s) == (2.0, 4.0, 5.0)
    assert answer.gaps == [1.0, 1.0, 1.0]
    assert answer.reasoned
    assert answer.usage is not None
    assert answer.usage.reasoning_tokens == 2


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"},
        {"content": [{"type": "text", "text": "x"}]},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f"}},
        {"refusal": "no"},
        {"audio": {"data": "AAAA"}},
    ],
)
def test_whatever_carries_output_counts(delta: dict[str, object]) -> None:
    answer = heard(event({"role": "assistant", "content": ""}), event(delta), event({}, "stop"))
    assert (answer.first_s, answer.first_answer_s, answer.last_s) == (2.0, 2.0, 3.0)
    assert not answer.reasoned


def test_an_answer_that_never_stops_reasoning_has_no_first_answer_token() -> None:
    answer = heard(event({"reasoning": "hm"}), event({"reasoning": "hm"}, "length"))
    assert (answer.first_s, answer.first_answer_s) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("events", "dialect", "status", "words"),
    [
        ([event({"content": "x"}, "length"), usage(4)], USUAL, "truncated", "[DONE]"),
        ([event({"content": "x"}, "length"), usage(4)], LOOSE, "completed", ""),
        ([event({"content": "x"}), usage(4)], LOOSE, "truncated", "finish reason"),
        ([event({"content": "x"}, "length")], LOOSE, "completed", ""),
        ([event({"content": "x"}, "stop"), usage(2)], LOOSE, "completed", ""),
        ([event({"content": "x"}, "length"), usage(2)], LOOSE, "truncated", "tokens"),
        ([event({"content": "x"}, "abort"), usage(4)], LOOSE, "truncated", "aborted it"),
        ([b'data: {"error": {"message": "boom"}}'], LOOSE, "failed", "boom"),
        ([b'data: {"object": "error", "message": "boom", "code": 400}'], LOOSE, "failed", "boom"),
        ([b'event: error\ndata: {"message": "boom"}'], LOOSE, "failed", "boom"),
        ([b"event: error\ndata: boom"], LOOSE, "failed", "boom"),
        ([b"data: {"], LOOSE, "failed", "bad event"),
        ([b"data: " + b"[" * 5000], LOOSE, "failed", "bad event"),
        ([b'data: {"choices": null, "usage": {"completion_tokens": 4}}'], LOOSE, "truncated", ""),
    ],
)
def test_verdicts(events: list[bytes], dialect: ApiDialect, status: str, words: str) -> None:
    found, reason = heard(*events).verdict(4, dialect)
    assert found == OutcomeStatus(status)
    assert words in reason


def test_the_first_failure_stays_and_a_break_after_tokens_is_a_truncation() -> None:
    answer = heard(event({"content": "x"}))
    answer.fail(FailureKind.CONNECTION, "broke")
    answer.fail(FailureKind.TIMEOUT, "late")
    assert answer.verdict(4, USUAL) == (OutcomeStatus.TRUNCATED, "broke")
    answer = heard(b": waiting")
    answer.fail(FailureKind.CONNECTION, "broke")
    assert answer.verdict(4, USUAL) == (OutcomeStatus.FAILED, "broke")


EVENTS = [
    b": a comment",
    event({"role": "assistant", "content": ""}),
    event({"content": "\u2028x"}),
    b'id: 7\nevent: chunk\ndata: {"choices": [{"text": "y",\ndata: "finish_reason": null}]}',
    b'data:{"choices":[{"text":"z","finish_reason":"length"}]}',
    usage(3),
    b"data: [DONE]",
]


@given(st.data(), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.booleans(), st.booleans())
def test_line_ends_and_cuts_change_nothing(
    data: st.DataObject, line: bytes, mark: bool, last: bool
) -> None:
    stream = b"\xef\xbb\xbf" * mark + b"\n\n".join(EVENTS) + b"\n\n" * last
    stream = stream.replace(b"\n", line)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    answer = BenchAnswer()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        answer.feed(stream[start:end], 1.0)
    answer.end(1.0)
    assert answer.verdict(3, USUAL) == (OutcomeStatus.COMPLETED, "")
    assert len(answer.gaps) == 2


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_are_a_stream_or_a_failure(parts: list[bytes]) -> None:
    answer = BenchAnswer()
    for part in parts:
        answer.feed(b"data: " + part + b"\n\n", 1.0)
    answer.end(1.0)
    assert answer.verdict(1, LOOSE)[0] in OutcomeStatus


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "too long"}', "too long"),
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        (b'{"detail": [{"loc": ["body"], "detail": []}]}', "body"),
        (b"<html>nginx</html>", "nginx"),
        (b"\xff\xfe", "\ufffd"),
        (b"", ""),
        (b"[" * 5000, "["),
    ],
)
def test_messages_of_errors(body: bytes, words: str) -> None:
    assert words in error_message(body)
    assert len(error_message(body)) <= 200
