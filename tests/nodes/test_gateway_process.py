"""A gateway process of another node: called through one hatch, served through another."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import msgspec

from gateway.conftest import table_of, table_replica
from hatches import IDENTITY, LIMIT_S, RunningHatch, opened, running_hatch
from oserve.core import Endpoint, RequestRecord
from oserve.engines.clock import LiveClock
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_call import HubCall
from oserve.gateway.process.messages import (
    GatewayHome,
    GatewayWorkerConfig,
    OperatorAnswer,
    OperatorCall,
)
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.nodes.hatch_identity import make_identity
from oserve.sim import EmulatedEngine

INCARNATION = 1 << 40
NAME = "gateway.0/hub.sock"
BODY = {"model": "emulated", "prompt": "one two three", "max_tokens": 5}


class Records(list[RequestRecord]):
    def put(self, one: RequestRecord) -> bool:
        self.append(one)
        return True

    def close(self) -> None:
        pass


async def start(hatch: RunningHatch, alone_s: float, log: Path) -> asyncio.subprocess.Process:
    config = GatewayWorkerConfig(
        process=0,
        hub=str(hatch.folder / NAME),
        models=("emulated",),
        api_keys=["key-5"],
        settings=GatewaySettings(port=0, shutdown_grace_s=0.0, placement="every-node"),
        home=GatewayHome(
            node="a",
            folder=str(hatch.folder),
            certificate=hatch.address.certificate,
            alone_s=alone_s,
        ),
        incarnation=INCARNATION,
    )
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "oserve.gateway.process.worker"),
            stdin=asyncio.subprocess.PIPE,
            stderr=output,
        )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    return process


async def replica_of(client: aiohttp.ClientSession) -> str:
    async with client.post("/v1/completions", json=BODY) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers["x-oserve-replica"]


async def test_served(tmp_path: Path) -> None:
    async def operate(call: OperatorCall) -> OperatorAnswer:
        return OperatorAnswer(status=200, body=json.dumps(call.path).encode())

    records, log = Records(), tmp_path / "log"
    hub = Hub(operate, records)
    engines = {"near": EmulatedEngine(), "far": EmulatedEngine()}
    async with running_hatch(tmp_path) as a, running_hatch(tmp_path, None, make_identity("b")) as b:
        replicas = []
        for (name, engine), hatch in zip(engines.items(), (a, b), strict=True):
            socket = f"{name}-1/api.sock"
            await engine.start(unix_socket=str(hatch.listener(socket)))
            endpoint = Endpoint(unix_socket=socket, hatch=hatch.address)
            replicas.append(table_replica(name, "", endpoint=endpoint))
        hub.publish(table_of(*replicas), ClusterSnapshot(status=msgspec.Raw(b'{"n":1}')))
        process = await start(a, 0.1, log)
        call = HubCall("a", hub, lambda: opened(a.address, NAME), LiveClock())
        calling = asyncio.create_task(call.run())
        headers = {"authorization": "Bearer key-5"}
        try:
            async with asyncio.timeout(LIMIT_S):
                port = await hub.expect(INCARNATION)
                called = a.hatch._accepted
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as client:
                served: set[str] = set()
                async with asyncio.timeout(LIMIT_S):
                    while served != {"near", "far"}:
                        # Beside each other, since an idle replica of the two always wins.
                        served |= set(await asyncio.gather(*(replica_of(client) for _ in range(4))))
                    # Of these two only the second comes through a hatch.
                    assert a.hatch._accepted == called
                    assert b.hatch._accepted >= 1
                    while len(records) < len(engines["near"].seen) + len(engines["far"].seen):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                async with client.get("/metrics") as answer:
                    assert answer.status == 200
                    assert 'oserve_requests_total{status="completed"}' in await answer.text()
                async with client.post("/oserve/v1/nodes") as answer:
                    assert await answer.json() == "/oserve/v1/nodes"
                # The hub hangs up: it serves on for its time, says so, and ends.
                calling.cancel()
                async with client.get("/oserve/v1/status") as answer:
                    assert (await answer.json())["n"] == 1
            async with asyncio.timeout(LIMIT_S):
                assert await process.wait() == 0
        finally:
            calling.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
            for engine in engines.values():
                await engine.stop()
    told = log.read_text()
    assert "serves on by the last routing table" in told
    assert "this gateway ends" in told
    assert not any(secret in told for secret in (IDENTITY.token, IDENTITY.key, "key-5"))
    assert not (a.folder / "gateway.0").exists()
