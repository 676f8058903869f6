"""What the gateway expects, learns and counts; sessions; what happens under overload."""

import asyncio
from dataclasses import replace
from typing import Any

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import PlannedType
from oserve.gateway.http.body import parse_body
from oserve.gateway.http.prompt import system_prefix
from oserve.gateway.records import RecordStore, read_records
from oserve.gateway.settings import GatewaySettings, OverloadSettings
from oserve.sim import EmulatedEngine, EngineSpeed

from .conftest import Make, table_of, until

TYPES = (
    PlannedType(name="brief", prompt_tokens=20, output_tokens=8, shares={"r0": 1.0}),
    PlannedType(name="lengthy", prompt_tokens=20, output_tokens=400, shares={"r1": 1.0}),
)


def prefix(text: str) -> bytes:
    return system_prefix(parse_body(text.encode()))


def test_the_system_prompt_is_found_where_it_is() -> None:
    head = '{"messages": [{"role": "system", "content": "Be \\"very\\" brief"}, '
    assert prefix(head + '{"role": "user", "content": "x"}]}') == rb"Be \"very\" brief"
    assert prefix('{"messages":[{"role":"user","content":"Hello"}]}') == b""
    assert prefix('{"prompt": "Hello"}') == b""
    long = "word " * 1000
    body = '{"messages":[{"role":"system","content":"%s"}]}' % long  # noqa: UP031
    assert len(prefix(body)) == 2048


def body(limit: int, **fields: Any) -> dict[str, Any]:
    return {"model": "emulated", "prompt": "xxx " * 20, "max_tokens": limit, **fields}


async def test_types_are_told_by_answers_counted_and_recorded(
    make_front: Make, tmp_path: Any
) -> None:
    store = RecordStore(tmp_path / "r.sqlite", max_records=100)
    front = await make_front(EmulatedEngine(), EmulatedEngine(), records=store)
    runner = front.gateway.runner
    table = runner.table
    runner.update(table_of(*table.replicas, planned_types=TYPES))
    for _ in range(6):
        status, headers, _ = await front.post("/v1/completions", body(6))
        assert status == 200
        assert headers["x-oserve-workload-type"] == "brief"
        assert headers["x-oserve-replica"] == "r0"
    status, headers, _ = await front.post("/v1/completions", body(300, ignore_eos=True))
    assert headers["x-oserve-replica"] == "r1"
    batch = runner.estimator.tally.take()
    assert batch.names == ("brief", "lengthy")
    counts = [sum(row[kind] for row in batch.arrivals.values()) for kind in (0, 1)]
    assert [round(count, 6) for count in counts] == [6.0, 1.0]
    assert sum(row[0] for row in batch.tokens.values()) == 7
    store.close()
    kinds = [record.workload_type for record in read_records(tmp_path / "r.sqlite")]
    assert sorted(kinds) == ["brief"] * 6 + ["lengthy"]


async def test_a_session_stays_on_its_replica_and_load_moves_it(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(), EmulatedEngine())
    headers = {"x-session-id": "one"}
    seen = set()
    for _ in range(5):
        _, answered, _ = await front.post("/v1/completions", body(4), headers=headers)
        seen.add(answered["x-oserve-replica"])
    assert len(seen) == 1
    text = (await front.get("/metrics"))[1].decode()
    assert "oserve_route_cached_total 4.0" in text


async def test_an_answer_that_outgrows_its_class_shows_in_the_load(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(speed=EngineSpeed(tpot_s=0.001)))
    lines = await front.lines("/v1/completions", body(400, stream=True))
    assert lines[-1] == b"data: [DONE]"
    text = (await front.get("/metrics"))[1].decode()
    outgrown = next(x for x in text.splitlines() if x.startswith("oserve_requests_outgrown_total"))
    assert float(outgrown.split()[1]) >= 1


async def test_the_late_are_served_last_and_all_are_served(make_front: Make) -> None:
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, overload=OverloadSettings(ttft_ms=0.001)
    )
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.1))
    front = await make_front(engine, settings=settings, max_inflight=1)
    calls = [asyncio.ensure_future(front.post("/v1/completions", body(2))) for _ in range(3)]
    answers = await asyncio.gather(*calls)
    assert [status for status, _, _ in answers] == [200] * 3
    text = (await front.get("/metrics"))[1].decode()
    assert "oserve_requests_demoted_total 2.0" in text


async def test_constants_change_while_requests_wait_and_all_are_served(make_front: Make) -> None:
    front = await make_front(EmulatedEngine(speed=EngineSpeed(ttft_s=0.1)), max_inflight=1)
    runner = front.gateway.runner
    calls = [asyncio.ensure_future(front.post("/v1/completions", body(2))) for _ in range(3)]
    await until(lambda: runner.queued == 2)
    late = DispatchConstants(overload=OverloadPolicy(ttft_s=1e-6))
    runner.update(replace(runner.table, constants=late))
    answers = await asyncio.gather(*calls)
    assert [status for status, _, _ in answers] == [200] * 3
    text = (await front.get("/metrics"))[1].decode()
    assert "oserve_requests_demoted_total 2.0" in text


async def test_a_first_token_lets_the_next_prompt_in(make_front: Make) -> None:
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, overload=OverloadSettings(ttft_ms=0.001)
    )
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.05, tpot_s=0.02))
    front = await make_front(engine, settings=settings)
    long = asyncio.ensure_future(front.lines("/v1/completions", body(2000, stream=True)))
    outstanding = front.gateway.runner.outstanding
    await until(lambda: outstanding()["r0"][1])
    short = asyncio.ensure_future(front.post("/v1/completions", body(1)))
    await until(lambda: front.gateway.runner.queued)
    # No end, but a first token of the one before lets it go.
    assert (await short)[0] == 200
    assert not long.done()
    long.cancel()


async def test_shedding_refuses_with_a_time_to_come_back(make_front: Make) -> None:
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, overload=OverloadSettings(shed_after_ms=1)
    )
    engine = EmulatedEngine(speed=EngineSpeed(ttft_s=0.5))
    front = await make_front(engine, settings=settings, max_inflight=1)
    first = asyncio.ensure_future(front.post("/v1/completions", body(2)))
    await until(lambda: front.gateway.runner.outstanding()["r0"][1])
    status, headers, document = await front.post("/v1/completions", body(2))
    assert status == 429
    assert document["error"]["code"] == "shed"
    assert int(headers["retry-after"]) >= 1
    assert (await first)[0] == 200
    text = (await front.get("/metrics"))[1].decode()
    assert "oserve_requests_shed_total 1.0" in text
