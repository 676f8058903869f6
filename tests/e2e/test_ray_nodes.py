"""The same with the nodes of a real Ray cluster, whose helper may go."""

import asyncio
import json
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


async def test_plan_dry_run_and_doctor_look_at_the_nodes_and_change_nothing(
    scene: RayScene,
) -> None:
    before, held = pids(await scene.until(whole)), keepers(scene)
    model, at = str(scene.folder / "tiny"), ("--cluster", scene.cluster)
    planned = await asyncio.to_thread(
        scene.cli, "plan", "--model", model, *at, "--rates", "64x16=1", "--no-ladder", "--json"
    )
    assert planned.returncode == 0, planned.stderr
    assert all(f"host{number}/cpu:2" in planned.stdout for number in NODES)
    dry = await asyncio.to_thread(
        scene.cli, "serve", model, *at, "--state-dir", f"{scene.folder}/dry", "--dry-run", host=1
    )
    assert dry.returncode == 0, dry.stderr
    assert "host2/cpu:2" in dry.stderr
    # It finds the server's nodes by its state folder, and leaves engines and keepers alone.
    doctor = await asyncio.to_thread(
        scene.cli, "doctor", model, *at, "--state-dir", scene.state, "--json"
    )
    findings = json.loads(doctor.stdout)["findings"]
    failed = [one for one in findings if one["verdict"] == "fail"]
    assert (doctor.returncode, failed) == (0, []), (doctor.stdout, doctor.stderr)
    found = {(one["node"], one["check"]): one["found"] for one in findings}
    for number, other in ((1, 2), (2, 1)):
        assert found[f"host{number}", "devices"] == "3 offered, 2 engines run"
        assert "there and back" in found[f"host{number}", f"link to host{other}"]
        assert "ahead of" in (clock := found[f"host{number}", "clock"]) or "behind" in clock
        assert found[f"host{number}", "interface eth0"].startswith("MTU ")
    assert "same" in found["cluster", "model"]
    assert (pids(await scene.until(whole)), keepers(scene)) == (before, held)


async def test_a_server_that_starts_while_the_head_is_away_finds_its_nodes(
    scene: RayScene,
) -> None:
    assert scene.raylets is not None
    before, held = pids(await scene.until(whole)), keepers(scene)
    load = await load_on(scene)
    load.width = 2  # a server starts beside it
    async with load.running():
        await load.more(1)
        scene.end_server(signal.SIGKILL)
        assert scene.hosts[0].kill("gcs_server")
        # Whoever does not know the nodes is told at once.
        strange = ("--cluster", scene.cluster, "--state-dir", f"{scene.folder}/strange")
        refused = await asyncio.to_thread(
            scene.cli, "serve", str(scene.folder / "tiny"), *strange, host=1
        )
        assert refused.returncode == 2
        assert "no Ray head answers at that address" in refused.stderr
        assert "remedy" in refused.stderr
        await asyncio.to_thread(scene.serve)
        assert "nothing is heard of Ray" in scene.last_log()
        after = pids(await scene.until(whole))
        await load.more(1)
        scene.raylets.start(0)
        await asyncio.to_thread(scene.reach, lambda: scene.raylets.joined(0))
        for number in NODES:
            # After a minute without a head they end.
            if not scene.hosts[number].processes("raylet/raylet"):
                scene.raylets.start(number)
        await asyncio.to_thread(scene.reach, lambda: "Ray is heard again" in scene.last_log())
        await load.more(1)
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, keepers(scene)) == (before, held)


async def test_another_server_does_not_get_the_nodes(scene: RayScene) -> None:
    before = pids(await scene.until(whole))
    other = ("--cluster", scene.cluster, "--state-dir", f"{scene.folder}/other")
    refused = await asyncio.to_thread(
        scene.cli, "serve", str(scene.folder / "tiny"), *other, *MORE, host=2
    )
    assert refused.returncode == 2
    assert "another server of OServe" in refused.stderr, refused.stderr
    assert pids(await scene.until(whole)) == before
