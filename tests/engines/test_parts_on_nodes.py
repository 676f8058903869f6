"""Replicas over two nodes: real keepers with fake processes, and what ends with what."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from keepers import Fleet, spec
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    NodePhase,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
)
from oserve.engines import part_engines
from oserve.engines.engine_starts import LaunchFacts

GONE, HUNG, READY = ReplicaPhase.GONE, ReplicaPhase.HUNG, ReplicaPhase.READY
ADDRESSES = {"one": "10.0.0.1", "two": "10.0.0.2"}


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(part_engines, "_address", ADDRESSES.__getitem__)
    fleet = Fleet(tmp_path, "one", "two")
    assert await fleet.server() == ([], [])
    yield fleet
    await fleet.close()


async def start(fleet: Fleet) -> None:
    """A replica of four ranks, two on each node."""
    devices = ("one/cpu:0", "one/cpu:1", "two/cpu:0", "two/cpu:1")
    shape = ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2)
    spec = ReplicaSpec(id="r", shape=shape, devices=devices)
    await fleet.cluster.apply(StartReplica(spec=spec))
    fleet.well.add(fleet.engine("r"))
    await fleet.until(lambda: fleet.phase("r") is READY)


async def reason(fleet: Fleet) -> str:
    return (await fleet.cluster.observe()).failures["r"].reason


async def test_each_keeper_holds_a_part(fleet: Fleet) -> None:
    await start(fleet)
    one, two = fleet.nodes.values()
    (leader, own, _), (other, theirs, _) = (node.launcher.asked[0] for node in (one, two))
    assert [word for word in other if word not in leader] == ["1", "--headless"]
    assert (own["TMPDIR"], theirs["TMPDIR"]) == (str(one.run / "r-1"), str(two.run / "r-1"))
    assert (own["VLLM_HOST_IP"], theirs["VLLM_HOST_IP"]) == ("10.0.0.1", "10.0.0.2")
    endpoint = fleet.state("r").endpoint
    assert (endpoint.unix_socket, endpoint.hatch) == ("r-1/api.sock", one.dial.hatch)
    await fleet.cluster.apply(StopReplica(replica="r"))
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert [node.launcher.processes[0].signals[0] for node in (one, two)] == ["TERM", "TERM"]
    assert (await fleet.cluster.observe()).failures == {}
    assert not (one.run / "r-1").exists()
    assert not (two.run / "r-1").exists()


@pytest.mark.parametrize("victim", ["one", "two"])
async def test_a_part_that_ends_takes_the_others_along(fleet: Fleet, victim: str) -> None:
    await start(fleet)
    node = fleet.nodes.pop(victim)
    (survivor,) = fleet.nodes.values()
    fleet.nodes[victim] = node
    node.log("r").write_text("RuntimeError: no memory\n")
    node.launcher.alive[0].end(1)
    await fleet.until(lambda: fleet.phase("r") is GONE)
    number, ranks = (1, "0 to 1") if victim == "one" else (2, "2 to 3")
    assert await reason(fleet) == (
        f"part {number} of 2 (node {victim}, ranks {ranks}) ended with status 1: "
        "RuntimeError: no memory"
    )
    assert survivor.launcher.processes[0].signals == ["KILL"]


async def test_a_silent_node_ends_the_parts_elsewhere(fleet: Fleet) -> None:
    await start(fleet)
    one, two = fleet.nodes.values()
    two.cable.pull()
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert fleet.state("r").detail.startswith(
        "part 2 of 2 (node two, ranks 2 to 3) is out of reach: node two is lost"
    )
    assert one.launcher.processes[0].signals == ["KILL"]
    # It is no failure of the replica, and its devices here are free again.
    assert (await fleet.cluster.observe()).failures == {}
    await fleet.start("s", "one/cpu:0")
    # What still runs there ends before the node is up.
    assert len(two.launcher.alive) == 1
    two.cable.plug()
    await fleet.until(lambda: fleet.turned[-1] == ("two", True))
    assert not two.launcher.alive


async def test_a_replica_leaves_before_its_other_parts_have_ended(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(fleet)
    one, two = fleet.nodes.values()
    leader = one.launcher.processes[0]
    monkeypatch.setattr(leader, "kill", lambda: leader.signals.append("KILL"))
    two.cable.cut()
    await fleet.until(lambda: fleet.phase("r") is not READY)
    assert fleet.phase("r") is HUNG
    assert "part 2 of 2 (node two, ranks 2 to 3) is out of reach" in fleet.state("r").detail
    await fleet.settle(60.0)
    assert fleet.phase("r") is HUNG
    leader.end(-9)
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert (await fleet.cluster.observe()).failures == {}


async def test_the_next_server_takes_all_parts_over(fleet: Fleet) -> None:
    await start(fleet)
    endpoint, since_s = fleet.state("r").endpoint, fleet.state("r").since_s
    assert await fleet.server() == (["r"], [])
    assert fleet.phase("r") is READY
    assert fleet.state("r").endpoint == endpoint
    assert fleet.state("r").since_s == since_s
    assert [node.launcher.processes[0].signals for node in fleet.nodes.values()] == [[], []]
    # They are tied together as before.
    await fleet.settle()
    fleet.nodes["two"].launcher.alive[0].end(1)
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert fleet.nodes["one"].launcher.processes[0].signals == ["KILL"]


@pytest.mark.parametrize("missing", ["one", "two"])
async def test_parts_without_the_others_are_ended(fleet: Fleet, missing: str) -> None:
    await start(fleet)
    await fleet.vanish()
    fleet.nodes[missing].launcher.alive[0].end(0)
    await fleet.settle()
    kept, ended = await fleet.server()
    assert (kept, ended) == ([], ["r"])
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert not any(node.launcher.alive for node in fleet.nodes.values())
    await start(fleet)


async def test_parts_of_other_settings_are_not_taken_over(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(fleet)
    monkeypatch.setattr(LaunchFacts, "stamp", lambda _self, _devices: "other")
    kept, _ = await fleet.server()
    assert kept == []
    await fleet.until(lambda: not any(node.launcher.alive for node in fleet.nodes.values()))


async def test_devices_of_a_part_that_is_still_ending_are_not_used_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(fleet)
    one, two = fleet.nodes.values()
    leader = one.launcher.processes[0]
    monkeypatch.setattr(leader, "kill", lambda: leader.signals.append("KILL"))
    monkeypatch.setattr(leader, "terminate", lambda: leader.signals.append("TERM"))
    left = spec("s", "one/cpu:0")
    whole = DeploymentPlan(
        id="p", replicas=(fleet.state("r").spec,), length_classes=(), routing_shares={}
    )
    loop = ControlLoop(fleet.cluster, fleet.clock, whole, policy=ReconcilePolicy())
    await loop.step()
    two.cable.pull()
    view = await loop.look()
    while view.node_states[1].phase is not NodePhase.LOST:
        await fleet.settle(0.5)
        view = await loop.look()
    # Its requests go on elsewhere; what is left of it still has its devices on node one.
    assert [(one.spec.id, one.phase) for one in view.replicas] == [("r", HUNG)]
    loop.plan = replace(whole, replicas=(left,))
    for _ in range(20):
        assert not [one for one in await loop.step() if isinstance(one, StartReplica)]
        await fleet.settle(1.0)
    leader.end(-9)
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert await loop.step() == (StartReplica(spec=left),)


async def test_parts_on_nodes_that_have_swapped_names_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_engines, "_address", {**ADDRESSES, "three": "10.0.0.3"}.__getitem__)
    fleet = Fleet(tmp_path, "one", "two", "three")
    await fleet.server()
    await start(fleet)
    two, three = fleet.nodes["two"], fleet.nodes["three"]
    ways = two.cable.connect, three.cable.connect
    three.dial._connect, two.dial._connect = ways
    assert (await fleet.server())[0] == []
    await fleet.until(lambda: not any(node.launcher.alive for node in fleet.nodes.values()))
    await fleet.until(lambda: fleet.phase("r") is GONE)
    assert len(await fleet.devices()) == 6
    await fleet.close()
