"""The same with the nodes of a real Ray cluster, whose helper may go."""

import asyncio
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


async def test_streams_and_engines_outlive_the_helper(scene: RayScene) -> None:
    before, held = pids(await scene.until(whole)), keepers(scene)
    load = await load_on(scene)
    async with load.running():
        await load.more(2)
        assert scene.hosts[0].kill(HELPER)
        await load.more(4)
    await asyncio.to_thread(scene.reach, lambda: "Ray is heard again" in scene.last_log())
    after = pids(await scene.until(whole))
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, keepers(scene)) == (before, held)
