"""Whatever a body holds: it is refused in words, or can be written, queued, handed over, moved."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.conftest import Front, Make, table_of, until
from oserve.gateway.estimator import RequestEstimator
from oserve.gateway.http.body import (
    BodyFields,
    GenerateBody,
    as_flag,
    as_integer,
    parse_body,
    read_leniently,
    with_fields,
)
from oserve.gateway.http.errors import ApiError
from oserve.gateway.http.prompt import prompt_size
from oserve.gateway.stream.continuation import Continuation
from oserve.gateway.stream.continuation_fields import UnmovableError
from oserve.sim import EmulatedEngine, EngineSpeed, Mishap
from oserve.sim.fuzz import fuzzed_body
from oserve.sim.tokenizer_stub import BabblingTokenizer
from oserve.wire.caches import FIELD, giving, new_name, taking
from oserve.workload import PromptLengthEstimator

JSON = {"content-type": "application/json"}
LATIN_1 = '"prompt":"señor"'.encode("latin-1")
TRANSFERS = ("kv_transfer_params", "ec_transfer_params", "vllm_xargs")
OWN = giving(new_name())
TEXT = b'"model":"emulated","prompt":"a b c","max_tokens":3'


def parsed(body: bytes) -> GenerateBody | ApiError:
    try:
        return parse_body(body)
    except ApiError as error:
        return error


def one_by_one(body: bytes) -> BodyFields | ApiError:
    try:
        return read_leniently(body)
    except ApiError as error:
        return error


# -- pure -----------------------------------------------------------------------------------------
@given(
    st.one_of(st.binary(max_size=200), st.integers().map(lambda seed: fuzzed_body(Random(seed))))
)
def test_what_is_not_refused_can_be_written_judged_and_perhaps_moved(body: bytes) -> None:
    found = parsed(body)
    if isinstance(found, ApiError):
        assert found.status == 400
        assert json.loads(found.body())["error"]["message"]
        return
    size = prompt_size(found)
    assert 1 <= PromptLengthEstimator().estimate(size) < 10**9
    estimator = RequestEstimator()
    estimator.follow(table_of())
    estimator.estimate(found, path=b"/v1/completions", headers={}, prompt_tokens=1, arrived_s=0.0)
    sent = with_fields(found, priority=7, model="m", token_ids=True, cache=giving(new_name()))
    fields = msgspec.json.decode(sent, type=dict[str, msgspec.Raw])
    assert bytes(fields["priority"]) == b"7"
    assert bytes(fields["model"]) == b'"m"'
    for name, raw in found.fields.items():
        if name not in {"priority", "model", "stream_options", "return_token_ids", FIELD}:
            assert bytes(fields[name]) == bytes(raw)
    for chat in (False, True):
        try:
            carried = Continuation(found.fields, chat=chat)
        except UnmovableError:
            continue
        carried.prompt = [1]
        json.loads(carried.continuation())


NAMES = (*msgspec.structs.asdict(BodyFields()), "temperature", "seed")
SPELT = (
    st.sampled_from(
        [
            *(b"null", b"true", b"0", b"1.0", b"7", b"1e3", b"1e400", b"-1", b'"yes"', b'"5"'),
            *(b'"\\ud83d\\ude00"', b"{}", b"[]", b'{"include_usage":true}', b"9" * 30, b"9" * 500),
        ]
    )
    | st.integers().map(lambda number: b"%d" % number)
    | st.text(max_size=5).map(msgspec.json.encode)
)


@given(st.lists(st.tuples(st.sampled_from(NAMES), SPELT), max_size=6))
def test_a_body_read_at_once_is_what_reading_field_by_field_finds(
    members: list[tuple[str, bytes]],
) -> None:
    body = b"{%b}" % b", ".join(b'"%b": %b' % (name.encode(), raw) for name, raw in members)
    found = parsed(body)
    lenient = one_by_one(body)
    if isinstance(lenient, ApiError):
        assert isinstance(found, ApiError)
        assert found.param == lenient.param
        return
    if isinstance(found, ApiError):
        # Of what is read only where it is given.
        assert (found.param or "").partition(".")[0] in {*TRANSFERS, "stream_options"}
        return
    for name, value in msgspec.structs.asdict(lenient).items():
        one = getattr(found.read, name)
        assert (bytes(one) == bytes(value)) if isinstance(value, msgspec.Raw) else one == value, (
            name
        )


@given(
    st.dictionaries(st.sampled_from(["prompt", "user", "x", "seed"]), st.text(max_size=4)),
    st.sampled_from([None, 0, 7]),
    st.booleans(),
    st.sampled_from(["{}", " {}\n", "%s"]),
)
def test_fields_are_added_as_if_the_body_were_written_anew(
    fields: dict[str, str], priority: int | None, stream: bool, form: str
) -> None:
    given_ = {**fields, "stream": stream}
    text = form % json.dumps(given_) if "%" in form else form
    body = parse_body(text.encode())
    sent = json.loads(with_fields(body, priority=priority, model="", token_ids=True, cache=OWN))
    expected = {**json.loads(text), "return_token_ids": True, FIELD: OWN}
    if priority is not None:
        expected["priority"] = priority
    if body.stream:
        expected["stream_options"] = {"include_usage": True}
    assert sent == expected


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)


@given(VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=5), VALUES))
@settings(max_examples=40)
def test_what_else_a_body_holds_reaches_the_engine_as_it_is(value: Any) -> None:
    text = json.dumps({"prompt": "a", "x": value, "stream": True, "priority": 3})
    sent = with_fields(parse_body(text.encode()), priority=None, model="other")
    assert json.loads(sent) == {
        "prompt": "a",
        "x": value,
        "stream": True,
        "model": "other",
        "stream_options": {"include_usage": True},
    }


def test_a_body_that_needs_nothing_is_not_touched() -> None:
    body = b' {"prompt" : "a" } '
    assert with_fields(parse_body(body), priority=None, model="") == body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{" + LATIN_1 + b"}", "byte 13 is not UTF-8"),
        (b'{"user":"se\xf1or"}', "byte 11 is not UTF-8"),
        (b'{"x":"\xed\xa0\x80"}', "byte 6 is not UTF-8"),
        (rb'{"x":"\ud800"}', "half of a surrogate pair (byte 6)"),
        (rb'{"x":"\udc00"}', "half of a surrogate pair"),
        (b'{"x":NaN}', "byte 5"),
        (b'{"x":Infinity}', "byte 5"),
        (b'{"x":"a\x00b"}', "byte 7"),
        (b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        ('{"x":1}'.encode("utf-16"), "not UTF-8"),
        ('{"x":1}'.encode("utf-16-le"), "byte 1"),
        (b"[1]", "object"),
        (b"", "truncated"),
        (b'{"max_tokens":1e400}', "`max_tokens`"),
        (b'{"max_tokens":' + b"9" * 5000 + b"}", "`max_tokens`"),
        (b'{"max_tokens":1.5}', "`max_tokens`"),
        (b'{"stream":2}', "`stream`"),
        (b'{"stream":[[[]]]}', "`stream`"),
        (b'{"model":5}', "`model`"),
        (b'{"stream_options":[]}', "`stream_options`"),
        (b'{"stream_options":{"include_usage":7}}', "`stream_options.include_usage`"),
        (b'{"kv_transfer_params":5}', "`kv_transfer_params`"),
        (b'{"kv_transfer_params":{"do_remote_prefill":true}}', "do_remote_prefill"),
        (b'{"kv_transfer_params":{"remote_host":"h"}}', "remote_host"),
        (b'{"ec_transfer_params":{"a":1}}', "ec_transfer_params.a"),
        (b'{"vllm_xargs":{"kv_transfer_params":"a"}}', "vllm_xargs.kv_transfer_params"),
    ],
)
def test_refusals_name_the_place(body: bytes, words: str) -> None:
    error = parsed(body)
    assert isinstance(error, ApiError)
    assert words in error.message


@pytest.mark.parametrize("stop", [b"1", b"[1]", b"{}", b'["a",null]', b"true"])
def test_a_stop_that_is_no_text_keeps_a_stream_from_moving(stop: bytes) -> None:
    with pytest.raises(UnmovableError, match="stop"):
        Continuation(parse_body(b'{"prompt":"a","stop":%b}' % stop).fields, chat=False)


def test_engines_spellings_are_understood() -> None:
    assert [as_flag(word) for word in ("Yes", "0", "off", 1, 0.0, "T")] == [
        *(True, False, False, True, False, True)
    ]
    assert [as_integer(word) for word in (5, 5.0, "5", " 1_0 ", "3.0", True)] == [5, 5, 5, 10, 3, 1]
    body = parse_body(b'\xef\xbb\xbf{"stream":"true","max_tokens":"7","echo":"no","priority":null}')
    assert (body.stream, body.output_limit, body.echo, body.priority) == (True, 7, False, None)
    # The last of a key that stands twice counts, as in Python.
    assert parse_body(b'{"max_tokens":3,"max_tokens":4}').output_limit == 4
    assert parse_body(rb'{"max\u005ftokens":4}').output_limit == 4


@pytest.mark.parametrize("digits", [1, 20, 400])
def test_lengths_that_no_engine_has_can_be_computed_with(digits: int) -> None:
    for body in (b'{"max_tokens":%b}', b'{"max_tokens":-%b}', b'{"max_completion_tokens":%b}'):
        limit = parse_body(body % (b"9" * digits)).output_limit
        assert limit is not None
        assert 1 <= limit <= 1 << 31


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (b"", {"include_usage": True}),
        (b',"stream_options":null', {"include_usage": True}),
        (b',"stream_options":{"a":1e400}', None),
        (
            b',"stream_options":{"continuous_usage_stats":true}',
            {"continuous_usage_stats": False, "include_usage": True},
        ),
        (
            b',"stream_options":{"continuous_usage_stats":true,"include_usage":true}',
            {"continuous_usage_stats": True, "include_usage": True},
        ),
    ],
)
def test_usage_in_between_is_for_who_asks_for_usage(options: bytes, sent: Any) -> None:
    body = with_fields(parse_body(b'{"stream":true%b}' % options), priority=None, model="")
    if sent is not None:
        assert json.loads(body)["stream_options"] == sent
    else:
        assert b'{"a":1e400,"include_usage":true}' in body


def test_caches_are_asked_for_by_nobody_but_us() -> None:
    harmless = b'{"prompt":"a","kv_transfer_params":{"do_remote_prefill":false,"remote_host":null}}'
    assert with_fields(parse_body(harmless), priority=None, model="", cache={}) == harmless
    own = giving(new_name()) | taking(new_name())
    sent = with_fields(parse_body(harmless), priority=None, model="", cache=own)
    assert json.loads(sent)[FIELD] == own


# -- prompts --------------------------------------------------------------------------------------
def size_of(body: dict[str, Any]) -> Any:
    return prompt_size(parse_body(json.dumps(body).encode()))


def test_all_that_goes_into_a_prompt_counts() -> None:
    messages = [{"role": "user", "content": "hello"}]
    plain = size_of({"messages": messages})
    tool = {"type": "function", "function": {"name": "f", "description": "word " * 12_000}}
    for name, value in (("tools", [tool]), ("documents", [{"text": "a " * 900}])):
        size = size_of({"messages": messages, name: value})
        assert size.text_bytes[name] == len(json.dumps(value))
        assert size.text_bytes["messages"] == plain.text_bytes["messages"]
        assert PromptLengthEstimator().estimate(size) > len(json.dumps(value)) // 5
    assert size_of({"messages": messages, "metadata": "a" * 999}) == plain
    assert size_of({"prompt": [1, 2, 3]}).tokens == 3
    assert size_of({"prompt": [[1, 2], [3]]}).tokens == 3
    assert size_of({"prompt": ["a b", "c"]}).text_bytes["prompt"] == len('["a b", "c"]')
    assert size_of({"prompt": "a" * 99, "truncate_prompt_tokens": 5}).most_tokens == 5
    # However it is written: escapes are not longer texts.
    assert size_of({"prompt": "日" * 100}).text_bytes == {"prompt": 302}


def test_an_image_is_no_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 90_000}}
    sound = {"type": "input_audio", "input_audio": {"data": "B" * 90_000, "format": "wav"}}
    text = {"type": "text", "text": "what is this"}
    size = size_of({"messages": [{"role": "user", "content": [text, image, sound]}]})
    assert size.parts == 2
    assert size.text_bytes["messages"] < 200
    # The same as text is text.
    quoted = json.dumps(image)
    assert size_of({"messages": [{"role": "user", "content": quoted}]}).parts == 0


async def test_tools_make_a_request_long_and_spoil_nothing(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(max_model_len=1 << 20))
    messages = [{"role": "user", "content": "hello there " * 10}]
    tools = [{"type": "function", "function": {"name": "f", "description": "word " * 12_000}}]
    chat = {"model": "emulated", "messages": messages, "max_tokens": 2}
    _, headers, _ = await front.post("/v1/chat/completions", {**chat, "tools": tools})
    assert headers["x-oserve-workload-type"] == "long"
    lengths = front.gateway.runner.lengths
    before = lengths.tokens_per_byte("messages", 300)
    # The emulated engine counts messages only, as a template does that knows no tools.
    for _ in range(5):
        await front.post("/v1/chat/completions", {**chat, "tools": tools})
    assert lengths.tokens_per_byte("messages", 300) == before
    _, headers, _ = await front.post("/v1/chat/completions", {**chat, "tools": tools})
    assert headers["x-oserve-workload-type"] == "short"


# -- through the gateway --------------------------------------------------------------------------
@asynccontextmanager
async def faultless(front: Front) -> AsyncIterator[None]:
    """No exception reaches the loop, and in the end nothing is booked any more."""
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    yield
    runner = front.gateway.runner
    assert faults == []
    assert not runner.active
    assert not runner.queued
    assert all(count == 0 and work < 1e-9 for work, count in runner.outstanding().values())


async def answer(front: Front, body: bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
    async with front.session.post(front.url + path, data=body, headers=JSON) as found:
        return found.status, await found.read()


PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_inflight": 1},
        {"accepts_priority": False, "model": "renamed"},
        {"returns_token_ids": False, "max_inflight": 1},
    ],
)
async def test_every_body_is_answered_and_every_slot_freed(
    make_front: Make, options: dict[str, Any]
) -> None:
    draw = Random(str(options))
    engines = [
        EmulatedEngine(most_tokens=8, keep_bodies=False, tokenizer=BabblingTokenizer())
        for _ in "ab"
    ]
    front = await make_front(*engines, **options)
    table = front.gateway.runner.table
    statuses: Counter[int] = Counter()

    async def client() -> None:
        for _ in range(25):
            for engine in front.engines:
                if draw.random() < 0.2:
                    how = draw.choice(["break", "torn", "abort", "error"])
                    engine.mishaps.append(Mishap(after=draw.randint(0, 6), how=how))
            if draw.random() < 0.2:
                front.gateway.runner.update(table)
            status, _ = await answer(front, fuzzed_body(draw), draw.choice(PATHS))
            statuses[status] += 1

    async with faultless(front):
        await asyncio.gather(*(client() for _ in range(8)))
    assert sum(statuses.values()) == 200
    assert statuses[500] == 0
    assert statuses[200] > 20


async def test_hand_overs_while_odd_bodies_run(make_front: Make) -> None:
    draw = Random(5)
    speed = EngineSpeed(ttft_s=0.001, tpot_s=0.001)
    engines = [EmulatedEngine(most_tokens=30, keep_bodies=False, speed=speed) for _ in "abc"]
    front = await make_front(*engines, max_inflight=3)
    table = front.gateway.runner.table
    done = False

    async def operator() -> None:
        while not done:
            front.gateway.runner.hand_over(draw.choice(["r0", "r1", "r2"]), 0.0)
            await asyncio.sleep(0.002)
            again = [replace(item, started_s=item.started_s + 1.0) for item in table.replicas]
            front.gateway.runner.update(replace(table, replicas=tuple(again)))
            await asyncio.sleep(0.002)
            front.gateway.runner.update(table)

    async def client() -> None:
        for _ in range(15):
            odd = fuzzed_body(draw)
            more = b',"x":' + odd if draw.random() < 0.1 else b',"seed":"5","min_tokens":"3"'
            body = b"{" + TEXT.replace(b":3", b':"30"') + b',"stream":true' + more + b"}"
            status, _ = await answer(front, body if draw.random() < 0.7 else odd)
            assert status != 500

    async with faultless(front):
        task = asyncio.ensure_future(operator())
        await asyncio.gather(*(client() for _ in range(8)))
        done = True
        await task


@pytest.mark.parametrize(
    "body",
    [
        b"{" + LATIN_1 + b',"priority":1}',
        b"{" + LATIN_1 + b',"stream":true,"stream_options":{}}',
        b"{" + LATIN_1 + b"}",
        b'{"prompt":"a","user":"se\xf1or"}',
        b'{"prompt":"a","max_tokens":' + b"9" * 400 + b',"ignore_eos":true}',
        b'{"prompt":"a","x":1e400,"priority":1}',
    ],
)
async def test_the_bodies_that_were_not_answered(make_front: Make, body: bytes) -> None:
    """At a free replica, renamed, and queued while the routing table changes."""
    speed = EngineSpeed(ttft_s=0.05)
    front = await make_front(EmulatedEngine(speed=speed, most_tokens=4), max_inflight=1, model="m")
    table = front.gateway.runner.table
    async with faultless(front):
        calls = [asyncio.ensure_future(answer(front, body)) for _ in range(3)]
        good = asyncio.ensure_future(answer(front, b"{" + TEXT + b"}"))
        for _ in range(20):
            await asyncio.sleep(0)
            front.gateway.runner.update(table)
        expected = 200 if body.isascii() else 400
        assert {(await call)[0] for call in calls} == {expected}
        assert (await good)[0] == 200


class Faulty:
    """Stands in for a part of the gateway that has a fault of its own."""

    def __init__(self, owner: Any, name: str, times: int) -> None:
        self._real, self._left = getattr(owner, name), times
        setattr(owner, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._left > 0:
            self._left -= 1
            raise KeyError("a user's text")
        return self._real(*arguments, **options)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("fleet", "closed"),
        ("fleet", "book"),
        ("machine", "handle"),
        ("estimator", "estimate"),
        ("estimator", "ended"),
        ("tally", "arrived"),
        ("lengths", "estimate"),
        ("lengths", "learn"),
        ("router", "pick"),
        ("affinity", "sent"),
        ("ledger", "admit"),
    ],
)
async def test_a_fault_of_ours_ends_one_request(
    make_front: Make, part: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    front = await make_front(EmulatedEngine())
    runner = front.gateway.runner
    owners = {
        "runner": runner,
        "machine": runner.machine,
        "fleet": runner.machine.fleet,
        "estimator": runner.estimator,
        "tally": runner.estimator.tally,
        "lengths": runner.lengths,
        "router": runner.machine.fleet._router,
        "affinity": runner.machine.fleet._affinity,
        "ledger": runner.machine.fleet.ledger,
    }
    async with faultless(front):
        Faulty(owners[part], name, 1)
        body = b"{" + TEXT + b',"stream":true}'
        async with front.session.post(
            front.url + "/v1/completions", data=body, headers=JSON | {"x-request-id": "mine"}
        ) as found:
            text = await found.read()
            # What is learned and counted of a request that has ended is nothing to its client.
            late = name in {"ended", "learn"}
            assert found.status == (200 if late else 500)
            assert late or json.loads(text)["error"]["code"] == "internal_error"
        assert "KeyError" in caplog.text
        assert "'mine'" in caplog.text
        assert "a user's text" not in caplog.text
        assert (await answer(front, body))[0] == 200


async def test_a_fault_in_the_middle_of_a_stream_ends_it_with_an_event(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(speed=EngineSpeed(tpot_s=0.001), most_tokens=50))
    async with faultless(front):
        body = b"{" + TEXT.replace(b":3", b":50") + b',"stream":true}'
        async with front.session.post(
            front.url + "/v1/completions", data=body, headers=JSON
        ) as found:
            seen = await found.content.readany()
            (session,) = front.gateway.runner.active.values()
            assert session._reader is not None
            Faulty(session._reader, "_take", 1)
            seen += await found.content.read()
        assert b"internal_error" in seen.rsplit(b"data: ", 1)[1]
        assert b"[DONE]" not in seen


async def test_a_fault_while_it_waits_ends_one_request(make_front: Make) -> None:
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.05))
    front = await make_front(engine, max_inflight=1)
    runner = front.gateway.runner
    async with faultless(front):
        body = b"{" + TEXT + b"}"
        calls = [asyncio.ensure_future(answer(front, body)) for _ in range(4)]
        await until(lambda: runner.queued == 3)
        Faulty(runner.machine.fleet, "book", 1)
        statuses = sorted([(await call)[0] for call in calls])
        assert statuses == [200, 200, 200, 500]
