"""The live cluster with fake processes and a virtual clock."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from oserve.control.progress import Activity
from oserve.core import (
    AttachedBackend,
    DrainReplica,
    Endpoint,
    OServeError,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartReplica,
    StopReplica,
    VirtualClock,
)
from oserve.engines import replica_states
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import split_cores
from oserve.engines.probe import EngineLoad, ProbeReply, ServedModel
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess


class FakeProcess:
    def __init__(self, pid: int, *, stubborn: bool = False) -> None:
        self.pid = pid
        self.stubborn = stubborn
        self.signals: list[str] = []
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    def terminate(self) -> None:
        self.signals.append("TERM")
        if not self.stubborn:
            self.end(0)

    def kill(self) -> None:
        self.signals.append("KILL")
        self.end(-signal.SIGKILL)

    def end(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)


class FakeLauncher:
    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.asked: list[tuple[list[str], dict[str, str], tuple[int, ...]]] = []
        self.error: OServeError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.closed = 0
        self.prepared = 0

    async def prepare(self) -> None:
        self.prepared += 1
        await self.gate.wait()

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        self.asked.append((list(argv), dict(env), tuple(cores)))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.processes.append(FakeProcess(100 + len(self.processes)))
        return self.processes[-1]

    async def close(self) -> None:
        self.closed += 1


class FakeProbe:
    """``core`` and ``api``: what answers, if it is set; ``advances``: so do running requests."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.well = False
        self.core = asyncio.Event()
        self.api = asyncio.Event()
        self.core.set()
        self.api.set()
        self.advances = True
        self.computed = 0
        self.completes = True
        self.completed = 0
        self.closed = False
        self.cards = b'{"data": [{"id": "tiny", "max_model_len": 77}]}'

    async def healthy(self) -> bool:
        return self.well

    async def models(self) -> tuple[ServedModel, ...] | None:
        return (ServedModel(name="tiny", max_model_len=77),) if self.well else None

    async def load(self) -> EngineLoad | None:
        await self.api.wait()
        self.computed += self.advances and self.core.is_set()
        load = EngineLoad(running=2, waiting=1, kv_cache_usage=0.5, tokens=self.computed)
        return load if self.well else None

    async def alive(self) -> bool | None:
        await self.api.wait()
        await self.core.wait()
        return self.well

    async def complete(
        self, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float
    ) -> bool:
        self.completed += 1
        return self.completes

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> ProbeReply:
        return (
            ProbeReply(status=200, body=self.cards)
            if self.well
            else ProbeReply(status=0, why="gone")
        )

    async def close(self) -> None:
        self.closed = True


class Stage:
    """A cluster and its fakes."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        self.clock = VirtualClock()
        self.launcher = FakeLauncher()
        self.probes: list[FakeProbe] = []
        self.changes: list[tuple[str, ReplicaPhase]] = []
        self.activity: Activity | None = Activity()
        self.looked: list[int] = []
        self.run_dir = run_dir
        self.cluster = EngineCluster(
            split_cores(range(4), 4),
            model="some/model",
            served_model_name="tiny",
            run_dir=run_dir,
            clock=self.clock,
            settings=EngineSettings(**settings),
            launcher=self.launcher,
            probe=self._probe,
            look=self._look,
            api_keys={"KEY": "secret"},
            on_change=lambda state: self.changes.append((state.spec.id, state.phase)),
        )

    def _probe(self, endpoint: Endpoint) -> FakeProbe:
        self.probes.append(FakeProbe(endpoint))
        return self.probes[-1]

    def _look(self, pid: int, log: Path) -> Activity | None:
        self.looked.append(pid)
        return self.activity

    async def start(self, spec: ReplicaSpec, *, ready: bool = True) -> None:
        await self.cluster.apply(StartReplica(spec=spec))
        await self.clock.advance(0)
        if ready:
            self.probes[-1].well = True
            await self.clock.advance(0.2)
            assert (await self.state(spec.id)).phase is ReplicaPhase.READY

    async def state(self, name: str) -> ReplicaState:
        observation = await self.cluster.observe()
        return next(state for state in observation.replicas if state.spec.id == name)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    await stage.cluster.close()
    assert all(process.ended.done() for process in stage.launcher.processes)
    assert all(probe.closed for probe in stage.probes)
    assert stage.launcher.closed == 1


def spec(name: str = "r", *devices: str, **shape: Any) -> ReplicaSpec:
    return ReplicaSpec(id=name, shape=ReplicaShape(**shape), devices=devices or ("cpu:0",))


async def test_start_ready_drain_stop(stage: Stage) -> None:
    await stage.start(spec("r", "cpu:0", "cpu:2", tensor_parallel_size=2), ready=False)
    assert (await stage.state("r")).phase is ReplicaPhase.LOADING
    stage.probes[0].well = True
    await stage.clock.advance(0.2)
    state = await stage.state("r")
    assert (state.phase, state.pid, state.max_model_len) == (ReplicaPhase.READY, 100, 77)
    assert stage.probes[0].completed == 1
    assert stage.launcher.asked[0][2] == (0, 2)
    await stage.clock.advance(1.5)
    state = await stage.state("r")
    assert (state.running, state.waiting, state.kv_cache_usage) == (2, 1, 0.5)
    await stage.cluster.apply(DrainReplica(replica="r"))
    assert (await stage.state("r")).phase is ReplicaPhase.DRAINING
    await stage.clock.advance(5)
    assert (await stage.state("r")).phase is ReplicaPhase.DRAINING
    await stage.cluster.apply(StopReplica(replica="r"))
    await stage.clock.advance(0)
    observation = await stage.cluster.observe()
    assert observation.replicas[0].phase is ReplicaPhase.GONE
    assert observation.failures == {}
    assert [phase for _, phase in stage.changes] == [
        ReplicaPhase.LOADING,
        ReplicaPhase.READY,
        ReplicaPhase.DRAINING,
        ReplicaPhase.GONE,
    ]
    assert stage.launcher.processes[0].signals == ["TERM"]


async def test_asking_twice_is_harmless(stage: Stage) -> None:
    await stage.start(spec())
    for _ in range(2):
        await stage.cluster.apply(StartReplica(spec=spec()))
        await stage.cluster.apply(StopReplica(replica="other"))
        await stage.cluster.apply(DrainReplica(replica="other"))
    await stage.clock.advance(1)
    assert len(stage.launcher.processes) == 1
    for _ in range(2):
        await stage.cluster.apply(DrainReplica(replica="r"))
        await stage.cluster.apply(StopReplica(replica="r"))
        await stage.clock.advance(0)
    assert (await stage.state("r")).phase is ReplicaPhase.GONE


async def test_no_device_is_given_twice(stage: Stage) -> None:
    await stage.start(spec("a", "cpu:0"))
    with pytest.raises(ValueError, match="which a has"):
        await stage.cluster.apply(StartReplica(spec=spec("b", "cpu:1", "cpu:0")))
    with pytest.raises(ValueError, match="unknown"):
        await stage.cluster.apply(StartReplica(spec=spec("b", "cpu:9")))
    assert len((await stage.cluster.observe()).replicas) == 1


async def test_devices_stay_taken_until_the_processes_are_gone(stage: Stage) -> None:
    await stage.start(spec("a"))
    process = stage.launcher.processes[0]
    process.stubborn = True
    await stage.cluster.apply(StopReplica(replica="a"))
    await stage.clock.advance(9)
    assert (await stage.state("a")).phase is ReplicaPhase.DRAINING
    with pytest.raises(ValueError, match="which a has"):
        await stage.cluster.apply(StartReplica(spec=spec("b")))
    await stage.clock.advance(2)
    assert process.signals == ["TERM", "KILL"]
    assert (await stage.state("a")).phase is ReplicaPhase.GONE
    await stage.start(spec("b"))


async def test_unexpected_exits_are_counted(stage: Stage) -> None:
    for count in (1, 2):
        await stage.start(spec())
        log = stage.run_dir / "logs" / "r.log"
        log.write_text("ValueError: out of luck\n")
        stage.launcher.processes[-1].end(1)
        await stage.clock.advance(0)
        failures = (await stage.cluster.observe()).failures["r"]
        assert (failures.count, failures.spec) == (count, spec())
        assert failures.reason == "ended with status 1: ValueError: out of luck"
        assert (await stage.state("r")).detail == failures.reason
    assert len((await stage.cluster.observe()).replicas) == 1


async def test_an_exit_is_reported_with_the_replica_whatever_its_id_and_reason(
    stage: Stage,
) -> None:
    ids = ("a", "start a: b", "gateway:0", "a:")
    for number, name in enumerate(ids):
        await stage.start(spec(name, f"cpu:{number}"))
        log = stage.run_dir / "logs" / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        log.write_text(f"ValueError: start {ids[0]}: no: {name}\n")
        stage.launcher.processes[-1].end(1)
        await stage.clock.advance(0)
    failures = (await stage.cluster.observe()).failures
    assert list(failures) == list(ids)
    for number, name in enumerate(ids):
        assert failures[name].spec == spec(name, f"cpu:{number}")
        assert failures[name].reason == f"ended with status 1: ValueError: start a: no: {name}"


async def test_a_killed_engine_is_not_blamed_on_its_log(stage: Stage) -> None:
    await stage.start(spec())
    (stage.run_dir / "logs" / "r.log").write_text("ValueError: out of luck\n")
    stage.launcher.processes[-1].end(-signal.SIGKILL)
    await stage.clock.advance(0)
    assert (await stage.cluster.observe()).failures["r"].reason == "ended by SIGKILL"


async def test_stable_service_clears_the_failures(stage: Stage) -> None:
    await stage.start(spec())
    stage.launcher.processes[-1].end(1)
    await stage.clock.advance(0)
    await stage.start(spec())
    await stage.clock.advance(50)
    assert (await stage.cluster.observe()).failures
    await stage.clock.advance(15)
    assert not (await stage.cluster.observe()).failures


async def test_a_changed_spec_clears_the_failures(stage: Stage) -> None:
    await stage.start(spec())
    stage.launcher.processes[-1].end(1)
    await stage.clock.advance(0)
    await stage.cluster.apply(StartReplica(spec=spec("r", "cpu:1")))
    assert not (await stage.cluster.observe()).failures


async def test_an_engine_that_never_comes_up_is_ended(stage: Stage) -> None:
    stage.activity = None
    await stage.start(spec(), ready=False)
    await stage.clock.advance(301)
    observation = await stage.cluster.observe()
    assert observation.replicas[0].phase is ReplicaPhase.GONE
    assert "not ready after 300 s" in observation.failures["r"].reason
    assert stage.launcher.processes[0].ended.done()


async def test_an_engine_that_fails_its_first_request_is_ended(stage: Stage) -> None:
    await stage.start(spec(), ready=False)
    stage.probes[0].completes = False
    stage.probes[0].well = True
    await stage.clock.advance(1)
    assert "first request" in (await stage.cluster.observe()).failures["r"].reason


async def test_stop_while_the_launcher_is_busy(stage: Stage) -> None:
    stage.launcher.gate.clear()
    await stage.start(spec(), ready=False)
    await stage.cluster.apply(StopReplica(replica="r"))
    await stage.clock.advance(0)
    assert (await stage.state("r")).phase is ReplicaPhase.GONE
    assert stage.launcher.processes == []


async def test_a_failed_launch_is_a_failed_start(stage: Stage) -> None:
    stage.launcher.error = OServeError("no", place="engines", remedy="try")
    await stage.start(spec(), ready=False)
    assert (await stage.cluster.observe()).failures["r"].reason == "engines: no (try)"


async def test_an_impossible_spec_is_a_failed_start(stage: Stage) -> None:
    await stage.start(spec("r", "cpu:0", precision=Precision.INT4), ready=False)
    reason = (await stage.cluster.observe()).failures["r"].reason
    assert reason.startswith("engines.variants.int4: ")
    assert stage.launcher.asked == []


async def test_attached_servers_come_and_go(stage: Stage) -> None:
    backend = AttachedBackend(url="http://h:1/v1", api_key_env="KEY")
    attached = ReplicaSpec(id="x", shape=ReplicaShape(), devices=(), backend=backend)
    await stage.start(attached, ready=False)
    probe = stage.probes[0]
    assert probe.endpoint == Endpoint(url="http://h:1/v1", api_key="secret")
    await stage.clock.advance(1000)
    assert (await stage.state("x")).phase is ReplicaPhase.LOADING
    assert (await stage.state("x")).detail.startswith("gone; start it")
    probe.well = True
    await stage.clock.advance(1)
    assert (await stage.state("x")).phase is ReplicaPhase.READY
    assert (await stage.state("x")).detail == ""
    assert (await stage.state("x")).max_model_len == 77
    probe.well = False
    await stage.clock.advance(1.5)
    assert (await stage.state("x")).phase is ReplicaPhase.READY
    await stage.clock.advance(3)
    assert (await stage.state("x")).phase is ReplicaPhase.LOADING
    probe.well = True
    await stage.clock.advance(1)
    await stage.cluster.apply(DrainReplica(replica="x"))
    await stage.clock.advance(2)
    assert (await stage.state("x")).phase is ReplicaPhase.DRAINING
    await stage.cluster.apply(StopReplica(replica="x"))
    await stage.clock.advance(0)
    observation = await stage.cluster.observe()
    assert observation.replicas[0].phase is ReplicaPhase.GONE
    assert not observation.failures
    assert stage.launcher.asked == []


async def test_what_is_remembered_is_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_states, "_MAX_REMEMBERED", 3)
    for number in range(6):
        await stage.start(spec(f"r{number}"))
        stage.launcher.processes[-1].end(1)
        await stage.clock.advance(0)
    observation = await stage.cluster.observe()
    assert [state.spec.id for state in observation.replicas] == ["r2", "r3", "r4", "r5"]
    assert set(observation.failures) == {"r2", "r3", "r4", "r5"}


async def test_close_ends_all_and_nothing_starts_after(tmp_path: Path) -> None:
    stage = Stage(tmp_path / ("long" * 30))
    await stage.start(spec("a", "cpu:0"))
    await stage.start(spec("b", "cpu:1"), ready=False)
    folder = Path(stage.probes[0].endpoint.unix_socket).parent
    assert folder.stat().st_mode & 0o077 == 0
    assert len(stage.probes[0].endpoint.unix_socket) < 100
    await stage.cluster.close()
    await stage.cluster.apply(StartReplica(spec=spec("c", "cpu:2")))
    phases = {state.phase for state in (await stage.cluster.observe()).replicas}
    assert phases == {ReplicaPhase.GONE}
    assert not folder.parent.exists()
    assert all(process.ended.done() for process in stage.launcher.processes)
