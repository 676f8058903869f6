"""The same with the nodes of a real Ray cluster, whose raylets, head and helper may go."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from e2e.node_scene import NODES, PLAN, Scene, load_on, pids, surroundings, whole
from hosts import Hosts, unavailable
from oserve.engines.tiny import make_tiny_model
from raylets import Raylets, running

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]

SLOTS = {"oserve_slot": 3}
MORE = (
    *("--set", "cluster.devices=cpu", "--cpu-slots", "3"),
    *("--set", "cluster.node_state_dir=/tmp/nodes"),
)
KEEPER = "oserve.engines.keeper"
HELPER = "oserve.nodes.ray_helper"


@dataclass
class RayScene(Scene):
    """A scene whose nodes Ray tells of."""

    raylets: Raylets | None = None

    def serve(self, *more: str) -> None:
        """See ``Scene.serve``."""
        super().serve(*MORE, *more)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayScene]:
    folder = tmp_path_factory.mktemp("ray-nodes")
    make_tiny_model(folder / "tiny")
    (folder / "plan.yaml").write_text(PLAN)
    with Hosts(3, folder) as hosts, running(hosts, folder, {1: SLOTS, 2: SLOTS}) as raylets:
        scene = RayScene(hosts, folder, surroundings() | raylets.env, raylets=raylets)
        scene.cluster = f"ray:{raylets.address}"
        scene.reach(lambda: all(raylets.joined(number) for number in (0, *NODES)))
        scene.serve()
        yield scene
        scene.end_server(signal.SIGINT)
        assert scene.server is not None
        assert scene.server.returncode == 0, scene.logs()
        # What Ray's agents have set up ends with the server that had it set up.
        assert hosts[0].processes("oserve.") == []
        for number in NODES:
            assert hosts[number].processes(KEEPER) == [], scene.logs()
            assert hosts[number].processes("vllm") == [], scene.logs()


def keepers(scene: RayScene) -> list[int]:
    return [pid for number in NODES for pid in scene.hosts[number].processes(KEEPER)]


async def test_engines_outlive_raylet_and_helper(scene: RayScene) -> None:
    """A keeper that answers is left alone, whatever Ray says of its node."""
    assert scene.raylets is not None
    before, held = pids(await scene.until(whole)), keepers(scene)
    load = await load_on(scene)
    async with load.running():
        await load.more(2)
        scene.hosts[2].kill("raylet/raylet")
        scene.hosts[0].kill(HELPER)
        await load.more(4)
        await asyncio.to_thread(scene.raylets.start, 2)
        await asyncio.to_thread(
            scene.reach, lambda: scene.hosts[2].processes("ray::NodeAgent") != []
        )
        after = pids(await scene.until(whole))
        await load.more(2)
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, keepers(scene)) == (before, held)


async def test_a_server_that_starts_while_the_head_is_away_finds_its_nodes(scene: RayScene) -> None:
    assert scene.raylets is not None
    before = pids(await scene.until(whole))
    load = await load_on(scene)
    async with load.running():
        for name in ("gcs_server", "raylet/raylet"):
            scene.hosts[0].kill(name)
        scene.end_server(signal.SIGKILL)
        for pid in scene.hosts[0].processes(HELPER):
            os.kill(pid, signal.SIGKILL)
        await load.more(2)
        await asyncio.to_thread(scene.serve)
        after = pids(await scene.until(whole))
        await load.more(2)
        await asyncio.to_thread(scene.raylets.start, 0)
        told = "joined the Ray cluster"
        await asyncio.to_thread(scene.reach, lambda: told in scene.last_log())
    assert not load.wrong, (load.wrong, scene.logs())
    assert after == before
