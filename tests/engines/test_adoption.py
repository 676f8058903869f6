"""Servers come and go while the keeper holds their engines: fake processes, a real socket."""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines.test_cluster import FakeLauncher, FakeProbe, FakeProcess
from oserve.core import (
    DrainReplica,
    Endpoint,
    OServeError,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
    VirtualClock,
)
from oserve.engines.adoption import read_note
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import split_cores
from oserve.engines.holding import HeldEngines, KeeperPlace, LocalDial, identity_of
from oserve.engines.keeper import Keeper
from oserve.engines.registry import read_registry
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess

# No real process has such a number.
FIRST_PID = 1 << 30


class Launcher(FakeLauncher):
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


class World:
    """One keeper, and one server after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Short enough for sockets, as a server's own is: no cluster makes one for itself.
        self.run = Path(tempfile.mkdtemp(prefix="w"))
        self.clock = VirtualClock()
        self.launcher = Launcher()
        self.well: set[str] = set()
        self.keeper = Keeper(
            folder=self.run,
            registry=folder / "keeper.json",
            launcher=self.launcher,
            identity=identity_of("spawn", folder),
            grace_s=600.0,
        )
        self.running = asyncio.create_task(self.keeper.run())
        self.cluster: EngineCluster
        self.engines: HeldEngines

    async def begun(self) -> None:
        async with asyncio.timeout(60.0):
            while not (self.run / "keeper.sock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def server(self, **settings: Any) -> tuple[list[str], list[str]]:
        """Another server, after the previous one was killed."""
        if hasattr(self, "engines"):
            await self.vanish()
        grace_s = float(settings.pop("orphan_grace_s", 600.0))
        sized = settings.pop("sized", False)
        place = KeeperPlace(
            folder=self.run,
            state_dir=self.folder,
            log_dir=self.folder,
            method="spawn",
            grace_s=grace_s,
        )
        self.engines = HeldEngines(LocalDial(place), grace_s=grace_s)
        self.cluster = EngineCluster(
            split_cores(range(4), 4),
            model="some/model",
            served_model_name="tiny",
            run_dir=self.run,
            clock=self.clock,
            settings=EngineSettings(**settings),
            sized=sized,
            keeper=self.engines,
            probe=self._probe,
        )
        await self.engines.connect()
        return await self.cluster.adopt()

    async def vanish(self) -> None:
        line = self.engines._line
        assert line is not None
        # A replica's task that is cancelled ends its engine: on a broken line no keeper hears that.
        line._writer.transport.abort()
        tasks = [line.lost, *(task for _, task in self.cluster._running.values())]
        while not all(task.done() for task in tasks):
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)

    def _probe(self, endpoint: Endpoint) -> FakeProbe:
        world = self

        class Probe(FakeProbe):
            well = property(
                lambda probe: Path(probe.endpoint.unix_socket).parent.name in world.well,
                lambda _probe, _value: None,
            )

        return Probe(endpoint)

    async def settle(self, seconds: float = 0.3) -> None:
        """Let time pass, and let the line carry what is on it."""
        for _ in range(10):
            await self.clock.advance(seconds / 10)
            for _ in range(10):
                await asyncio.sleep(0)

    async def start(self, spec: ReplicaSpec, *, ready: bool = True) -> None:
        await self.cluster.apply(StartReplica(spec=spec))
        if ready:
            self.well.add(Path(self.state(spec.id).endpoint.unix_socket).parent.name)
        await self.until(spec.id, ReplicaPhase.READY if ready else ReplicaPhase.LOADING)

    async def until(self, name: str, phase: ReplicaPhase) -> None:
        async with asyncio.timeout(60.0):
            while self.state(name).phase is not phase or not (
                self.state(name).pid or phase is ReplicaPhase.GONE
            ):
                await self.settle()

    def state(self, name: str) -> Any:
        return self.cluster._states[name]

    def booked(self) -> list[str]:
        """Devices in the registry on disk."""
        registry = read_registry(self.folder / "keeper.json")
        assert registry is not None
        notes = [read_note(entry.note) for entry in registry.held]
        return [device for note in notes if note is not None for device in note.devices]

    def alive(self) -> list[FakeProcess]:
        return [process for process in self.launcher.processes if not process.ended.done()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.begun()
    yield world
    world.keeper.stop(patient=False)
    await world.running
    assert not world.alive()
    assert not world.run.exists()
    assert not (tmp_path / "keeper.json").exists()


def spec(name: str, *devices: str, chunk: int = 256) -> ReplicaSpec:
    return ReplicaSpec(
        id=name, shape=ReplicaShape(max_num_batched_tokens=chunk), devices=devices or ("cpu:0",)
    )


async def test_a_fitting_engine_is_taken_over_as_it_was(world: World) -> None:
    assert await world.server() == ([], [])
    await world.start(spec("a"))
    await world.start(spec("b", "cpu:1", "cpu:2"), ready=False)
    before = world.state("a")
    assert sorted(world.booked()) == ["cpu:0", "cpu:1", "cpu:2"]
    await world.clock.advance(100)
    assert await world.server() == (["a", "b"], [])
    after = world.state("a")
    assert after.phase is ReplicaPhase.READY
    for fact in ("spec", "endpoint", "pid", "since_s", "max_model_len"):
        assert getattr(after, fact) == getattr(before, fact)
    assert world.state("b").phase is ReplicaPhase.LOADING
    world.well.add("b-2")
    await world.until("b", ReplicaPhase.READY)
    # It is watched, and can be stopped, as if this server had started it.
    await world.cluster.apply(DrainReplica(replica="a"))
    await world.cluster.apply(StopReplica(replica="a"))
    await world.until("a", ReplicaPhase.GONE)
    await world.start(spec("c"))
    assert len(world.launcher.processes) == 3
    assert len({process.pid for process in world.launcher.processes}) == 3


async def test_changed_engine_settings_end_engines_and_changed_monitoring_does_not(
    world: World,
) -> None:
    await world.server()
    await world.start(spec("a"))
    assert await world.server(health_interval_s=2.0, orphan_grace_s=5.0) == (["a"], [])
    world.launcher.processes[0].stubborn = True
    assert await world.server(max_model_len=512) == ([], ["a"])
    assert world.state("a").phase is ReplicaPhase.DRAINING
    with pytest.raises(ValueError, match="which a has"):
        await world.cluster.apply(StartReplica(spec=spec("b")))
    await world.settle(15)
    await world.until("a", ReplicaPhase.GONE)
    assert world.launcher.processes[0].signals == ["TERM", "KILL"]
    assert world.booked() == []
    await world.start(spec("b"))


async def test_unknown_engines_are_ended_before_any_engine_starts(world: World) -> None:
    await world.server()
    await world.start(spec("a"))
    for name, note in (("x-7", {"odd": 1}), ("a-8", world.engines.engines()["a-1"].entry.note)):
        await world.engines.launch(name, [], {}, [], world.folder / "log", note)
    assert await world.server() == (["a"], [])
    assert [process.signals for process in world.launcher.processes] == [[], ["TERM"], ["TERM"]]
    assert world.booked() == ["cpu:0"]
    # Names are not used twice, since folders go by them.
    await world.start(spec("b", "cpu:1"))
    assert "b-9" in world.engines.engines()


async def test_an_ending_engine_keeps_its_devices_until_it_is_gone(world: World) -> None:
    await world.server()
    await world.start(spec("a"))
    process = world.launcher.processes[0]
    process.stubborn = True
    await world.cluster.apply(StopReplica(replica="a"))
    await world.settle()
    assert process.signals == ["TERM"]
    assert await world.server() == ([], ["a"])
    with pytest.raises(ValueError, match="which a has"):
        await world.cluster.apply(StartReplica(spec=spec("b")))
    await world.settle(15)
    await world.until("a", ReplicaPhase.GONE)
    assert process.signals == ["TERM", "TERM", "KILL"]


async def test_a_starting_engine_is_taken_over(world: World) -> None:
    await world.server()
    world.launcher.gate.clear()
    await world.cluster.apply(StartReplica(spec=spec("a")))
    await world.settle()
    assert world.booked() == ["cpu:0"]
    assert await world.server() == (["a"], [])
    with pytest.raises(ValueError, match="which a has"):
        await world.cluster.apply(StartReplica(spec=spec("b")))
    world.launcher.gate.set()
    world.well.add("a-1")
    await world.until("a", ReplicaPhase.READY)
    # And one that is stopped before it is there never comes.
    world.launcher.gate.clear()
    await world.cluster.apply(StartReplica(spec=spec("b", "cpu:1")))
    await world.settle()
    await world.cluster.apply(StopReplica(replica="b"))
    await world.until("b", ReplicaPhase.GONE)
    assert world.booked() == ["cpu:0"]
    assert len(world.alive()) == 1


async def test_an_engine_that_exits_between_servers_is_gone(world: World) -> None:
    await world.server()
    await world.start(spec("a"))
    await world.vanish()
    world.launcher.processes[0].end(1)
    await world.settle()
    assert await world.server() == ([], [])
    assert world.booked() == []


async def test_a_failed_launch_is_reported(world: World) -> None:
    await world.server()
    world.launcher.error = OServeError("no", place="engines", remedy="try")
    await world.cluster.apply(StartReplica(spec=spec("a")))
    while world.state("a").phase is not ReplicaPhase.GONE:
        await world.settle()
    assert "engines: no (try)" in (await world.cluster.observe()).failures["a"].reason
    assert world.booked() == []


async def test_without_a_server_the_keeper_ends_everything(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.begun()
    await world.server(orphan_grace_s=0.0)
    await world.start(spec("a"))
    await world.vanish()
    await world.running
    assert not world.alive()
    assert world.launcher.closed == 1
    assert not world.run.exists()


async def test_closing_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.begun()
    await world.server()
    await world.start(spec("a"))
    closing = asyncio.create_task(world.cluster.close())
    while not closing.done():
        await world.settle()
    await world.running
    assert not world.alive()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
async def test_no_device_is_ever_taken_twice(world: World, seed: int) -> None:
    draw = random.Random(seed)
    await world.server()
    for _ in range(60):
        deed = draw.choice(("start", "start", "stop", "crash", "server", "wait"))
        name = draw.choice("abc")
        alive = world.alive()
        if deed == "start":
            device = f"cpu:{draw.randrange(3)}"
            wish = spec(name, device, chunk=draw.choice((256, 512)))
            try:
                await world.cluster.apply(StartReplica(spec=wish))
            except ValueError:
                continue
            world.well.add(Path(world.state(name).endpoint.unix_socket).parent.name)
        elif deed == "stop":
            await world.cluster.apply(StopReplica(replica=name))
        elif deed == "crash" and alive:
            draw.choice(alive).end(1)
        elif deed == "server":
            await world.server()
        await world.settle(draw.choice((0.0, 0.3)))
        booked = world.booked()
        assert len(booked) == len(set(booked))
        seen = [s for s in world.cluster._states.values() if s.phase is not ReplicaPhase.GONE]
        taken = [device for state in seen for device in state.spec.devices]
        assert len(taken) == len(set(taken))
        # Nothing runs that the server does not see.
        assert {process.pid for process in world.alive()} >= {s.pid for s in seen if s.pid}
        assert set(booked) <= set(taken)


async def test_a_computed_cache_size_does_not_end_engines(world: World) -> None:
    """Free memory is never twice the same: engines go on with the cache they have."""
    await world.server(kv_cache_memory_bytes=1 << 20, sized=True)
    await world.start(spec("a"))
    assert await world.server(kv_cache_memory_bytes=2 << 20, sized=True) == (["a"], [])
    assert await world.server(kv_cache_memory_bytes=2 << 20) == ([], ["a"])
