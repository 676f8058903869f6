"""Keepers of several nodes in the process of the test, with fake engines and a virtual clock."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engines.test_cluster import FakeLauncher, FakeProbe, FakeProcess
from oserve.core import (
    Device,
    Endpoint,
    HatchAddress,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartReplica,
    VirtualClock,
)
from oserve.engines.cluster import EngineCluster
from oserve.engines.holding import HatchDial, HeldEngines
from oserve.engines.keeper import Keeper
from oserve.engines.keeper_children import find_node_facts
from oserve.engines.keeper_connection import LineStreams
from oserve.engines.keeper_messages import MAX_LINE_BYTES
from oserve.engines.probe import ServedModel
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess

# No real process has such a number.
FIRST_PID = 1 << 30


class Launcher(FakeLauncher):
    """Its processes end with it, as those of a real one."""

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        process = await super().start(argv, env, cores, log_path)
        assert isinstance(process, FakeProcess)
        process.pid += FIRST_PID
        return process

    async def close(self) -> None:
        await super().close()
        for process in self.processes:
            process.end(0)

    @property
    def alive(self) -> list[FakeProcess]:
        return [process for process in self.processes if not process.ended.done()]


class Cable:
    """The way to a keeper: it can be pulled, so that nothing comes through until it is back."""

    def __init__(self, keeper: Path) -> None:
        self._keeper = keeper
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def pull(self) -> None:
        self._whole.clear()

    def plug(self) -> None:
        """Put it back: what was under way arrives."""
        self._whole.set()

    def cut(self) -> None:
        """Break all connections, so that both ends hear of it."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def connect(self, _hatch: HatchAddress) -> LineStreams:
        """As ``HatchDial`` connects."""
        if not self._whole.is_set():
            raise TimeoutError
        far = await asyncio.open_unix_connection(str(self._keeper), limit=MAX_LINE_BYTES)
        ours, theirs = socket.socketpair()
        near = await asyncio.open_unix_connection(sock=theirs, limit=MAX_LINE_BYTES)
        for source, target in ((near, far), (far, near)):
            task = asyncio.create_task(self._carry(source[0], target[1]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._writers.append(target[1])
        return await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE_BYTES)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._whole.wait()
                target.write(data)
        await self._whole.wait()
        target.close()

    async def close(self) -> None:
        """End what carries bytes."""
        self.plug()
        self.cut()
        if self._tasks:
            await asyncio.wait(set(self._tasks))


class FakeNode:
    """A node of two devices: a keeper with fake engines in ``run``, and a cable to it.

    Its logs are where the server does not look.
    """

    def __init__(
        self,
        name: str,
        base: Path,
        clock: VirtualClock,
        run: Path | None = None,
        identity: str = "",
    ) -> None:
        self.name = name
        # Short enough for sockets.
        self.run = run or Path(tempfile.mkdtemp(prefix="n"))
        self._identity = identity or f"of {name}"
        self.state = base / name
        self.state.mkdir()
        self.launcher = Launcher()
        self.devices = tuple(
            Device(id=f"{name}/cpu:{n}", kind="cpu", node=name, cores=(n,)) for n in range(2)
        )
        self._clock = clock
        self.cable = Cable(self.run / "keeper.sock")
        self.dial = HatchDial(
            name,
            HatchAddress(host=name, port=1, certificate="", token="secret"),
            clock=clock,
            connect=self.cable.connect,
        )
        self.running = self.begin()

    def begin(self, **keeper: Any) -> "asyncio.Task[None]":
        """Run a keeper."""
        facts = find_node_facts(self.run, self.state)
        self.keeper = Keeper(
            folder=self.run,
            registry=self.state / "keeper.json",
            launcher=self.launcher,
            identity=self._identity,
            grace_s=600.0,
            node=msgspec.structs.replace(facts, host=self.name, **keeper),
            clock=self._clock,
        )
        self.running = asyncio.create_task(self.keeper.run())
        return self.running

    async def begun(self) -> None:
        async with asyncio.timeout(60.0):
            while not (self.run / "keeper.sock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0)

    def crash(self, engine: str) -> None:
        """End an engine from without."""
        process = self.keeper._children[engine].process
        assert isinstance(process, FakeProcess)
        process.end(1)

    def log(self, replica: str) -> Path:
        return self.state / f"{replica}.log"

    async def close(self) -> None:
        await self.cable.close()
        self.keeper.stop(patient=False)
        await self.running
        assert not self.launcher.alive
        assert not self.run.exists()


class Fleet:
    """Nodes, and one server after another."""

    def __init__(self, base: Path, *names: str) -> None:
        self.base = base
        self.clock = VirtualClock()
        self.nodes = {name: FakeNode(name, base, self.clock) for name in names}
        self.well: set[str] = set()
        self.probes: dict[str, FakeProbe] = {}
        self.turned: list[tuple[str, bool]] = []
        # Whether engines tell their models.
        self.tell = asyncio.Event()
        self.tell.set()
        self.cluster: EngineCluster
        self.held: list[HeldEngines]
        self._servers = 0

    async def server(self, grace_s: float = 600.0) -> tuple[list[str], list[str]]:
        """Another server, after the previous one was killed."""
        if self._servers:
            await self.vanish()
        self._servers += 1
        for node in self.nodes.values():
            await node.begun()
        self.held = [HeldEngines(node.dial, grace_s=grace_s) for node in self.nodes.values()]
        self.cluster = EngineCluster(
            tuple(device for node in self.nodes.values() for device in node.devices),
            model="some/model",
            served_model_name="tiny",
            run_dir=self.base / "server",
            clock=self.clock,
            settings=EngineSettings(kv_cache_memory_bytes=1 << 20),
            remote=self.held,
            launcher=Launcher(),
            probe=self._probe,
            on_node=lambda node, reason: self.turned.append((node, not reason)),
        )
        return await self.cluster.adopt()

    async def vanish(self) -> None:
        """Kill the server: its connections break, and it does nothing more."""
        await self.cluster.nodes.close()
        for held in self.held:
            held.cut("the server was killed")
        tasks = [task for _, task in self.cluster._running.values()]
        while not all(task.done() for task in tasks):
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        await self.settle(0)

    def _probe(self, endpoint: Endpoint) -> FakeProbe:
        name = endpoint.unix_socket.partition("/")[0]
        fleet = self

        class Probe(FakeProbe):
            well = property(lambda _self: name in fleet.well, lambda _self, _value: None)

            async def models(self) -> tuple[ServedModel, ...] | None:
                await fleet.tell.wait()
                return await super().models()

        self.probes[name] = Probe(endpoint)
        return self.probes[name]

    async def settle(self, seconds: float = 0.3) -> None:
        """Let time pass, and let the connections carry what is on them."""
        for _ in range(5):
            await self.clock.advance(seconds / 5)
            for _ in range(20):
                await asyncio.sleep(0)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60.0):
            while not true():
                await self.settle()

    async def start(self, name: str, *devices: str, ready: bool = True) -> None:
        await self.cluster.apply(StartReplica(spec=spec(name, *devices)))
        if ready:
            self.well.add(self.engine(name))
            await self.until(lambda: self.state(name).phase is ReplicaPhase.READY)

    def engine(self, name: str) -> str:
        """The name of a replica's engine."""
        return self.state(name).endpoint.unix_socket.partition("/")[0]

    def state(self, name: str) -> ReplicaState:
        return self.cluster._states[name]

    def phase(self, name: str) -> ReplicaPhase:
        return self.state(name).phase

    async def devices(self) -> set[str]:
        return {device.id for device in (await self.cluster.observe()).devices}

    async def close(self) -> None:
        closing = asyncio.create_task(self.cluster.close())
        while not closing.done():
            await self.settle()
        await closing
        for node in self.nodes.values():
            await node.close()


def spec(name: str, *devices: str) -> ReplicaSpec:
    shape = ReplicaShape(max_num_batched_tokens=256, tensor_parallel_size=len(devices))
    return ReplicaSpec(id=name, shape=shape, devices=devices)
