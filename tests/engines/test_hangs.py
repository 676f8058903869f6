"""Engines that hang, with made-up processes and a clock that is told the time."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engines.test_cluster import Stage, spec
from oserve.control.progress import Activity
from oserve.core import CommitReplicas, ReplicaPhase, StartReplica, StopReplica

STOPPED = Activity(stopped=1)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    await stage.cluster.close()
    assert all(process.ended.done() for process in stage.launcher.processes)
    assert all(probe.closed for probe in stage.probes)


async def phase_after(stage: Stage, seconds: float) -> ReplicaPhase:
    await stage.clock.advance(seconds)
    return (await stage.state("r")).phase


async def serving(stage: Stage) -> None:
    """A replica that has served for a while; its processes can not be told apart from idle ones."""
    await stage.start(spec())
    assert await phase_after(stage, 100) is ReplicaPhase.READY


@pytest.mark.parametrize("of", ["core", "api"])
async def test_one_that_hangs_leaves_first_and_is_killed(stage: Stage, of: str) -> None:
    await serving(stage)
    stage.activity = STOPPED
    getattr(stage.probes[0], of).clear()
    # Counting begins with the first look that brings no answer.
    assert await phase_after(stage, 9) is ReplicaPhase.READY
    changes = len(stage.changes)
    while await phase_after(stage, 0.1) is ReplicaPhase.READY:
        continue
    assert stage.launcher.processes[0].signals == []
    state = await stage.state("r")
    assert (state.phase, state.pid) == (ReplicaPhase.HUNG, 100)
    assert "stopped" in state.detail
    assert await phase_after(stage, 0.5) is ReplicaPhase.GONE
    # It would not hear that it should end.
    assert stage.launcher.processes[0].signals == ["KILL"]
    assert [phase for _, phase in stage.changes[changes:]] == [
        ReplicaPhase.HUNG,
        ReplicaPhase.GONE,
    ]
    failures = (await stage.cluster.observe()).failures["r"]
    assert failures.count == 1
    assert failures.reason.startswith("hangs: ")
    # It starts again when it is asked to, as any that has ended.
    await stage.start(spec())
    assert stage.launcher.processes[1].signals == []


async def test_going_on_before_the_limit_changes_nothing(stage: Stage) -> None:
    await serving(stage)
    changes = list(stage.changes)
    for _ in range(20):
        stage.activity = STOPPED
        stage.probes[0].core.clear()
        assert await phase_after(stage, 8.5) is ReplicaPhase.READY
        stage.probes[0].core.set()
        stage.activity = Activity()
        assert await phase_after(stage, 3) is ReplicaPhase.READY
    assert stage.changes == changes
    assert not (await stage.cluster.observe()).failures
    # A step that a signal has lengthened does not count.
    assert (await stage.state("r")).patience_s == 10.0


async def test_one_whose_processes_compute_is_given_longer(stage: Stage) -> None:
    await serving(stage)
    stage.probes[0].core.clear()
    for second in range(25):
        stage.activity = Activity(work_s=0.9 * second)
        assert await phase_after(stage, 1) is ReplicaPhase.READY
    # A loop that never ends computes as well.
    for second in range(25, 40):
        stage.activity = Activity(work_s=0.9 * second)
        await stage.clock.advance(1)
    assert "though it computes" in (await stage.cluster.observe()).failures["r"].reason


async def test_requests_that_stand_though_the_core_answers(stage: Stage) -> None:
    await serving(stage)
    stage.probes[0].advances = False
    assert await phase_after(stage, 50) is ReplicaPhase.READY
    await stage.clock.advance(20)
    assert "2 running requests stalled" in (await stage.cluster.observe()).failures["r"].reason


@pytest.mark.parametrize("standby", [False, True])
async def test_one_that_is_stopped_while_it_loads(stage: Stage, *, standby: bool) -> None:
    stage.activity = STOPPED
    await stage.cluster.apply(StartReplica(spec=spec(), standby=standby))
    assert await phase_after(stage, 8) is ReplicaPhase.LOADING
    assert await phase_after(stage, 5) is ReplicaPhase.GONE
    assert stage.launcher.processes[0].signals == ["KILL"]


async def test_one_that_loads_for_long_but_does_something(stage: Stage) -> None:
    await stage.start(spec(), ready=False)
    for second in range(200):
        # Reads now and then, as from a slow disk, or computes.
        moved, work_s = (second // 40, 0.0) if second < 120 else (2, 0.1 * second)
        stage.activity = Activity(moved=moved, work_s=work_s)
        assert await phase_after(stage, 1) is ReplicaPhase.LOADING
    await stage.clock.advance(70)
    assert "hangs" in (await stage.cluster.observe()).failures["r"].reason


async def test_taking_up_weights_is_no_hang(stage: Stage) -> None:
    await stage.cluster.apply(StartReplica(spec=spec(), standby=True))
    stage.probes[0].well = True
    assert await phase_after(stage, 1) is ReplicaPhase.STANDBY
    stage.probes[0].core.clear()
    for second in range(100):
        stage.activity = Activity(work_s=0.5 * second)
        assert await phase_after(stage, 1) is ReplicaPhase.STANDBY
    stage.probes[0].core.set()
    await stage.clock.advance(1)
    await stage.cluster.apply(CommitReplicas(ready=("r",), drain=()))
    # From now on it is judged as any that serves.
    stage.probes[0].core.clear()
    for second in range(100, 140):
        stage.activity = Activity(work_s=0.5 * second)
        await stage.clock.advance(1)
    assert (await stage.state("r")).phase is ReplicaPhase.GONE


async def test_one_that_hangs_while_it_drains_is_ended_too(stage: Stage) -> None:
    await serving(stage)
    stage.activity = STOPPED
    stage.probes[0].core.clear()
    await stage.clock.advance(2)
    await stage.cluster.apply(StopReplica(replica="r"))
    await stage.clock.advance(0)
    assert await phase_after(stage, 0) is ReplicaPhase.GONE
    assert not (await stage.cluster.observe()).failures


async def test_a_slow_warm_up_makes_it_patient(stage: Stage) -> None:
    """A whole chunk of 8 s: the next may take some times as long, though nothing can be seen."""
    await stage.start(spec("r", max_num_batched_tokens=64), ready=False)
    probe = stage.probes[0]
    probe.core.clear()
    complete = probe.complete

    async def slow(*arguments: object) -> bool:
        await stage.clock.sleep(8)
        return await complete(*arguments)  # type: ignore[arg-type]

    probe.complete = slow  # type: ignore[assignment,method-assign]
    probe.well = True
    await stage.clock.advance(8.5)
    assert (await stage.state("r")).phase is ReplicaPhase.READY
    await stage.clock.advance(2)
    assert (await stage.state("r")).patience_s == pytest.approx(32)
    assert await phase_after(stage, 28) is ReplicaPhase.READY
    assert await phase_after(stage, 6) is ReplicaPhase.GONE


async def test_what_cannot_be_asked_is_judged_by_its_counts(stage: Stage) -> None:
    await stage.start(spec())
    probe = stage.probes[0]

    async def unknown() -> None:
        return None

    probe.alive = unknown  # type: ignore[method-assign]
    assert await phase_after(stage, 100) is ReplicaPhase.READY
    probe.advances = False
    assert await phase_after(stage, 13) is ReplicaPhase.GONE
