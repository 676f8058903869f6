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
from typing import Any

import pytest

from e2e.node_scene import (
    CLIENT,
    LIMIT_S,
    NODES,
    PLAN,
    SETTINGS,
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

# Each leaves one node without any weights.
PLANS = {
    "east": """
id: east
replicas:
  - id: two
    shape: {tensor_parallel_size: 2, precision: fp32, max_num_batched_tokens: 512, max_num_seqs: 8}
    devices: [host2/cpu:0, host2/cpu:1]
""",
    "west": """
id: west
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [host1/cpu:0]
""",
}

pytestmark = [
    pytest.mark.alone,
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
    for name, text in (PLANS | {"two-nodes": PLAN}).items():
        (folder / f"{name}.yaml").write_text(text)
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


async def test_another_server_does_not_get_the_nodes(scene: Scene) -> None:
    before = pids(await scene.until(whole))
    refused = await asyncio.to_thread(
        scene.cli,
        *("serve", str(scene.folder / "tiny"), "--cluster", scene.cluster, *SETTINGS),
        *("--state-dir", str(scene.folder / "other"), "--plan", str(scene.folder / "plan.yaml")),
    )
    assert refused.returncode == 2, refused.stderr
    assert f"it serves another server: host0:{scene.state}" in refused.stderr
    assert pids(await scene.until(whole)) == before


@pytest.mark.hosts
async def test_switches_move_weights_between_nodes_under_load(scene: Scene) -> None:
    """The replicas leave host 1, come back from host 2, and fill host 2 from there."""
    await scene.until(whole)
    load = await load_on(scene)
    load.width = 2  # engines start beside it
    async with load.running():
        await load.more(2)
        for name, start, target in (("east", "", ""), ("west", "host2", "host1")):
            await switched(scene, name)
            report = (await scene.until(lambda d, n=name: over(d, n)))["switch"]  # type: ignore[misc]
            assert (report["state"], report["method"]) == ("done", "transfer"), report
            crossed = report["programme"]["between_nodes"]
            ways = [(link["source"], link["target"]) for link in crossed]
            assert ways == ([(start, target)] if start else [])
            await load.more(2)
        # Every rank of host 1 gets all of its weights from host 2.
        assert crossed[0]["bytes"] == report["total_bytes"] == report["moved_bytes"]
        line = f"host2 -> host1: {crossed[0]['bytes']:,} bytes"
        assert line in await asyncio.to_thread(scene.command, "status")
        assert line in scene.last_log()
        await switched(scene, "two-nodes")
        await scene.until(whole)
        await load.more(2)
    assert not load.wrong, (load.wrong, scene.logs())


async def switched(scene: Scene, name: str) -> None:
    """An operator's switch to a plan."""
    await asyncio.to_thread(scene.command, "switch", str(scene.folder / f"{name}.yaml"))


def over(document: dict[str, Any], name: str) -> bool:
    """Whether the switch to that plan has ended."""
    report = document["switch"]
    return bool(report and report["plan_id"] == name and report["ended_s"] is not None)


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
