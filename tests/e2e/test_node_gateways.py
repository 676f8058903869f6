"""Gateways on two nodes: clients on each are served, and the loss of one costs only its own.

The server runs on host 0, gateways on all three hosts. Each host has an emulated engine at the same
address of its own loopback, so that a gateway has one whatever happens to the network.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.node_scene import CLIENT, NODES, Load, Scene, streamed, surroundings, wait
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model
from oserve.gateway.records import read_records

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]

PLAN = """
id: gateways
workload_types: [{name: all}]
replicas: [{id: near, attach: {url: "http://127.0.0.1:9000"}}]
"""
ENGINE = """
import asyncio
from oserve.sim import EmulatedEngine
async def main():
    await EmulatedEngine(model="tiny").start(port=9000)
    print("listens", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
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
        engines = [_engine(scene, number) for number in range(len(hosts))]
        for number in NODES:
            scene.serve_node(number)
        scene.write_cluster()
        _serve(scene)
        yield scene
        scene.end_server(signal.SIGINT)
        assert scene.server is not None
        assert scene.server.returncode == 0, scene.logs()
        for number in NODES:
            assert hosts[number].processes(WORKER) == [], scene.logs()
            for pid in hosts[number].processes("oserve.cli", "node"):
                os.kill(pid, signal.SIGINT)
            scene.nodes[number].wait(timeout=60)
            assert hosts[number].processes("-m oserve.") == []
        for engine in engines:
            engine.kill()
            engine.wait()


def _engine(scene: Scene, number: int) -> "subprocess.Popen[bytes]":
    log = scene.folder / f"engine{number}.log"
    with log.open("wb") as out:
        process = scene.hosts[number].popen([sys.executable, "-c", ENGINE], env=scene.env, log=out)
    wait(lambda: "listens" in log.read_text(), process, log)
    return process


def _serve(scene: Scene) -> None:
    scene.serve("--port", "8000", "--set", "gateway.placement=every-node")


def gateways(document: dict[str, Any]) -> dict[str, str]:
    return {one["node"]: one["state"] for one in document["gateways"]}


def ready(document: dict[str, Any]) -> bool:
    phases = {one["id"]: one["phase"] for one in document["replicas"]}
    fresh = "controller_away_s" not in document
    return phases == {"near": "ready"} and gateways(document) == SERVING and fresh


async def load_on(scene: Scene, number: int, width: int = 1) -> Load:
    async with scene.client(number) as session:
        text, _, _ = await streamed(session)
    return Load(scene, text, number=number, width=width)


async def told(scene: Scene, action: str) -> None:
    """An operator's word about host 2, to the gateway of host 1."""
    async with scene.client(1) as session:
        call = {"action": action, "node": "host2"}
        async with session.post("/oserve/v1/nodes", json=call) as answer:
            assert answer.status == 200, await answer.text()


async def test_clients_are_served_by_the_gateway_of_their_node(scene: Scene) -> None:
    await scene.until(ready)
    client = [sys.executable, "-c", CLIENT, scene.url]
    for number in NODES:
        assert await asyncio.to_thread(scene.hosts[number].inside, client) == "served\n"
        async with scene.client(number) as session, session.get("/metrics") as answer:
            sums = await answer.text()
        # Each tells of all.
        for node in SERVING:
            assert f'oserve_gateways{{node="{node}",state="serving"}} 1.0' in sums
        assert 'oserve_requests_total{status="completed"}' in sums


async def test_a_gateway_that_is_killed_is_back_and_the_other_has_not_noticed(scene: Scene) -> None:
    await scene.until(ready)
    load, other = await load_on(scene, 1), await load_on(scene, 2, 2)
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


async def test_the_next_server_goes_on_with_the_gateways(scene: Scene) -> None:
    await scene.until(ready)
    before = [scene.hosts[number].processes(WORKER) for number in NODES]
    loads = [await load_on(scene, number) for number in NODES]
    async with loads[0].running(), loads[1].running():
        await asyncio.gather(*(load.more(1) for load in loads))
        scene.end_server(signal.SIGKILL)
        await asyncio.gather(*(load.more(2) for load in loads))
        await asyncio.to_thread(_serve, scene)
        await scene.until(ready)
        await asyncio.gather(*(load.more(2) for load in loads))
    for load in loads:
        assert not load.wrong, (load.wrong, scene.logs())
    assert [scene.hosts[number].processes(WORKER) for number in NODES] == before


async def test_a_gateway_that_is_cut_off_serves_its_clients_and_says_so(scene: Scene) -> None:
    await scene.until(ready)
    before = scene.hosts[2].processes(WORKER)
    cut, other = await load_on(scene, 2), await load_on(scene, 1)
    async with cut.running(), other.running():
        scene.hosts.pull_cable(2)
        await scene.until(lambda d: gateways(d)["host2"] == "away")
        await other.more(2)
        await cut.more(2)
        async with scene.client(2) as session:
            async with session.get("/oserve/v1/status") as answer:
                assert (await answer.json())["controller_away_s"] > 0
            async with session.get("/metrics") as answer:
                assert answer.status == 503
        scene.hosts.plug_cable(2)
        await scene.until(ready)
        await cut.more(1)
    assert not cut.wrong, (cut.wrong, scene.logs())
    assert not other.wrong, (other.wrong, scene.logs())
    assert scene.hosts[2].processes(WORKER) == before
    (log,) = scene.folder.glob("node2/*/logs/gateway-0.log")
    assert "serves on by the last routing table" in log.read_text()
    # What was served while it was cut off is recorded with the rest.
    file = Path(scene.state) / "records.sqlite"

    def recorded() -> bool:
        return sum(1 for one in read_records(file)) >= cut.served + other.served

    await asyncio.to_thread(scene.reach, recorded)


async def test_a_node_that_is_drained_has_no_gateway_until_it_is_used_again(scene: Scene) -> None:
    await scene.until(ready)
    load = await load_on(scene, 1)
    async with load.running():
        await told(scene, "drain")
        await asyncio.to_thread(scene.reach, lambda: not scene.hosts[2].processes(WORKER))
        await scene.until(lambda d: gateways(d)["host2"] == "leaving")
        await told(scene, "uncordon")
        await scene.until(ready)
        await load.more(1)
    assert not load.wrong, (load.wrong, scene.logs())
