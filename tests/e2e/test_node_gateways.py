"""Gateways on two nodes: clients on each are served, and the loss of one costs only its own.

The server runs on host 0, an engine and a gateway on each of the hosts 1 and 2.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.node_scene import CLIENT, LIMIT_S, NODES, Load, Scene, streamed, surroundings
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model
from oserve.gateway.records import read_records

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]

PLAN = """
id: two-gateways
workload_types: [{name: all}]
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [host1/cpu:0]
  - id: two
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [host2/cpu:0]
routing_shares: {all: {one: 0.5, two: 0.5}}
"""
WORKER = "oserve.gateway.process.worker"
SERVING = {"": "serving", "host1": "serving", "host2": "serving"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("gates")
    make_tiny_model(folder / "tiny")
    (folder / "plan.yaml").write_text(PLAN)
    with Hosts(3, folder) as hosts:
        scene = Scene(hosts, folder, surroundings())
        for number in NODES:
            scene.serve_node(number)
        scene.write_cluster()
        scene.serve("--port", "8000", "--set", "gateway.placement=every-node")
        yield scene
        scene.end_server(signal.SIGINT)
        assert scene.server is not None
        assert scene.server.returncode == 0, scene.logs()
        for number in NODES:
            assert hosts[number].processes(WORKER) == [], scene.logs()
            for pid in hosts[number].processes("oserve.cli", "node"):
                os.kill(pid, signal.SIGINT)
            scene.nodes[number].wait(timeout=60)
            assert hosts[number].processes("oserve") == []


def gateways(document: dict[str, Any]) -> dict[str, str]:
    return {one["node"]: one["state"] for one in document["gateways"]}


def ready(document: dict[str, Any]) -> bool:
    phases = {one["id"]: one["phase"] for one in document["replicas"]}
    return phases == {"one": "ready", "two": "ready"} and gateways(document) == SERVING


async def test_clients_are_served_by_the_gateway_of_their_node(scene: Scene) -> None:
    await scene.until(ready)
    client = [sys.executable, "-c", CLIENT, scene.url]
    for number in NODES:
        assert await asyncio.to_thread(scene.hosts[number].inside, client) == "served\n"
    texts, replicas = set(), set()
    async with asyncio.timeout(LIMIT_S):
        for number in (0, *NODES):
            async with scene.client(number) as session:
                for text, replica, _ in await asyncio.gather(
                    *(streamed(session) for _ in range(4))
                ):
                    texts.add(text)
                    replicas.add((number, replica))
    assert len(texts) == 1
    # Engines of either node serve both.
    assert replicas >= {(number, name) for number in NODES for name in ("one", "two")}
    assert 'oserve_gateways{node="host2",state="serving"} 1.0' in await metrics(scene, 1)


async def metrics(scene: Scene, number: int) -> str:
    async with scene.client(number) as session, session.get("/metrics") as answer:
        assert answer.status == 200
        return await answer.text()


async def test_a_gateway_that_is_killed_is_back_and_the_other_has_not_noticed(scene: Scene) -> None:
    await scene.until(ready)
    async with scene.client(2) as session:
        text, _, _ = await streamed(session)
    other, load = Load(scene, text, number=2, width=2), Load(scene, text, number=1, width=1)
    async with other.running():
        await other.more(2)
        (before,) = scene.hosts[1].processes(WORKER)
        assert scene.hosts[1].kill(WORKER) == 1
        await scene.until(lambda d: gateways(d)["host1"] != "serving")
        await scene.until(ready)
        assert scene.hosts[1].processes(WORKER) != [before]
        async with load.running():
            await load.more(2)
        await other.more(2)
    assert not other.wrong, (other.wrong, scene.logs())
    assert not load.wrong, (load.wrong, scene.logs())


async def test_a_gateway_that_is_cut_off_serves_its_clients_and_says_so(scene: Scene) -> None:
    await scene.until(ready)
    async with scene.client(2) as session:
        text, _, _ = await streamed(session)
    (before,) = scene.hosts[2].processes(WORKER)
    cut, other = Load(scene, text, number=2, width=1), Load(scene, text, number=1, width=1)
    scene.hosts.pull_cable(2)
    try:
        async with cut.running(), other.running():
            await scene.until(lambda d: gateways(d)["host2"] == "away")
            await other.more(2)
            await cut.more(2)
            async with scene.client(2) as session, session.get("/oserve/v1/status") as answer:
                assert (await answer.json())["controller_away_s"] > 0
    finally:
        scene.hosts.plug_cable(2)
    assert not cut.wrong, (cut.wrong, scene.logs())
    assert not other.wrong, (other.wrong, scene.logs())
    await asyncio.to_thread(
        scene.reach, lambda: "host2 is up" in scene.last_log().rpartition("host2 is down")[2]
    )
    await asyncio.to_thread(scene.command, "node", "uncordon", "host2")
    await scene.until(ready)
    assert scene.hosts[2].processes(WORKER) == [before]
    assert "serves on by the last routing table" in (
        next(scene.folder.glob("node2/*/logs/gateway-0.log")).read_text()
    )
    # What was served while it was cut off is recorded with the rest.
    file = Path(scene.state) / "records.sqlite"
    served = cut.served + other.served

    def recorded() -> bool:
        return sum(one.output_tokens == 150 for one in read_records(file)) >= served

    await asyncio.to_thread(scene.reach, recorded)
