"""Gateways on two nodes with real engines: each serves by the engines of both.

One of the two engines a gateway reaches through its socket, the other through the other's hatch.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from e2e.node_scene import CLIENT, LIMIT_S, NODES, Scene, streamed, surroundings
from e2e.test_node_gateways import SERVING, WORKER, gateways, load_on
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model

pytestmark = [
    pytest.mark.hosts,
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
            for pid in hosts[number].processes("oserve.cli", "node"):
                os.kill(pid, signal.SIGINT)
            scene.nodes[number].wait(timeout=60)
            assert hosts[number].processes("-m oserve.") == []


async def test_each_gateway_serves_by_both_engines_and_one_is_killed(scene: Scene) -> None:
    await scene.until(lambda d: gateways(d) == SERVING)
    client = [sys.executable, "-c", CLIENT, scene.url]
    texts: set[str] = set()
    for number in NODES:
        assert await asyncio.to_thread(scene.hosts[number].inside, client) == "served\n"
        replicas: set[str] = set()
        async with scene.client(number) as session, asyncio.timeout(LIMIT_S):
            while replicas != {"one", "two"}:
                for text, replica, _ in await asyncio.gather(*(streamed(session) for _ in "12")):
                    texts.add(text)
                    replicas.add(replica)
    assert len(texts) == 1, texts
    other = await load_on(scene, 2, 2)
    async with other.running():
        await other.more(2)
        assert scene.hosts[1].kill(WORKER) == 1
        await scene.until(lambda d: gateways(d)["host1"] != "serving")
        await scene.until(lambda d: gateways(d) == SERVING)
        await other.more(2)
    assert not other.wrong, (other.wrong, scene.logs())
    assert await asyncio.to_thread(scene.hosts[1].inside, client) == "served\n"
