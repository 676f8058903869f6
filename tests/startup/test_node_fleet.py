"""What a directory tells of nodes reaches the engines, and not everything that it tells."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from oserve.config import load_settings
from oserve.core import Device, HatchAddress, OServeError, VirtualClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.keeper_messages import NodeFacts
from oserve.nodes.directory import ClusterNode, NodeChanged
from oserve.nodes.examination import LinkFacts
from oserve.nodes.known_nodes import KnownDirectory, KnownNodes
from oserve.perf.device import Link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.startup.deployment import prepare
from oserve.startup.lock import StateLock
from oserve.startup.node_fleet import NodeFleet, node_directory


def node(name: str, *, bf16: bool = True, slots: int = 2) -> ClusterNode:
    return ClusterNode(
        name=name,
        hatch=HatchAddress(host="127.0.0.1", port=9, certificate="", token="secret-7"),
        devices=tuple(
            Device(id=f"{name}/cpu:{n}", kind="cpu", node=name, memory_bytes=4 << 30, cores=(n,))
            for n in range(slots)
        ),
        facts=NodeFacts(host=name, bf16=bf16),
    )


class Told:
    """A directory of what a test says."""

    def __init__(self, changed: NodeChanged, known: Mapping[str, ClusterNode]) -> None:
        self.nodes = dict(known)
        self.silent = ""
        self.changed = changed
        self.ended: list[bool] = []

    async def start(self) -> None:
        pass

    async def close(self, *, end_nodes: bool) -> None:
        self.ended.append(end_nodes)

    def tell(self, told: ClusterNode) -> None:
        self.nodes[told.name] = told
        self.changed(told)


@dataclass
class Nodes:
    """Stands for ``ClusterNodes``."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    up: bool = True
    on_node: Any = None

    @property
    def book(self) -> "Nodes":
        return self

    def reasons(self) -> dict[str, str]:
        # No peer is to be told in these tests.
        return {"a": "down", "b": "down"}

    def is_up(self, _name: str) -> bool:
        return self.up

    def join(self, held: Any, devices: tuple[Device, ...]) -> None:
        self.calls.append(("join", held.node, len(devices)))

    def begin(self) -> None:
        self.calls.append(("begin",))

    def lose(self, name: str, reason: str) -> None:
        self.calls.append(("lose", name, reason))

    def redirect(self, name: str, hatch: HatchAddress) -> None:
        self.calls.append(("redirect", name, hatch.port))


@dataclass
class Cluster:
    nodes: Nodes = field(default_factory=Nodes)


class World:
    def __init__(self, folder: Path) -> None:
        self.known = KnownNodes(folder / "hatches", "ray")
        self.cluster = Cluster()
        made: list[Told] = []

        def make(changed: NodeChanged, known: Mapping[str, ClusterNode]) -> Told:
            made.append(Told(changed, known))
            return made[0]

        self.fleet = NodeFleet(make, self.known, grace_s=60.0, clock=VirtualClock())
        self.told = made[0]

    def attach(self) -> None:
        self.fleet.held()
        self.fleet.attach(cast(EngineCluster, self.cluster))
        self.cluster.nodes.calls.clear()


async def test_nodes_that_come_join_and_are_remembered(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(OServeError, match="no node can be used"):
        await world.fleet.start()
    world.told.nodes["a"] = node("a")
    await world.fleet.start()
    assert [held.node for held in world.fleet.held()] == ["a"]
    world.attach()
    world.told.tell(node("b", slots=3))
    assert world.cluster.nodes.calls == [("join", "b", 3), ("begin",)]
    assert world.known.read().keys() == {"a", "b"}
    await world.fleet.close(end_nodes=True)
    assert world.told.ended == [True]
    assert World(tmp_path).fleet.devices == world.fleet.devices


async def test_devices_that_engines_do_not_know_are_not_planned_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    world.told.nodes["a"] = node("a")
    world.attach()
    world.told.tell(node("b"))
    before = world.fleet.devices
    for name, slots, said in (("a", 4, "(2 more, 0 fewer)"), ("b", 1, "(0 more, 1 fewer)")):
        world.told.tell(node(name, slots=slots))
        assert f"node {name} offers other devices than before {said}: restart" in caplog.text
        assert world.fleet.devices == before
    await world.fleet.close(end_nodes=True)
    # The next server begins with what there is.
    assert len(World(tmp_path).fleet.devices) == 5


async def test_nodes_that_all_serve_another_server_are_an_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.told.nodes |= {"a": node("a"), "b": node("b")}
    first, second = world.fleet.held()
    world.attach()
    world.fleet.check_free()
    first._taken = "it serves another server: far:/state"
    world.fleet.check_free()  # one that is free will do
    second._taken = first._taken
    with pytest.raises(OServeError, match=r"a: it serves another server: far:/state; b: "):
        world.fleet.check_free()
    await world.fleet.close(end_nodes=False)


async def test_a_keeper_that_answers_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.told.nodes["a"] = node("a")
    world.attach()
    nodes = world.cluster.nodes
    world.told.tell(replace(node("a"), lost="Ray: its raylet has ended"))
    assert nodes.calls == []
    nodes.up = False
    world.told.tell(replace(node("a"), lost="Ray: no heartbeat"))
    assert nodes.calls == [("lose", "a", "Ray: no heartbeat")]
    moved = node("a")
    assert moved.hatch is not None
    world.told.tell(replace(moved, hatch=replace(moved.hatch, port=10)))
    assert nodes.calls[1:] == [("redirect", "a", 10)]
    await world.fleet.close(end_nodes=False)


def test_a_deployment_is_for_the_devices_and_processors_of_the_nodes(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.told.nodes |= {"a": node("a"), "b": node("b", bf16=False)}
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "replicas: [{id: one, devices: [b/cpu:1], shape: {precision: fp32}}]\n"
        "workload_types: [{name: all}]\n"
    )
    given = {"model": "facebook/opt-125m", "plan": str(plan), "state_dir": str(tmp_path / "s")}
    settings = load_settings(None, given, {})
    found = world.fleet.found(settings)
    # Only what every node can do is done without emulation.
    assert not found.processor.has_bf16
    world.told.nodes["b"] = node("b")
    assert world.fleet.found(settings).processor.has_bf16
    deployment = prepare(settings, found)
    assert [device.id for device in deployment.devices] == [
        *("a/cpu:0", "a/cpu:1", "b/cpu:0", "b/cpu:1")
    ]


def test_a_fleet_is_made_before_the_event_loop_runs(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert World(tmp_path).fleet.devices == ()


async def test_the_link_between_nodes_is_the_one_named_else_as_measured(tmp_path: Path) -> None:
    world = World(tmp_path)
    fleet = world.fleet
    world.told.nodes |= {"a": node("a"), "b": node("b")}
    networks: list[str | Link] = [fleet.network]
    fleet.links.learn("a", LinkFacts(target="b", round_trip_s=1e-3, bytes_per_s=1e9), 0.0)
    networks.append(fleet.network)
    # Ranks that use InfiniBand are not measured by what hatches can carry.
    world.told.nodes["b"] = replace(node("b"), facts=NodeFacts(host="b", rdma=True))
    networks.append(fleet.network)
    measured = Link(name="measured", bandwidth=1e9, latency_s=5e-4)
    assert networks == [DEFAULT_NETWORK, measured, DEFAULT_NETWORK]
    named = NodeFleet(lambda *_: world.told, world.known, grace_s=1.0, network="ethernet-100")
    assert named.network == "ethernet-100"
    assert fleet.documents()["a"]["links"]["measured"] == 1


async def test_growth_is_told_once_a_node_has_joined(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.told.nodes["a"] = node("a")
    told: list[int] = []
    world.fleet.held()
    world.fleet.attach(
        cast(EngineCluster, world.cluster), lambda: told.append(len(world.fleet.devices))
    )
    assert told == []
    world.told.tell(node("b"))
    assert told == [4]
    await world.fleet.close(end_nodes=False)


async def test_a_visitor_orders_nothing_on_the_nodes_of_a_server(tmp_path: Path) -> None:
    settings = load_settings(None, {"cluster.nodes": "ray:h:6379", "state_dir": str(tmp_path)}, {})
    KnownNodes(tmp_path / "hatches", "ray:h:6379").write({"a": node("a")})
    lock = StateLock(tmp_path)
    directory = node_directory(settings)
    assert isinstance(directory, KnownDirectory)
    await directory.start()
    assert directory.nodes == {"a": node("a")}
    await directory.close(end_nodes=False)
    lock.release()
