"""Nodes without the model, and one that joins a running server: files, links, ladder, engines.

Each host has a ``/tmp`` of its own, so the model is on host 1 alone, and its configuration on the
server's. Nodes 2 and 3 get it from there; node 3 is started after the server is ready.
"""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.node_scene import Scene, states, streamed, surroundings
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]

MODEL = "/tmp/models/tiny"
SETTINGS = (
    *("--set", "planning.rates=chats:60x40=2", "--set", "control.decision_interval_s=20"),
    *("--set", "planning.measure=never", "--set", "control.simulate=true"),
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("joining")
    with Hosts(4, folder) as hosts:
        make_tiny_model(hosts[1].tmp / "models" / "tiny")
        (hosts[0].tmp / "models" / "tiny").mkdir(parents=True)
        config = hosts[1].tmp / "models" / "tiny" / "config.json"
        shutil.copy(config, hosts[0].tmp / "models" / "tiny")
        scene = Scene(
            hosts, folder, surroundings(), model=MODEL, slots=1, plan="", numbers=(1, 2, 3)
        )
        for number in (3, 1, 2):
            scene.serve_node(number)
        scene.write_cluster()
        # Its lines are known; it comes back later.
        ended(scene, 3)
        scene.serve(*SETTINGS)
        yield scene
        scene.end_server(signal.SIGINT)
        for number in (1, 2, 3):
            ended(scene, number)


def ended(scene: Scene, number: int) -> None:
    for pid in scene.hosts[number].processes("oserve.cli", "node"):
        os.kill(pid, signal.SIGINT)
    scene.nodes[number].wait(timeout=60)


def files(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir()}


async def listed(scene: Scene) -> dict[str, dict[str, Any]]:
    found = json.loads(await asyncio.to_thread(scene.command, "node", "list", "--json"))
    return {one["name"]: one for one in found}


async def test_a_node_without_the_model_gets_it_and_serves(scene: Scene) -> None:
    document = await scene.until(
        lambda d: (
            {one["devices"][0] for one in d["replicas"] if one["phase"] == "ready"}
            >= {"host1/cpu:0", "host2/cpu:0"}
        )
    )
    assert states(document)["host2"] == "up"
    place = "models/tiny"
    assert files(scene.hosts[2].tmp / place) == files(scene.hosts[1].tmp / place)
    assert [item.name for item in (scene.hosts[2].tmp / "models").iterdir()] == ["tiny"]
    await scene.until(lambda d: all(one["links"]["measured"] for one in d["nodes"]))
    async with scene.client() as session:
        texts = {(await streamed(session))[0] for _ in range(4)}
    assert len(texts) == 1


async def test_a_node_that_joins_is_known_without_a_restart(scene: Scene) -> None:
    await asyncio.to_thread(scene.serve_node, 3)
    document = await scene.until(
        lambda d: (
            {one["devices"][0] for one in d["replicas"] if one["phase"] == "ready"}
            >= {"host1/cpu:0", "host2/cpu:0", "host3/cpu:0"}
        )
    )
    assert states(document) == {"host1": "up", "host2": "up", "host3": "up"}
    nodes = await listed(scene)
    assert nodes["host3"]["devices"] == 1
    place = "models/tiny"
    assert files(scene.hosts[3].tmp / place) == files(scene.hosts[1].tmp / place)
    # All that plans and switches are made from follows.
    await asyncio.to_thread(
        scene.reach, lambda: "planning for 3 devices (1 more)" in scene.last_log()
    )
    await scene.until(lambda d: d["nodes"][2]["links"]["measured"] == 2)
