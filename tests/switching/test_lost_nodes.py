"""A node that is lost in any phase of a switch: what is left serves, and nothing stays behind."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from oserve.core import Device
from oserve.startup.switch_facts import recovered_switch
from oserve.switch.preview import between_nodes_line
from oserve.switch.transaction import TransactionPhase
from oserve.switching.weights import MoveError
from switching.test_switches import Scene, plan_of, replica

DEVICES = tuple(
    Device(id=f"{node}/cpu:{n}", kind="cpu", memory_bytes=2 << 30, node=node)
    for node in ("one", "two")
    for n in range(2)
)
OLD = plan_of("old", replica("a", "one/cpu:0"), replica("b", "one/cpu:1"))
NEW = plan_of("new", replica("w", "two/cpu:0", "two/cpu:1", tp=2))
LEFT: dict[str, set[str]] = {"one": set(), "two": {"a", "b"}}


@pytest.fixture
async def scene(tmp_path: Path, model: str) -> Scene:
    scene = Scene(tmp_path / "state", model, first=OLD, devices=DEVICES)
    await scene.start()
    return scene


def hang(scene: Scene, node: str) -> Callable[[], Awaitable[None]]:
    """A node loses power, and whoever waits for it waits for ever."""

    async def lose() -> None:
        scene.cluster.cut_node(node)
        await scene.clock.sleep(1e6)

    return lose


@pytest.mark.parametrize("lost", ["one", "two"])
@pytest.mark.parametrize("where", ["move", "check", "generate"])
async def test_before_the_commit_the_old_plan_stays(scene: Scene, where: str, lost: str) -> None:
    scene.fates[where] = hang(scene, lost)
    report = await scene.finish(NEW)
    assert report.state == "rolled_back"
    assert f"node {lost} is lost" in report.reason
    # Nobody waited for the deadline of the phase.
    assert max(report.durations_s(0).values()) < 20.0
    assert scene.loop.plan.id == "old"
    assert scene.loop.held == frozenset()
    assert await scene.alive() == LEFT[lost]


async def test_a_report_tells_the_bytes_between_nodes(scene: Scene) -> None:
    report = await scene.finish(NEW)
    assert report.state == "done"
    programme = report.document()["programme"]
    [link] = programme["between_nodes"]
    assert (link["source"], link["target"]) == ("one", "two")
    assert link["bytes"] == sum(wave["moved_bytes"] for wave in programme["waves"]) > 0
    assert between_nodes_line(programme) == f"one -> two: {link['bytes']:,} bytes"


@pytest.mark.parametrize("lost", ["one", "two"])
@pytest.mark.parametrize("phase", ["prepare", "commit", "drain"])
async def test_in_every_other_phase(scene: Scene, phase: str, lost: str) -> None:
    report = scene.switcher.want(NEW, "test")
    while not report.phases:  # noqa: ASYNC110
        # Preparing runs in a thread, for which virtual time does not wait.
        await asyncio.sleep(0.002)
    for _ in range(10_000):
        if phase in [entry.phase for entry in report.phases]:
            break
        await scene.clock.advance(0.05)
    scene.cluster.cut_node(lost)
    await scene.over()
    assert scene.loop.held == frozenset()
    # What is lost after the commit is not needed any more if it was the old plan's.
    done = lost == "one" and phase != "prepare"
    assert report.state == ("done" if done else "rolled_back")
    assert scene.loop.plan.id == scene.settled[-1][0] == ("new" if done else "old")
    assert done or f"node {lost} is lost" in report.reason
    assert await scene.alive() == ({"w"} if done else LEFT[lost])
    if not done and lost == "two":
        # The old replicas never left: they serve again without a start.
        assert [life.spec.id for life in scene.cluster.lives if life.spec.id != "w"] == ["a", "b"]
    assert recovered_switch(scene.settings, 0.0) is None


@pytest.mark.parametrize("lost", ["one", "two"])
async def test_while_it_is_undone(scene: Scene, lost: str) -> None:
    async def fail() -> None:
        raise MoveError("the bytes do not come")

    scene.fates["move"] = fail
    report = scene.switcher.want(NEW, "test")
    while not report.phases:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    for _ in range(10_000):
        if "abort" in [entry.phase for entry in report.phases]:
            break
        await scene.clock.advance(0.05)
    scene.cluster.cut_node(lost)
    await scene.over()
    assert report.state == "rolled_back"
    assert "the bytes do not come" in report.reason
    assert scene.loop.plan.id == "old"
    assert scene.loop.held == frozenset()
    assert await scene.alive() == LEFT[lost]
    assert recovered_switch(scene.settings, 0.0) is None


def test_no_phase_is_left_out() -> None:
    """Transfer is lost in ``move``, verify in ``check`` and ``generate``."""
    tried = {"prepare", "transfer", "verify", "commit", "drain", "abort"}
    assert {phase.value for phase in TransactionPhase if not phase.ended} == tried
