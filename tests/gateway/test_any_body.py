"""Whatever a body holds is refused with a reason or served: nothing that reads it raises else."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.conftest import table_of, table_replica
from oserve.control.dispatch.table import RoutingTable
from oserve.core import Caller, Request, Tier
from oserve.gateway.estimator import RequestEstimator
from oserve.gateway.http.api_form import AUXILIARY, FORMS, ApiForm, invoked_form
from oserve.gateway.http.body import BodyFields, GenerateBody, parse_body
from oserve.gateway.http.errors import ApiError
from oserve.gateway.http.prompt import prompt_size
from oserve.gateway.stream.continuation import Continuation
from oserve.gateway.stream.continuation_fields import (
    _COPIED,
    _DROPPED,
    _NEUTRAL,
    UnmovableError,
    completion_fields,
    migration_obstacle,
    values_of,
)
from oserve.gateway.stream.migration import StreamMigration
from oserve.gateway.stream.replay_buffer import ReplayBudget
from oserve.gateway.tiers import promise_of, service_tier_of
from oserve.gateway.upstream_request import Outgoing, request_bytes, requests_only_usage
from oserve.workload import PromptLengthEstimator

NAMES = sorted(
    {
        *BodyFields.__struct_fields__,
        *_COPIED,
        *_DROPPED,
        *_NEUTRAL,
        "other",
        "",
        "input",
        "system",
        "instructions",
        "query",
        "items",
        "max_output_tokens",
    }
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
    | st.sampled_from(["true", "1e3", "1_0", "text", "flex", "auto", "content", "\ud83d\ude00"])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "type", "text", "role", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
# Often what engines accept, so that all else of the body is looked at as well.
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": ANYTHING}))
BODIES = st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=5)
CHATS = st.builds(lambda body, messages: body | {"messages": messages}, BODIES, MESSAGES)
TIERED = (Tier(name="t", service_tier="flex", e2e_s=3.0),)
TABLE = table_of(table_replica("r0", "http://r0"), tiers=TIERED, default_tier="t")


def parsed_of(body: dict[str, Any], form: ApiForm) -> GenerateBody | None:
    try:
        return parse_body(json.dumps(body).encode(), form)
    except ApiError:
        return None


def arrives(table: RoutingTable, parsed: GenerateBody) -> None:
    """What is done with a body when its request comes."""
    try:
        promise = promise_of(table, Caller(), {}, parsed)
    except ApiError:
        return
    tokens = PromptLengthEstimator().estimate(prompt_size(parsed))
    estimator = RequestEstimator()
    estimator.follow(table)
    estimate = estimator.estimate(
        parsed, path=b"/v1/completions", headers={}, prompt_tokens=tokens, arrived_s=1.0
    )
    request = Request(
        id="1",
        arrival_s=0.0,
        workload_type=estimate.kind,
        prompt_tokens=tokens,
        output_tokens=estimate.output_tokens,
        promise=promise,
    )
    service_tier_of(request, parsed)
    requests_only_usage(parsed)
    for salt in ("", "salt"):
        outgoing = Outgoing(
            method=b"POST",
            path=b"/",
            headers={},
            request_id=b"1",
            body=parsed.source,
            parsed=parsed,
            token_ids=True,
            cache_salt=salt,
        )
        sent = request_bytes(outgoing, table.replicas[0], rank_s=1.0, stream_options=False)
        body = msgspec.json.decode(sent.partition(b"\r\n\r\n")[2])
        assert not salt or body["cache_salt"] == salt


@settings(max_examples=300)
@given(BODIES | CHATS, st.sampled_from([*FORMS.values(), *AUXILIARY.values()]))
def test_a_body_is_refused_or_served_and_its_stream_moves_or_stays(
    body: dict[str, Any], form: ApiForm
) -> None:
    parsed = parsed_of(body, form)
    if parsed is None:
        return
    invoked_form(set(parsed.fields))
    arrives(TABLE, parsed)
    if not form.is_completion:
        return
    chat = form.is_chat
    movable = StreamMigration(
        parsed.fields, ReplayBudget(10**6, 10**6), chat=chat, shows_ids=False
    ).movable
    try:
        Continuation(parsed.fields, chat=chat)
    except UnmovableError:
        assert not movable
        return
    assert movable
    values = values_of(parsed.fields, chat=chat)
    for made in (0, 3):
        msgspec.json.encode(completion_fields(values, chat=chat, made=made, sampled=True))


@pytest.mark.parametrize("messages", [5, True, 1.5, "text", {"role": "user"}])
def test_messages_that_are_no_list_keep_a_stream_where_it_is(messages: object) -> None:
    assert migration_obstacle({"messages": messages}, chat=True) == "its messages are no list"
    assert not migration_obstacle({"messages": [3, None, "x", {"content": 4}]}, chat=True)
