"""A replica on several nodes: one start on each, told the same, at addresses of the nodes."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from oserve.core import Device, Endpoint, ReplicaShape, ReplicaSpec, parts_of
from oserve.engines import part_engines
from oserve.engines.engine_starts import EngineCommand, EngineFiles, LaunchFacts
from oserve.engines.node_engines import NodeEngines
from oserve.engines.part_engines import PartsEngines
from oserve.engines.ports import MasterPorts
from oserve.engines.settings import EngineSettings
from oserve.engines.watched import OwnProcess, WatchedProcess


class Silent:
    """A process that runs until it is told to end."""

    pid = 1

    def __init__(self) -> None:
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        if not self._ended.done():
            self._ended.set_result(0)


class FakeNode(NodeEngines):
    """Notes what it is to start."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.commands: list[EngineCommand] = []

    def files(self, spec: ReplicaSpec, number: int) -> EngineFiles:
        folder = Path(f"/{self.name}/{spec.id}-{number}")
        return EngineFiles(
            folder=folder,
            log_path=folder / "log",
            endpoint=Endpoint(unix_socket=f"{folder}/api.sock", caches="/caches"),
        )

    async def launch(
        self,
        spec: ReplicaSpec,
        devices: Sequence[Device],
        files: EngineFiles,
        command: EngineCommand,
        *,
        standby: bool,
    ) -> WatchedProcess:
        assert {device.node for device in devices} == {self.name}
        self.commands.append(command)
        return OwnProcess(Silent(), files.log_path, lambda _pid, _log: None)


async def test_each_node_starts_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_engines, "node_addresses", lambda _nodes: ["10.0.0.1", "10.0.0.2"])
    devices = {
        f"{node}/cpu:{slot}": Device(id=f"{node}/cpu:{slot}", kind="cpu", node=node, cores=(slot,))
        for node in ("a", "b")
        for slot in (0, 1)
    }
    shape = ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2)
    spec = ReplicaSpec(id="r", shape=shape, devices=tuple(devices))
    facts = LaunchFacts(
        model="some/model",
        served_model_name="m",
        settings=EngineSettings(kv_cache_memory_bytes=1 << 26),
        platform="cpu",
        sized=False,
    )
    nodes = [FakeNode("a"), FakeNode("b")]
    engines = PartsEngines(facts, parts_of(spec, devices), nodes, MasterPorts(range(7, 9), first=0))
    files = engines.files(spec, 3)
    # Caches of several nodes do not move.
    assert files.endpoint == Endpoint(unix_socket="/a/r-3/api.sock")
    process = await engines.start(spec, list(devices.values()), files, standby=False)
    (leader,), (other,) = (node.commands for node in nodes)
    both = set(leader.argv) & set(other.argv)
    assert set(leader.argv) - both == {"0"}
    assert set(other.argv) - both == {"1", "--headless"}
    assert "/a/r-3/api.sock" in both
    assert "--kv-transfer-config" not in both
    meeting = ["--master-addr", "10.0.0.1", "--master-port", "7"]
    for argv in (leader.argv, other.argv):
        where = argv.index("--master-addr")
        assert argv[where : where + 4] == meeting
    assert [one.env["VLLM_HOST_IP"] for one in (leader, other)] == ["10.0.0.1", "10.0.0.2"]
    assert [one.env["TMPDIR"] for one in (leader, other)] == ["/a/r-3", "/b/r-3"]
    # Each node looks up which of its interfaces has the address.
    assert "GLOO_SOCKET_IFNAME" not in leader.env
    process.terminate()
    assert await process.wait() == 0
