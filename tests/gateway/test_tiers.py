"""Tiers as a client sees them: who gets which, what is echoed, recorded and refused."""

import json
from pathlib import Path

import pytest

from gateway.conftest import Make, table_of, table_replica
from oserve.control.dispatch.table import RoutingTable
from oserve.core import Caller, OverloadAction, PlannedType, Precision, Tier
from oserve.gateway.http.body import parse_body
from oserve.gateway.http.errors import ApiError
from oserve.gateway.records import RecordStore, read_records
from oserve.gateway.tiers import promise_of
from oserve.sim import EmulatedEngine

TIGHT = Tier(name="tight", ttft_s=30.0, precisions=(Precision.BF16,), service_tier="priority")
NORMAL = Tier(name="normal", ttft_s=60.0)
BULK = Tier(name="bulk", service_tier="flex", overload=OverloadAction.SHED)
TIERS = (TIGHT, NORMAL, BULK)
TABLE = RoutingTable(
    plan_id="p",
    length_classes=(),
    routing_shares={},
    replicas=(),
    tiers=TIERS,
    default_tier="normal",
)
TEXT = {"model": "emulated", "prompt": "hello there", "max_tokens": 5}


def tier_of(caller: Caller, headers: dict[bytes, bytes], body: dict[str, object]) -> str:
    promise = promise_of(TABLE, caller, headers, parse_body(json.dumps(body).encode()))
    assert promise is not None
    return promise.tier.name


@pytest.mark.parametrize(
    ("caller", "headers", "body", "expected"),
    [
        (Caller(), {}, {}, "normal"),
        (Caller(tier="bulk"), {}, {}, "bulk"),
        (Caller(), {b"x-oserve-tier": b"tight"}, {}, "tight"),
        (Caller(), {}, {"service_tier": "flex"}, "bulk"),
        (Caller(), {}, {"service_tier": "priority"}, "tight"),
        (Caller(tier="bulk"), {}, {"service_tier": "auto"}, "bulk"),
        (Caller(tier="bulk"), {}, {"service_tier": None}, "bulk"),
        (Caller(), {b"x-oserve-tier": b"bulk"}, {"service_tier": "priority"}, "bulk"),
        (Caller(tier="gone"), {}, {}, "normal"),
        (Caller(tier="bulk", allowed_tiers=("normal",)), {}, {}, "bulk"),
    ],
)
def test_the_tier_is_that_of_header_field_key_or_settings_in_this_order(
    caller: Caller, headers: dict[bytes, bytes], body: dict[str, object], expected: str
) -> None:
    assert tier_of(caller, headers, body) == expected


@pytest.mark.parametrize(
    ("caller", "headers", "body", "status"),
    [
        (Caller(), {b"x-oserve-tier": b"gold"}, {}, 400),
        (Caller(), {b"x-oserve-tier": b"\xff\x00"}, {}, 400),
        (Caller(), {}, {"service_tier": "gold"}, 400),
        (Caller(), {}, {"service_tier": 3}, 400),
        (Caller(), {}, {"service_tier": "scale"}, 400),
        (Caller(), {b"x-slo-ttft-ms": b"0"}, {}, 400),
        (Caller(), {b"x-slo-ttft-ms": b"-5"}, {}, 400),
        (Caller(), {b"x-slo-tpot-ms": b"nan"}, {}, 400),
        (Caller(allowed_tiers=("normal",)), {b"x-oserve-tier": b"tight"}, {}, 403),
        (Caller(allowed_tiers=("normal",)), {}, {"service_tier": "priority"}, 403),
    ],
)
def test_what_makes_no_sense_or_is_not_allowed_is_refused(
    caller: Caller, headers: dict[bytes, bytes], body: dict[str, object], status: int
) -> None:
    with pytest.raises(ApiError) as caught:
        tier_of(caller, headers, body)
    assert caught.value.status == status


def test_limits_in_headers_only_tighten() -> None:
    parsed = parse_body(b"{}")
    headers = {b"x-slo-ttft-ms": b"500", b"x-slo-tpot-ms": b"15.5"}
    promise = promise_of(TABLE, Caller(), headers, parsed)
    assert promise is not None
    assert (promise.ttft_s, promise.tpot_s) == (0.5, 0.0155)
    looser = promise_of(TABLE, Caller(), {b"x-slo-ttft-ms": b"90000"}, parsed)
    assert looser is not None
    assert looser.ttft_s == 60.0


def test_without_tiers_everything_is_as_before() -> None:
    table = RoutingTable(plan_id="p", length_classes=(), routing_shares={}, replicas=())
    parsed = parse_body(b'{"service_tier": "anything"}')
    assert promise_of(table, Caller(), {b"x-oserve-tier": b"x"}, parsed) is None


async def test_tiers_route_by_precision_and_are_echoed_recorded_and_counted(
    make_front: Make, tmp_path: Path
) -> None:
    records = RecordStore(tmp_path / "records.sqlite", max_records=100)
    front = await make_front(EmulatedEngine(), EmulatedEngine(), records=records)
    runner = front.gateway.runner
    full, small = runner.table.replicas
    runner.update(
        table_of(
            table_replica(full.id, full.endpoint.url, precision="bf16"),
            table_replica(small.id, small.endpoint.url, precision="int8"),
            tiers=TIERS,
            default_tier="normal",
            planned_types=tuple(
                PlannedType(
                    name=f"{tier.name} all",
                    prompt_tokens=10,
                    output_tokens=10,
                    shares={small.id: 1.0},
                    tier=tier.name,
                )
                for tier in TIERS
            ),
        )
    )
    status, headers, body = await front.post(
        "/v1/completions", {**TEXT, "service_tier": "priority"}
    )
    # Its share is with the replica of fewer bits, where it must not go.
    assert (status, headers["x-oserve-replica"]) == (200, full.id)
    assert body["service_tier"] == "priority"
    assert headers["x-oserve-workload-type"] == "tight all"
    _, headers, body = await front.post("/v1/completions", TEXT)
    assert headers["x-oserve-replica"] == small.id
    assert "service_tier" not in body
    lines = await front.lines("/v1/completions", {**TEXT, "stream": True, "service_tier": "flex"})
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert {event["service_tier"] for event in events} == {"flex"}
    assert "".join(event["choices"][0]["text"] for event in events) == " t1 t2 t3 t4 t5"
    counted = runner.metrics.snapshot()["oserve_tier_requests"]
    assert counted == {"tight\tkept": [1.0], "normal\tkept": [1.0], "bulk\tkept": [1.0]}
    runner.records = None
    records.close()
    rows = list(read_records(tmp_path / "records.sqlite"))
    assert [(row.tier, row.kept) for row in rows] == [
        ("tight", True),
        ("normal", True),
        ("bulk", True),
    ]
    refused, _, body = await front.post("/v1/completions", {**TEXT, "service_tier": "gold"})
    assert (refused, body["error"]["param"]) == (400, "service_tier")
