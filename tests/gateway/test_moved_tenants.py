"""A stream that moves, for a switch or a loss, keeps its tier, its tenant and its cache salt."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oserve.core import KeyRole, PlannedType, Precision, Tier
from oserve.gateway.access.key_file import KeyStore
from oserve.gateway.records import RecordStore, read_records
from oserve.gateway.settings import GatewaySettings, TenancySettings, TenantSettings
from oserve.sim import EmulatedEngine, EngineSpeed
from oserve.sim.responses import Mishap
from oserve.sim.tokenizer_stub import BabblingTokenizer

from .conftest import Front, Make, table_of, until

TIGHT = Tier(
    name="tight", ttft_s=60.0, precisions=(Precision.BF16,), service_tier="priority", weight=2.0
)
BULK = Tier(name="bulk")
WISH = {
    "model": "emulated",
    "prompt": "hello there",
    "max_tokens": 60,
    "ignore_eos": True,
    "stream": True,
    "service_tier": "priority",
    "cache_salt": "the client's own",
}


def engine() -> EmulatedEngine:
    return EmulatedEngine(tokenizer=BabblingTokenizer(), speed=EngineSpeed(tpot_s=0.005))


def tiered(front: Front) -> None:
    """Two replicas in 16 bits, and one in 8 that has most of the shares."""
    runner = front.gateway.runner
    replicas = [
        replace(item, precision=precision)
        for item, precision in zip(runner.table.replicas, ("bf16", "bf16", "int8"), strict=True)
    ]
    kinds = tuple(
        PlannedType(
            name=f"{tier.name} all",
            prompt_tokens=10,
            output_tokens=60,
            shares={"r0": 0.1, "r1": 0.1, "r2": 0.8},
            tier=tier.name,
        )
        for tier in (TIGHT, BULK)
    )
    runner.update(
        table_of(*replicas, tiers=(TIGHT, BULK), default_tier="bulk", planned_types=kinds)
    )


async def asked(front: Front, key: str) -> tuple[str, set[str]]:
    """Text and service tiers of a streamed answer."""
    headers = {"authorization": f"Bearer {key}"}
    async with front.session.post(
        front.url + "/v1/completions", json=WISH, headers=headers
    ) as answer:
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "99"
        lines = [line for line in (await answer.read()).split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    events: list[dict[str, Any]] = [json.loads(line[6:]) for line in lines[:-1]]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, {event["service_tier"] for event in events}


@pytest.mark.parametrize("cause", ["lost", "handed_over"])
async def test_a_moved_stream_keeps_tier_tenant_and_salt(
    make_front: Make, tmp_path: Path, cause: str
) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    stored, key = keys.add("acme", KeyRole.USE)
    _, other = keys.add("other", KeyRole.USE)
    records = RecordStore(tmp_path / "records.sqlite", max_records=100)
    limits = TenantSettings(requests_per_min=100)
    settings = GatewaySettings(
        port=0, shutdown_grace_s=0.0, tenancy=TenancySettings(default=limits, cache_salt=True)
    )
    front = await make_front(
        *(engine() for _ in range(3)),
        settings=settings,
        keys_file=tmp_path / "keys.json",
        records=records,
    )
    tiered(front)
    runner = front.gateway.runner
    expected, _ = await asked(front, other)
    for one in front.engines:
        one.seen.clear()
    runner.machine.waiting.fair.take_charges()
    if cause == "lost":
        for one in front.engines[:2]:
            one.mishaps.append(Mishap(after=20))
    task = asyncio.ensure_future(asked(front, key))
    await until(lambda: any(session.committed for session in runner.active.values()))
    (session,) = runner.active.values()
    assert session.replica is not None
    first = session.replica.id
    if cause == "lost":
        # Only the first one fails.
        next(e for n, e in enumerate(front.engines[:2]) if f"r{n}" != first).mishaps.clear()
    else:
        # What was sent so far is charged already when its key is revoked.
        keys.revoke(stored.id)
        front.gateway.door.check()
        runner.hand_over(first, 0.0)
    text, tiers = await task
    assert text == expected
    assert tiers == {"priority"}
    bodies = [body for one in front.engines[:2] for body in one.seen]
    assert [len(one.seen) for one in front.engines] == [1, 1, 0]
    (salt,) = {body["cache_salt"] for body in bodies}
    assert salt == front.gateway.door.cache_salt("acme", json.dumps("the client's own").encode())
    assert runner.machine.waiting.fair.take_charges().keys() == {("tight", "acme")}
    await until(lambda: not runner.active)
    assert not runner.machine.waiting.fair._open
    metrics = runner.metrics.snapshot()
    moved = metrics["oserve_requests_moved"]
    assert {name.partition("\t")[0] for name in moved} == {cause}
    assert metrics["oserve_tenant_requests"]["acme\tcompleted"] == [1.0]
    await front.gateway.close()
    *_, row = read_records(tmp_path / "records.sqlite")
    assert (row.tier, row.tenant, row.moves, row.output_tokens) == ("tight", "acme", 1, 60)
