"""A gateway in front of emulated engines, on loopback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.control.dispatch.witness import Witness
from oserve.core import Endpoint, LengthClass, ReplicaPhase
from oserve.gateway.http.server import Gateway
from oserve.gateway.records import RecordStore
from oserve.gateway.settings import GatewaySettings
from oserve.sim import EmulatedEngine


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until something has happened; it does within a minute."""
    async with asyncio.timeout(60.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def table_replica(name: str, url: str, **fields: Any) -> TableReplica:
    defaults: dict[str, Any] = {
        "id": name,
        "shape": "tp1-bf16-2048",
        "phase": ReplicaPhase.READY,
        "endpoint": Endpoint(url=url),
        "max_inflight": 64,
        "max_model_len": 8192,
        "accepts_priority": True,
        "returns_token_ids": True,
        "prefill_s_per_token": 1e-4,
        "decode_s_per_token": 1e-3,
    }
    return TableReplica(**{**defaults, **fields})


def table_of(*replicas: TableReplica, **fields: Any) -> RoutingTable:
    share = {replica.id: 1.0 / len(replicas) for replica in replicas}
    defaults: dict[str, Any] = {
        "plan_id": "p1",
        "length_classes": (
            LengthClass(name="short", max_prompt_tokens=512),
            LengthClass(name="long"),
        ),
        "routing_shares": {"short": share, "long": share},
        "replicas": replicas,
        "expected": False,
    }
    return RoutingTable(**{**defaults, **fields})


@dataclass
class Front:
    """A running gateway with its engines, and a client session on it."""

    gateway: Gateway
    url: str
    session: aiohttp.ClientSession
    engines: list[EmulatedEngine] = field(default_factory=list)

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, dict[str, str], Any]:
        async with self.session.post(self.url + path, json=body, **kwargs) as answer:
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, headers, await answer.json(content_type=None)

    async def get(self, path: str, **kwargs: Any) -> tuple[int, bytes]:
        async with self.session.get(self.url + path, **kwargs) as answer:
            return answer.status, await answer.read()

    async def lines(self, path: str, body: Any) -> list[bytes]:
        async with self.session.post(self.url + path, json=body) as answer:
            text = await answer.read()
        return [line for line in text.split(b"\n\n") if line]


Make = Callable[..., Awaitable[Front]]


@pytest.fixture
async def make_front() -> AsyncIterator[Make]:
    fronts: list[Front] = []

    async def make(
        *engines: EmulatedEngine,
        settings: GatewaySettings | None = None,
        records: RecordStore | None = None,
        api_keys: frozenset[str] = frozenset(),
        keys_file: Path | None = None,
        expected: bool = False,
        **fields: Any,
    ) -> Front:
        chosen = settings or GatewaySettings(port=0, shutdown_grace_s=0.0)
        gateway = Gateway(
            chosen,
            models=("emulated",),
            records=records,
            api_keys=api_keys,
            keys_file=keys_file,
        )
        Witness(gateway.runner.machine)
        replicas = []
        for index, engine in enumerate(engines):
            port = await engine.start()
            replicas.append(table_replica(f"r{index}", f"http://127.0.0.1:{port}", **fields))
        gateway.runner.update(table_of(*replicas, expected=expected))
        port = await gateway.listen()
        front = Front(gateway, f"http://127.0.0.1:{port}", aiohttp.ClientSession(), list(engines))
        fronts.append(front)
        return front

    yield make
    for front in fronts:
        await front.session.close()
        await front.gateway.close()
        for engine in front.engines:
            await engine.stop()
