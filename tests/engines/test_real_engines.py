"""Real vLLM engines on CPU: they start, answer, die and leave nothing behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from oserve.core import (
    Clock,
    Observation,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
    VllmBackend,
)
from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import split_cores
from oserve.engines.group import group_members
from oserve.engines.probe import Probe
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LIMIT_S = 300.0
MiB = 1024 * 1024


def replica(
    name: str, *devices: str, tp: int = 1, pp: int = 1, precision: Precision = Precision.BF16
) -> ReplicaSpec:
    shape = ReplicaShape(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=precision,
        kv_cache_memory_bytes=32 * MiB,
    )
    return ReplicaSpec(id=name, shape=shape, devices=devices)


def make_cluster(
    model: Path,
    run_dir: Path,
    clock: Clock,
    settings: EngineSettings | None = None,
    launcher: Launcher | None = None,
) -> EngineCluster:
    devices = split_cores(sorted(os.sched_getaffinity(0)), 4)
    return EngineCluster(
        devices,
        model=str(model),
        served_model_name="tiny",
        run_dir=run_dir,
        clock=clock,
        settings=settings or EngineSettings(),
        launcher=launcher,
    )


async def until(cluster: EngineCluster, true: Callable[[Observation], bool]) -> Observation:
    async with asyncio.timeout(LIMIT_S):
        while not true(observation := await cluster.observe()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return observation


def in_phase(phase: ReplicaPhase, *names: str) -> Callable[[Observation], bool]:
    def true(observation: Observation) -> bool:
        phases = {state.spec.id: state.phase for state in observation.replicas}
        bad = [name for name in names if phases.get(name) is ReplicaPhase.GONE]
        assert phase is ReplicaPhase.GONE or not bad, observation.failures
        return all(phases.get(name) is phase for name in names)

    return true


def texts_of(folder: Path, pattern: str) -> list[str]:
    return [path.read_text(errors="replace") for path in folder.rglob(pattern)]


def left_memory() -> set[str]:
    """Shared memory of engines that no process has mapped."""
    names = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "vllm_dist_"))}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            maps = Path(f"/proc/{entry}/maps").read_text(errors="replace")
        except OSError:
            continue
        names = {name for name in names if name not in maps}
    return names


async def until_true(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110 - it looks at other processes
            await asyncio.sleep(0.05)


def parents() -> dict[int, int]:
    """Process ids to their parents'."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return found


def child_count() -> int:
    """Processes below this one, however deep."""
    known = parents()
    found = {os.getpid()}
    while more := {pid for pid, parent in known.items() if parent in found} - found:
        found |= more
    return len(found) - 1


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(
    tiny_model: Path, tmp_path: Path, live_clock: Clock, zygote: Launcher
) -> AsyncIterator[EngineCluster]:
    int8 = make_int8_variant(tiny_model, tiny_model.parent / "tiny-int8")
    settings = EngineSettings(variants={"int8": str(int8)})
    before, memory = child_count(), left_memory()
    cluster = make_cluster(tiny_model, tmp_path, live_clock, settings, zygote)
    yield cluster
    await cluster.close()
    assert child_count() == before
    await until_true(lambda: left_memory() <= memory)


async def test_shapes_start_answer_and_die(
    cluster: EngineCluster, zygote_log: Path, tmp_path: Path
) -> None:
    specs = (
        replica("single", "cpu:0"),
        replica("tensor", "cpu:0", "cpu:1", tp=2),
        replica("pipeline", "cpu:2", "cpu:3", pp=2),
        replica("small", "cpu:0", precision=Precision.INT8),
    )
    for spec in specs:
        await cluster.apply(StartReplica(spec=spec))
        ready = await until(cluster, in_phase(ReplicaPhase.READY, spec.id))
        state = ready.replica(spec.id)
        assert state is not None
        assert state.max_model_len == 8192
        async with Probe(state.endpoint, timeout_s=30) as probe:
            assert await probe.complete("tiny", "Hello", 8, 30)
            assert await probe.load() is not None
        os.kill(state.pid, signal.SIGKILL)
        gone = await until(cluster, in_phase(ReplicaPhase.GONE, spec.id))
        assert gone.failures[spec.id].count == 1
        assert "SIGKILL" in gone.failures[spec.id].reason
        assert group_members(state.pid) == []
        assert not Path(state.endpoint.unix_socket).parent.exists()
    logs = texts_of(tmp_path, "*.log")
    assert len(logs) == len(specs)
    logs += texts_of(zygote_log.parent, zygote_log.name)
    assert not any("is left out" in text for text in logs), "patches do not fit this vLLM"


async def test_two_at_once_one_is_stopped_one_cannot_start(cluster: EngineCluster) -> None:
    for spec in (replica("a", "cpu:0"), replica("b", "cpu:1")):
        await cluster.apply(StartReplica(spec=spec))
    ready = await until(cluster, in_phase(ReplicaPhase.READY, "a", "b"))
    await cluster.apply(StopReplica(replica="a"))
    states = await until(
        cluster, lambda observation: observation.replicas[0].phase is ReplicaPhase.GONE
    )
    assert states.failures == {}
    assert group_members(ready.replicas[0].pid) == []
    assert states.replica("b") is not None
    spec = ReplicaSpec(
        id="bad",
        shape=ReplicaShape(),
        devices=("cpu:0",),
        backend=VllmBackend(engine_args=("--max-model-len", "999999")),
    )
    await cluster.apply(StartReplica(spec=spec))
    gone = await until(cluster, in_phase(ReplicaPhase.GONE, "bad"))
    assert "max_model_len" in gone.failures["bad"].reason


@pytest_asyncio.fixture(loop_scope="session")
async def own_zygote(
    tiny_model: Path, tmp_path: Path, live_clock: Clock
) -> AsyncIterator[EngineCluster]:
    """A cluster with a zygote of its own, which ends with it."""
    before, memory = child_count(), left_memory()
    cluster = make_cluster(tiny_model, tmp_path, live_clock)
    yield cluster
    await cluster.close()
    assert child_count() == before
    await until_true(lambda: left_memory() <= memory)


async def test_a_killed_zygote_is_replaced(own_zygote: EngineCluster) -> None:
    cluster = own_zygote
    await cluster.apply(StartReplica(spec=replica("a", "cpu:0")))
    ready = await until(cluster, in_phase(ReplicaPhase.READY, "a"))
    group = ready.replicas[0].pid
    os.kill(parents()[group], signal.SIGKILL)
    await until(cluster, in_phase(ReplicaPhase.GONE, "a"))
    assert group_members(group) == []
    await cluster.apply(StartReplica(spec=replica("a", "cpu:0")))
    await until(cluster, in_phase(ReplicaPhase.READY, "a"))


async def test_spawned_engine_answers_and_ends(
    tiny_model: Path, tmp_path: Path, live_clock: Clock
) -> None:
    before, memory = child_count(), left_memory()
    cluster = make_cluster(tiny_model, tmp_path, live_clock, EngineSettings(start_method="spawn"))
    try:
        await cluster.apply(StartReplica(spec=replica("slow", "cpu:0")))
        ready = await until(cluster, in_phase(ReplicaPhase.READY, "slow"))
    finally:
        await cluster.close()
    assert group_members(ready.replicas[0].pid) == []
    assert child_count() == before
    await until_true(lambda: left_memory() <= memory)


ORPHAN = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = {path!r}
from engines.conftest import LiveClock
from engines.test_real_engines import *

async def main():
    cluster = make_cluster(Path({model!r}), Path({run_dir!r}), LiveClock())
    await cluster.apply(StartReplica(spec=replica("left", "cpu:0")))
    ready = await until(cluster, in_phase(ReplicaPhase.READY, "left"))
    print(ready.replicas[0].pid, ready.replicas[0].endpoint.unix_socket, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_nothing_outlives_a_killed_parent(tiny_model: Path, tmp_path: Path) -> None:
    memory = left_memory()
    code = ORPHAN.format(path=sys.path, model=str(tiny_model), run_dir=str(tmp_path))
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        pid, socket = (await parent.stdout.readline()).decode().split()
        group, socket_folder = int(pid), Path(socket).parent.parent
        parent.kill()
        await parent.wait()
        await until_true(lambda: not group_members(group))
        await until_true(lambda: left_memory() <= memory)
        await until_true(lambda: not socket_folder.exists())
