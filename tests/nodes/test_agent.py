"""A node set up by its agent without Ray, and found by a server through a list of hosts."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from oserve.core import Device, OServeError
from oserve.engines.group import group_members
from oserve.engines.holding import HeldEngines, private_folder
from oserve.engines.registry import read_registry
from oserve.nodes import agent as agents
from oserve.nodes.agent import NodeAgent, token_file
from oserve.nodes.agent_messages import (
    HATCH_PROCESS,
    AgentOrders,
    NodeRefusal,
    NodeReport,
    answer_of,
)
from oserve.nodes.hatch_messages import ADDRESS_FILE
from oserve.nodes.host_cluster import HostDirectory, HostEntry, read_token
from oserve.wire.hatch import fingerprint_of


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentOrders:
    # What an agent does to its process is undone.
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONBREAKPOINT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    return AgentOrders(
        node="a",
        host="127.0.0.1",
        state_dir=str(tmp_path / "nodes"),
        method="spawn",
        devices="cpu",
        cpu_slots=2,
    )


@pytest.fixture
async def agent(orders: AgentOrders) -> AsyncIterator[NodeAgent]:
    agent = NodeAgent()
    yield agent
    await agent.tear_down(orders)
    folder = private_folder(Path(orders.state_dir) / "a")
    assert list(folder.iterdir()) == []
    folder.rmdir()


async def set_up(agent: NodeAgent, orders: AgentOrders) -> NodeReport:
    report = await agent.set_up(orders)
    assert isinstance(report, NodeReport), report
    return report


def entry(orders: AgentOrders, report: NodeReport, **changed: object) -> HostEntry:
    values = {
        "name": "far",
        "address": "127.0.0.1",
        "port": report.hatch.port,
        "token_file": str(token_file(orders)),
        "certificate_sha256": fingerprint_of(report.hatch.certificate),
    }
    return HostEntry(**{**values, **changed})  # type: ignore[arg-type]


@pytest.mark.slow
async def test_a_node_is_set_up_once_and_found_by_its_line_of_the_cluster_file(
    agent: NodeAgent, orders: AgentOrders, tmp_path: Path
) -> None:
    report = await set_up(agent, orders)
    assert [device.id for device in report.devices] == ["cpu:0", "cpu:1"]
    registry = read_registry(Path(orders.state_dir) / "a" / "keeper.json")
    assert registry is not None
    # Asking again changes nothing, nor does another agent.
    assert await set_up(agent, orders) == report
    other = NodeAgent()
    assert await set_up(other, orders) == report
    await other.leave()
    # The keeper is no child of this process: it leads a session of its own.
    assert os.getsid(registry.pid) != os.getsid(0)
    assert registry.pid in group_members(os.getpgid(registry.pid))
    nodes = HostDirectory([entry(orders, report)])
    await nodes.start()
    [node] = nodes.nodes.values()
    assert node.usable
    assert [device.id for device in node.devices] == ["far/cpu:0", "far/cpu:1"]
    assert node.facts.folder == str(private_folder(Path(orders.state_dir) / "a"))
    await nodes.close(end_nodes=False)
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    for bad, said in (
        (entry(orders, report, certificate_sha256="0" * 64), "another certificate"),
        (entry(orders, report, token_file=str(wrong)), "cut the connection off"),
    ):
        with pytest.raises(OServeError, match=said) as caught:
            await HostDirectory([bad]).start()
        assert report.hatch.token not in str(caught.value)
    # A hatch that ends is started again, with the same certificate and token.
    before = next(item for item in registry.held if item.name == HATCH_PROCESS)
    os.kill(before.pid, 9)
    again = report
    while again.hatch == report.hatch:
        await asyncio.sleep(0.02)
        again = await set_up(agent, orders)
    assert again.hatch.certificate == report.hatch.certificate
    assert again.hatch.token == report.hatch.token


async def test_a_server_of_another_version_is_refused(
    agent: NodeAgent, orders: AgentOrders
) -> None:
    answer = answer_of(
        await agent.up(msgspec.json.encode({"node": "a", "host": "h", "version": "0"}))
    )
    assert isinstance(answer, NodeRefusal)
    assert "the server is 0" in answer.reason
    answer = answer_of(await agent.up(b'{"node": 5}'))
    assert isinstance(answer, NodeRefusal)
    assert "cannot read its orders" in answer.reason


def test_gpus_that_ray_gave_are_taken_and_strangers_refused(
    orders: AgentOrders, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tuple(Device(id=f"gpu:{n}", kind="H100", uuid=f"GPU-{n}") for n in range(3))
    monkeypatch.setattr(agents, "find_devices", lambda _kind, _slots: gpus)
    monkeypatch.setattr(agents, "find_gpu_users", lambda: {"GPU-2": "game (process 7)"})
    found = agents._find_devices(orders, "0,GPU-1", engines=False)
    assert [item.id for item in found] == ["gpu:0", "gpu:1"]
    with pytest.raises(OServeError, match="game"):
        agents._find_devices(orders, None, engines=False)
    assert len(agents._find_devices(orders, "", engines=True)) == 3


@pytest.mark.parametrize(
    ("gpus", "visible", "found"),
    [
        (2, "1,2", ["gpu:1", "gpu:2"]),
        (1, "GPU-2", ["gpu:2"]),
        (3, None, ["gpu:0", "gpu:1", "gpu:2"]),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
        (3, "", ["gpu:0", "gpu:1", "gpu:2"]),
        (0, None, ["cpu:0"]),  # --num-gpus=0 and slots: the GPUs are somebody else's
        (0, "", ["cpu:0"]),
        (2, None, "Ray offers 2 of its GPUs, but 3 are visible"),
        (2, "MIG-1,GPU-0", "but 1 are visible"),
        (4, "none here", "but 0 are visible"),  # nvidia-smi is missing, or fails
    ],
)
def test_devices_are_as_many_as_ray_offers(
    orders: AgentOrders,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    visible: str | None,
    found: list[str] | str,
) -> None:
    machine = tuple(Device(id=f"gpu:{n}", kind="H100", uuid=f"GPU-{n}") for n in range(3))

    def devices(kind: str, slots: int | None) -> tuple[Device, ...]:
        if kind == "auto" and visible != "none here":
            return machine
        return tuple(Device(id=f"cpu:{n}", kind="cpu") for n in range(slots or 9))

    monkeypatch.setattr(agents, "find_devices", devices)
    monkeypatch.setattr(agents, "find_gpu_users", dict)
    wanted = msgspec.structs.replace(orders, devices="auto", gpus=gpus, slots=0 if gpus else 1)
    if isinstance(found, str):
        with pytest.raises(OServeError, match=found) as caught:
            agents._find_devices(wanted, visible, engines=False)
        assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy
    else:
        told = agents._find_devices(wanted, visible, engines=False)
        assert [device.id for device in told] == found


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    host = HostEntry(
        name="a", address="h", port=1, token_file=str(file), certificate_sha256="0" * 64
    )
    with pytest.raises(OServeError, match="cannot read the token"):
        read_token(host)
    file.write_text("s3cret\n")
    file.chmod(0o644)
    with pytest.raises(OServeError, match="others can read"):
        read_token(host)
    file.chmod(0o600)
    assert read_token(host) == "s3cret"
    file.write_text("\n")
    with pytest.raises(OServeError, match="empty"):
        read_token(host)


@pytest.mark.slow
async def test_the_address_of_an_earlier_hatch_is_gone_before_the_next_starts(
    agent: NodeAgent, orders: AgentOrders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the next hatch may well have the process id that the old file names."""
    folder = private_folder(Path(orders.state_dir) / "a")
    (folder / ADDRESS_FILE).write_text("{}")

    async def hold(*_: object, **__: object) -> None:
        assert not (folder / ADDRESS_FILE).exists()
        raise OServeError("enough", place="here", remedy="none")

    monkeypatch.setattr(HeldEngines, "hold", hold)
    answer = await agent.set_up(orders)
    assert isinstance(answer, NodeRefusal)
    assert answer.reason == "enough"
