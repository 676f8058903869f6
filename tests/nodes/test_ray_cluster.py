"""Real Ray on three hosts: who is told what when agent, raylet, head, helper or node goes."""

import asyncio
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from hosts import Hosts, unavailable
from oserve.nodes.agent_messages import AgentOrders
from oserve.nodes.directory import ClusterNode
from oserve.nodes.ray_cluster import RayDirectory
from oserve.nodes.ray_messages import HelperStart
from raylets import Raylets, running

pytestmark = [
    pytest.mark.alone,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="module"),
]

_log = logging.getLogger("oserve.nodes")

KEEPER = "oserve.engines.keeper"
HATCH = "oserve.nodes.hatch"
AGENT = "ray::NodeAgent"
LIMIT_S = 300.0

# Reads the greeting of another node's keeper through its hatch.
CALL = """
import asyncio, sys
from oserve.core import HatchAddress
from oserve.engines.keeper_messages import MAX_LINE_BYTES
from oserve.nodes.host_cluster import node_told
from oserve.wire.hatch import open_hatch

async def call():
    host, port, token = sys.argv[1:4]
    hatch = HatchAddress(host=host, port=int(port), certificate=sys.argv[4], token=token)
    reader, _ = await open_hatch(hatch, "keeper.sock", limit=MAX_LINE_BYTES)
    print(node_told("far", hatch, await reader.readline()).facts.host)

asyncio.run(call())
"""

NVIDIA_SMI = """#!/bin/sh
case "$1" in
*gpu=index*) for n in 0:a 1:b 2:c; do
  echo "${{n%:*}}, NVIDIA H100 80GB HBM3, 81559, GPU-${{n#*:}}"
done ;;
*apps*) cat {strangers} ;;
esac
"""
# GPUs that Ray could give to another job.
FREE = """
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(ray.available_resources().get("GPU", 0.0))
"""


@dataclass(slots=True)
class Scene:
    """A server's view of Ray on hosts 1 and 2, whose head is host 0; the helper runs on host 1."""

    hosts: Hosts
    raylets: Raylets
    directory: RayDirectory
    changes: list[ClusterNode] = field(default_factory=list)

    async def until(self, what: Callable[[], object], told: str) -> None:
        """Wait for something that processes bring about."""
        for _ in range(int(LIMIT_S / 0.05)):
            if what():
                return
            self.raylets.tend()
            await asyncio.sleep(0.05)
        raise AssertionError(f"it never came to this: {told}; {self.directory.nodes}")

    def one(self, host: int, *words: str) -> int:
        """The only process of a host with these words."""
        found = self.hosts[host].processes(*words)
        assert len(found) == 1, found
        return found[0]

    def driver(self, program: str) -> list[str]:
        """A command that runs a program with what a driver of Ray needs."""
        env = (f"{key}={value}" for key, value in self.raylets.env.items())
        return ["env", *env, sys.executable, "-c", program]

    def keepers(self) -> list[int]:
        return [self.one(host, KEEPER) for host in (1, 2)]

    def up(self) -> bool:
        nodes = self.directory.nodes.values()
        return len(nodes) == 2 and all(node.usable for node in nodes)

    async def lost(self, name: str) -> str:
        """Wait until a node is lost; returns the reason."""
        await self.until(lambda: self.directory.nodes[name].lost, f"{name} is lost")
        return self.directory.nodes[name].lost


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, Raylets]]:
    # Neither is looked for before a test runs: it takes a moment.
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: tools/setup.py --ray")
    if reason := unavailable():
        pytest.skip(f"no hosts can be made here: {reason}")
    folder = tmp_path_factory.mktemp("ray")
    slots = {"oserve_slot": 2}
    with Hosts(3, folder) as hosts, running(hosts, folder, {1: slots, 2: slots}) as raylets:
        yield hosts, raylets


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(
    raylets: tuple[Hosts, Raylets], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Scene]:
    hosts, ray = raylets
    start = HelperStart(
        address=ray.address,
        namespace="oserve-test",
        orders=AgentOrders(
            node="any",
            host="",
            state_dir="/tmp/nodes",
            method="spawn",
        ),
        tend_s=1.0,
        silence_s=3.0,
    )
    changes: list[ClusterNode] = []
    directory = RayDirectory(
        start,
        log=tmp_path_factory.mktemp("helper") / "helper.log",
        changed=changes.append,
        command=hosts[1].words([sys.executable, "-m", "oserve.nodes.ray_helper"]),
        env=ray.env,
    )
    scene = Scene(hosts, ray, directory, changes)
    await scene.until(lambda: ray.joined(1), "Ray is up on host 1")
    await directory.start()
    await scene.until(scene.up, "both nodes are up")
    yield scene
    await directory.close(end_nodes=True)
    for host in (1, 2):
        assert hosts[host].processes(KEEPER) == []


async def test_each_host_that_is_offered_has_a_keeper_and_a_hatch(scene: Scene) -> None:
    nodes = scene.directory.nodes
    assert set(nodes) == {"host1", "host2"}
    for number, name in ((1, "host1"), (2, "host2")):
        node = nodes[name]
        assert [device.id for device in node.devices] == [f"{name}/cpu:0", f"{name}/cpu:1"]
        assert {device.node for device in node.devices} == {name}
        assert node.facts.host == name
        assert len(scene.hosts[number].processes(KEEPER)) == 1
        assert scene.hosts[number].processes(HATCH)
    assert scene.hosts[0].processes(KEEPER) == []
    hatch = nodes["host2"].hatch
    assert hatch is not None
    words = [hatch.host, str(hatch.port), hatch.token, hatch.certificate]
    process = await asyncio.create_subprocess_exec(
        *scene.hosts[0].words([sys.executable, "-c", CALL, *words]),
        env=scene.raylets.env,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert output == b"host2\n"


async def test_an_agent_that_is_killed_comes_back_to_its_keeper(scene: Scene) -> None:
    keepers, before = scene.keepers(), dict(scene.directory.nodes)
    hatches = scene.hosts[2].processes(HATCH)
    [agent] = scene.hosts[2].processes(AGENT)
    _log.info("fault: agent")
    os.kill(agent, signal.SIGKILL)
    await scene.until(
        lambda: scene.hosts[2].processes(AGENT) not in ([], [agent]), "another agent runs"
    )
    assert scene.keepers() == keepers
    assert scene.hosts[2].processes(HATCH) == hatches
    assert scene.directory.nodes == before
    # It looks after the same keeper: a hatch that is killed comes back as the same one.
    _log.info("fault: hatch")
    assert scene.hosts[2].kill(HATCH)
    await scene.until(
        lambda: scene.directory.nodes["host2"].hatch != before["host2"].hatch, "another hatch"
    )
    old, new = before["host2"].hatch, scene.directory.nodes["host2"].hatch
    assert old is not None
    assert new is not None
    assert (new.token, new.certificate) == (old.token, old.certificate)
    assert scene.keepers() == keepers


async def test_a_raylet_that_is_killed_is_told_and_its_keeper_lives(scene: Scene) -> None:
    keepers, before = scene.keepers(), scene.directory.nodes["host2"]
    _log.info("fault: raylet")
    scene.hosts[2].kill("raylet/raylet")
    assert await scene.lost("host2")
    assert scene.directory.nodes["host1"].usable
    await scene.until(lambda: not scene.hosts[2].processes(AGENT), "the agent ends")
    assert scene.keepers() == keepers
    _log.info("Ray is started again")
    scene.raylets.start(2)
    await scene.until(scene.up, "host2 is back")
    assert scene.directory.nodes["host2"] == before
    assert scene.keepers() == keepers


async def test_gpus_that_ray_offers_are_told_by_uuid_and_strangers_refused(scene: Scene) -> None:
    slots = scene.directory.nodes["host2"]
    folder = scene.raylets.folder
    strangers = folder / "strangers"
    strangers.write_text("GPU-a, 7, game\nGPU-c, 8, chess\n")
    stub = folder / "nvidia-smi"
    stub.write_text(NVIDIA_SMI.format(strangers=strangers))
    stub.chmod(0o755)
    scene.hosts[2].kill("raylet/raylet")
    assert await scene.lost("host2")
    path = f"{folder}:{scene.raylets.env['PATH']}"
    scene.raylets.start(2, gpus=2, PATH=path, CUDA_VISIBLE_DEVICES="GPU-b,GPU-c")
    await scene.until(lambda: scene.directory.nodes["host2"].refused, "host2 is refused")
    assert "chess (process 8) on GPU-c" in scene.directory.nodes["host2"].refused
    # What uses a GPU that is not Ray's does not matter.
    strangers.write_text("GPU-a, 7, game\n")
    await scene.until(scene.up, "host2 has its GPUs")
    devices = scene.directory.nodes["host2"].devices
    assert [(device.id, device.kind, device.uuid) for device in devices] == [
        ("host2/gpu:1", "H100", "GPU-b"),
        ("host2/gpu:2", "H100", "GPU-c"),
    ]
    # Ray gives them to nobody else.
    free = await asyncio.to_thread(scene.hosts[1].inside, scene.driver(FREE))
    assert free == "0.0\n"
    scene.hosts[2].kill("raylet/raylet")
    assert await scene.lost("host2")
    scene.raylets.start(2)
    await scene.until(scene.up, "host2 has slots again")
    assert scene.directory.nodes["host2"].devices == slots.devices


async def test_nodes_serve_on_without_the_head(scene: Scene) -> None:
    keepers, before = scene.keepers(), dict(scene.directory.nodes)
    _log.info("fault: head")
    assert scene.hosts[0].kill("gcs_server")
    await scene.until(lambda: scene.directory.silent, "Ray is silent")
    assert scene.directory.nodes == before
    _log.info("Ray is started again")
    scene.raylets.start(0)
    await scene.until(lambda: not scene.directory.silent, "Ray is back")
    await scene.until(scene.up, "both nodes are up")
    assert scene.directory.nodes == before
    assert scene.keepers() == keepers


async def test_a_helper_that_is_killed_is_started_again(scene: Scene) -> None:
    keepers, before = scene.keepers(), dict(scene.directory.nodes)
    _log.info("fault: helper")
    assert scene.hosts[1].kill("oserve.nodes.ray_helper")
    await scene.until(lambda: scene.directory.silent, "the helper is away")
    await scene.until(lambda: not scene.directory.silent, "the helper is back")
    assert scene.directory.nodes == before
    assert scene.keepers() == keepers


async def test_a_node_off_the_network_is_told_and_its_keeper_lives_until_it_loses_power(
    scene: Scene,
) -> None:
    keepers = scene.keepers()
    _log.info("fault: cable")
    scene.hosts.pull_cable(2)
    assert await scene.lost("host2")
    assert scene.keepers() == keepers
    _log.info("the cable is back")
    scene.hosts.plug_cable(2)
    # The raylet learns that it counts as dead, and ends, and its agent with it.
    await scene.until(lambda: not scene.hosts[2].processes("raylet/raylet"), "the raylet ends")
    assert scene.keepers() == keepers
    assert scene.directory.nodes["host2"].lost
    _log.info("fault: power")
    scene.hosts[2].cut_power()
    scene.hosts.power_on(2)
    _log.info("Ray is started again")
    scene.raylets.start(2)
    await scene.until(scene.up, "host2 is back")
    assert scene.keepers()[0] == keepers[0]
    assert scene.keepers()[1] not in keepers
