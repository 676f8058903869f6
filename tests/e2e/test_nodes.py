"""`oserve serve` on two other hosts: replicas on each and over both, and what losses cost clients.

The server runs on host 0, engines on hosts 1 and 2. The tests leave everything up for each other.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.node_scene import (
    CLIENT,
    LIMIT_S,
    NODES,
    PLAN,
    Scene,
    load_on,
    pids,
    states,
    streamed,
    surroundings,
    whole,
)
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("nodes")
    make_tiny_model(folder / "tiny")
    (folder / "plan.yaml").write_text(PLAN)
    with Hosts(3, folder) as hosts:
        scene = Scene(hosts, folder, surroundings())
        for number in NODES:
            scene.serve_node(number)
        scene.write_cluster()
        scene.serve()
        yield scene
        scene.end_server(signal.SIGINT)
        assert scene.server is not None
        assert scene.server.returncode == 0, scene.logs()
        # Engines have ended on all nodes; what serves the node stays until it is told to end.
        assert hosts[0].processes("oserve") == []
        for number in NODES:
            assert hosts[number].processes("vllm") == [], scene.logs()
            assert len(hosts[number].processes("oserve.engines.keeper")) == 1
            for pid in hosts[number].processes("oserve.cli", "node"):
                os.kill(pid, signal.SIGINT)
            scene.nodes[number].wait(timeout=60)
            assert hosts[number].processes("oserve") == []


async def test_an_openai_client_is_served(scene: Scene) -> None:
    await scene.until(whole)
    client = [sys.executable, "-c", CLIENT, scene.url]
    assert await asyncio.to_thread(scene.hosts[0].inside, client) == "served\n"
    listed = json.loads(await asyncio.to_thread(scene.command, "node", "list", "--json"))
    assert {one["name"]: one["devices"] for one in listed} == {"host1": 3, "host2": 3}


async def test_greedy_text_is_the_same_on_one_node_and_over_two(scene: Scene) -> None:
    await scene.until(whole)
    texts: dict[str, set[str]] = {}
    async with scene.client() as session:
        async with asyncio.timeout(LIMIT_S):
            while texts.keys() != {"one", "two", "both"}:
                for text, replica, _ in await asyncio.gather(
                    *(streamed(session) for _ in range(6))
                ):
                    texts.setdefault(replica, set()).add(text)
    assert len(set.union(*texts.values())) == 1, texts


async def test_no_secret_is_in_a_log_or_an_answer(scene: Scene) -> None:
    document = await scene.until(whole)
    tokens = [
        json.loads(file.read_text())["token"]
        for file in scene.folder.glob("node*/*/hatch-identity.json")
    ]
    assert len(tokens) == len(NODES)
    told = json.dumps(document) + scene.logs()
    assert not any(token in told for token in tokens)
    for file in (Path(scene.state) / "hatches").iterdir():
        assert file.stat().st_mode & 0o077 == 0
    for file in scene.folder.glob("state/**/*"):
        if file.is_file() and "hatches" not in file.parts:
            assert not any(token.encode() in file.read_bytes() for token in tokens), file


async def test_a_killed_server_finds_the_nodes_and_their_engines_again(scene: Scene) -> None:
    before = pids(await scene.until(whole))
    load = await load_on(scene)
    async with load.running():
        await load.more(2)
        scene.end_server(signal.SIGKILL)
        await load.more(3)
        await asyncio.to_thread(scene.serve)
        after = pids(await scene.until(whole))
        await load.more(3)
    assert not load.wrong, (load.wrong, scene.logs())
    assert after == before


async def test_streams_go_on_when_a_node_loses_power_and_it_comes_back(scene: Scene) -> None:
    before = pids(await scene.until(whole))
    load = await load_on(scene)
    async with load.running():
        await load.more(3)
        scene.hosts[2].cut_power()
        await scene.until(lambda d: states(d).get("host2") == "lost")
        document = await scene.until(lambda d: pids(d).keys() == {"one"})
        await load.more(6)
        assert pids(document)["one"] == before["one"]
    # A start of engines takes long beside such a load.
    load.width = 1
    async with load.running():
        scene.hosts.power_on(2)
        await asyncio.to_thread(scene.serve_node, 2)
        await scene.until(lambda d: states(d).get("host2") == "held_down")
        await asyncio.to_thread(scene.command, "node", "uncordon", "host2")
        after = pids(await scene.until(whole))
        await load.more(6)
    assert not load.wrong, (load.wrong, scene.logs())
    assert after["one"] == before["one"]
    assert load.gap_s > 0.0
