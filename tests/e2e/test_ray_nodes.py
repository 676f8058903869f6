"""The same with the nodes of a real Ray cluster, any part of which may go."""

import asyncio
import json
import signal
from collections.abc import Iterator

import pytest

from e2e.node_scene import NODES, PLAN, load_on, pids, whole
from e2e.ray_scene import AGENT, GCS, HELPER, RAYLET, RayScene, ray_scene
from hosts import unavailable
from oserve.engines.tiny import make_tiny_model

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.alone,
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
        scene.reach(lambda: scene.keepers() == [])
        scene.reach(lambda: not any(scene.hosts[number].processes("vllm") for number in NODES))


async def test_streams_and_engines_outlive_whatever_ray_runs(scene: RayScene) -> None:
    before, held = pids(await scene.until(whole)), scene.keepers()
    load = await load_on(scene)
    # A raylet aborts if an agent of its own needs more than 15 s to start: leave it a core.
    load.width = 1
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
        await asyncio.to_thread(scene.reach, lambda: scene.ray.joined(2))
        await asyncio.to_thread(scene.reach_log, "node host2 is up with", 2)
        assert scene.hosts[2].kill(AGENT)
        await load.more(4)
    after = pids(await scene.until(whole))
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, scene.keepers()) == (before, held)


@pytest.mark.hosts
async def test_plan_dry_run_and_doctor_look_at_the_nodes_and_change_nothing(
    scene: RayScene,
) -> None:
    before, held = pids(await scene.until(whole)), scene.keepers()
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
    assert (pids(await scene.until(whole)), scene.keepers()) == (before, held)


@pytest.mark.hosts
async def test_a_server_that_starts_while_the_head_is_away_finds_its_nodes(
    scene: RayScene,
) -> None:
    before, held = pids(await scene.until(whole)), scene.keepers()
    load = await load_on(scene)
    load.width = 1  # a server and raylets start beside it
    async with load.running():
        await load.more(1)
        scene.end_server(signal.SIGKILL)
        assert scene.hosts[0].kill(GCS)
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
        scene.ray.start(0)
        await asyncio.to_thread(scene.reach, lambda: scene.ray.joined(0))
        for number in NODES:
            # After a minute without a head they end.
            if not scene.hosts[number].processes(RAYLET):
                scene.ray.start(number)
        await asyncio.to_thread(scene.reach, lambda: "Ray is heard again" in scene.last_log())
        await load.more(1)
    assert not load.wrong, (load.wrong, scene.logs())
    assert (after, scene.keepers()) == (before, held)


async def test_another_server_does_not_get_the_nodes(scene: RayScene) -> None:
    before = pids(await scene.until(whole))
    other = ("--cluster", scene.cluster, "--state-dir", f"{scene.folder}/other")
    refused = await asyncio.to_thread(
        scene.cli, "serve", str(scene.folder / "tiny"), *other, *scene.words, host=2
    )
    assert refused.returncode == 2
    assert "another server of OServe" in refused.stderr, refused.stderr
    assert pids(await scene.until(whole)) == before
