"""A deployment follows the nodes that join a running server, and links that are known better."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from oserve.config import load_settings
from oserve.core import Device, OServeError, VirtualClock
from oserve.engines.processor import Processor
from oserve.perf.device import Link
from oserve.startup.deployment import ServerDeployment, prepare
from oserve.startup.growth import ClusterGrowth, grown_to
from oserve.startup.node_fleet import NodeFleet, NodesFound

PROCESSOR = Processor(name="CPU", flags=frozenset({"avx2"}))


def found(*names: str, network: str | Link = "infiniband-400") -> NodesFound:
    devices = tuple(
        Device(id=f"{name}/cpu:{n}", kind="cpu", node=name, memory_bytes=4 << 30, cores=(n,))
        for name in names
        for n in range(2)
    )
    return NodesFound(devices=devices, processor=PROCESSOR, network=network)


def deployed(model: str, folder: Path, nodes: NodesFound) -> ServerDeployment:
    given = {
        "model": model,
        "state_dir": str(folder / "state"),
        "cluster.cpu_flags": "avx2",
        "planning.rates": "chats:60x120=6",
    }
    return prepare(load_settings(None, given, {}), nodes)


def test_a_grown_deployment_is_what_the_next_server_would_prepare(
    model: str, tmp_path: Path
) -> None:
    before = deployed(model, tmp_path, found("a"))
    both = found("a", "b")
    grown = grown_to(before, both)
    assert grown is not None
    assert before.plan_request is not None
    assert grown.plan_request is not None
    assert grown.devices == both.devices
    # What runs stays, and the controller goes on counting the same types.
    assert (grown.plan, grown.settings) == (before.plan, before.settings)
    assert grown.plan_request.demand == before.plan_request.demand
    assert grown.plan_request.devices == both.devices
    assert grown.fingerprint == deployed(model, tmp_path, both).fingerprint != before.fingerprint
    assert grown_to(grown, both) is None


def test_another_network_counts_where_replicas_may_span_nodes(model: str, tmp_path: Path) -> None:
    before = deployed(model, tmp_path, found("a", "b"))
    request = before.plan_request
    assert request is not None
    slow = found("a", "b", network=Link(name="measured", bandwidth=1e8, latency_s=1e-3))
    assert not any(shape.pipeline_parallel_size > 1 for shape in request.shapes)
    assert grown_to(before, slow) is None
    staged = replace(
        before,
        plan_request=replace(
            request, shapes=(replace(request.shapes[0], pipeline_parallel_size=2),)
        ),
    )
    grown = grown_to(staged, slow)
    assert grown is not None
    assert grown.network == slow.network
    same = found("a", "b", network=Link(name="measured", bandwidth=1.1e8, latency_s=1.1e-3))
    again = replace(grown, plan_request=staged.plan_request)
    assert grown_to(again, same) is None


def test_devices_that_cannot_be_planned_for_leave_the_request_as_it_is(
    model: str, tmp_path: Path
) -> None:
    before = deployed(model, tmp_path, found("a"))
    strange = Device(id="g/gpu:0", kind="Z9000", node="g", memory_bytes=1 << 30)
    more = replace(found("a"), devices=(*found("a").devices, strange))
    grown = grown_to(before, more)
    assert grown is not None
    assert grown.plan_request is before.plan_request
    assert strange in grown.devices


class _Fleet:
    def __init__(self) -> None:
        self.nodes = found("a")
        self.asked = 0

    def found(self, _settings: Any) -> NodesFound:
        self.asked += 1
        if self.asked == 1:
            raise OServeError("a fault", place="", remedy="")
        return self.nodes


async def test_nodes_that_come_together_are_followed_once(
    model: str, tmp_path: Path, monkeypatch: Any
) -> None:
    async def at_once(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    fleet, clock = _Fleet(), VirtualClock()
    told: list[ServerDeployment] = []

    faults = [OSError("a fault")]

    async def renewed(deployment: ServerDeployment) -> None:
        if faults:
            raise faults.pop()
        told.append(deployment)

    follower = ClusterGrowth(
        deployed(model, tmp_path, fleet.nodes), cast(NodeFleet, fleet), clock, renewed
    )
    task = asyncio.create_task(follower.run())
    follower.notice()
    await clock.advance(5.0)
    for names in (("a", "b"), ("a", "b", "c")):
        fleet.nodes = found(*names)
        follower.notice()
    for _ in range(100):
        await clock.advance(1.0)
    # Faults on the way did not end it, and what is in force is known once.
    assert [len(one.devices) for one in told] == [6]
    assert len(follower.deployment.devices) == 6
    assert fleet.asked == 3
    task.cancel()
