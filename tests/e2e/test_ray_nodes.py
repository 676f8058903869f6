"""The same with the nodes of a real Ray cluster, any part of which may go."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from e2e.node_scene import NODES, PLAN, load_on, pids, whole
from e2e.ray_scene import AGENT, HELPER, RAYLET, RayScene, ray_scene
from hosts import unavailable
from oserve.engines.tiny import make_tiny_model

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayScene]:
    folder = tmp_path_factory.mktemp("ray-nodes")
    make_tiny_model(folder / "tiny")
    (folder / "plan.yaml").write_text(PLAN)
    with ray_scene(folder) as scene:
        scene.serve()
        yield scene
        scene.end_server(signal.SIGINT)
        assert scene.server is not None
        assert scene.server.returncode == 0, scene.logs()
        # What Ray's agents have set up ends with the server that had it set up.
        assert scene.hosts[0].processes("oserve.") == []
        assert scene.keepers() == [], scene.logs()
        for number in NODES:
            assert scene.hosts[number].processes("vllm") == [], scene.logs()


async def test_streams_and_engines_outlive_whatever_ray_runs(scene: RayScene) -> None:
    before, held = pids(await scene.until(whole)), scene.keepers()
    load = await load_on(scene)
    async with load.running():
        await load.more(2)
        for told, host, words in (
            ("Ray is heard again", 0, HELPER),
            ("node host2 serves on, since its keeper answers", 2, RAYLET),
        ):
            assert scene.hosts[host].kill(words)
            await load.more(4)
            await asyncio.to_thread(scene.reach_log, told)
        await asyncio.to_thread(scene.ray.start, 2)
        await asyncio.to_thread(scene.reach_log, "node host2 is up with", 2)
        assert scene.hosts[2].kill(AGENT)
        await load.more(4)
    after = pids(await scene.until(whole))
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, scene.keepers()) == (before, held)
