"""Switches end whole, in the old plan or the new one, whatever fails; on simulated engines."""

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from oserve.config import plan_yaml
from oserve.config.settings import Settings
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.routing import routing_table
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    LengthClass,
    PlannedType,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    VirtualClock,
    VllmBackend,
)
from oserve.engines.settings import EngineSettings
from oserve.sim import SimulatedCluster
from oserve.sim.phases import Phases
from oserve.startup.switch_facts import recovered_switch, switch_facts
from oserve.switch.interim import between, renamed
from oserve.switch.journal import JournalLine
from oserve.switch.layout import shard_map
from oserve.switch.rank_order import RankOrder
from oserve.switch.transaction import TransactionPhase
from oserve.switching.engine_weights import EngineWeightFacts, EngineWeights
from oserve.switching.journal import FileJournal, Journal, journals
from oserve.switching.prices import SwitchPrices
from oserve.switching.report import SwitchReport
from oserve.switching.switcher import Switcher, SwitcherFacts
from oserve.switching.weights import Moved, MoveError

DEVICES = tuple(Device(id=f"cpu:{n}", kind="cpu", memory_bytes=2 << 30) for n in range(4))
PLENTY = 1 << 40


def replica(name: str, *devices: str, tp: int = 1, chunk: int = 256, **shape: Any) -> ReplicaSpec:
    made = ReplicaShape(
        tensor_parallel_size=tp,
        precision=shape.pop("precision", Precision.FP32),
        max_num_batched_tokens=chunk,
        **shape,
    )
    return ReplicaSpec(id=name, shape=made, devices=devices)


def plan_of(name: str, *replicas: ReplicaSpec) -> DeploymentPlan:
    shares = {spec.id: 1.0 / len(replicas) for spec in replicas}
    return DeploymentPlan(
        id=name,
        replicas=replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": shares},
        planned_types=(PlannedType(name="t", prompt_tokens=9, output_tokens=9, shares=shares),),
    )


OLD = plan_of("old", replica("a", "cpu:0"), replica("b", "cpu:1"), replica("k", "cpu:2"))
NEW = plan_of("new", replica("w", "cpu:0", "cpu:1", tp=2), replica("k", "cpu:2"))


class ToyMover:
    """Does as it is told; ``fates`` are looked up by what it is asked for."""

    def __init__(self, scene: "Scene") -> None:
        self._scene = scene

    async def layouts(self, replica: str) -> list[dict[str, tuple[int, ...]]]:
        programme = self._scene.switcher.programme
        assert programme is not None
        layout = programme.placed[replica].layout
        maps = [shard_map(programme.architecture, layout, rank) for rank in range(layout.ranks)]
        found = [{name: local.shape for name, local in one.items()} for one in maps]
        if "layout" in self._scene.fates:
            found[0]["model.norm.weight"] = (1,)
        return found

    async def move(
        self,
        name: str,
        orders: Sequence[RankOrder],
        *,
        limit_s: float,
        progress: Callable[[int], None],
    ) -> Moved:
        self._scene.asked.append("move")
        await self._scene.clock.sleep(1.0)
        progress(1000)
        if fate := self._scene.fates.get("move"):
            await fate()
        return Moved(size_bytes=1000, seconds=1.0, take_up_s=0.0)

    async def check(self, name: str, orders: Sequence[RankOrder], *, limit_s: float) -> int:
        if fate := self._scene.fates.get("check"):
            await fate()
        return 1

    async def generate(self, replica: str, model: str, *, limit_s: float) -> None:
        if fate := self._scene.fates.get("generate"):
            await fate()

    async def surprise(self, replica: str, model: str, *, limit_s: float) -> float:
        self._scene.asked.append(f"surprise {replica}")
        return self._scene.surprises.get(replica, 2.0)

    async def close(self) -> None:
        pass


class FullDisk:
    """A journal on a disk that is full after some records."""

    def __init__(self, path: Path, room: int) -> None:
        self._inner = FileJournal(path)
        self._room = room

    def write(self, line: JournalLine) -> None:
        if self._room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= 1
        self._inner.write(line)

    def close(self) -> None:
        self._inner.close()


class Scene:
    """A simulated cluster at a plan, its loop, and a switcher."""

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        first: DeploymentPlan = OLD,
        devices: Sequence[Device] = DEVICES,
        **settings: Any,
    ) -> None:
        self.first = first
        devices = tuple(devices)
        self.clock = VirtualClock()
        self.cluster = SimulatedCluster(devices, self.clock, phases=Phases())
        self.loop = ControlLoop(self.cluster, self.clock, first, policy=ReconcilePolicy())
        self.settings = Settings(
            model=model,
            state_dir=str(folder),
            engines=EngineSettings(**settings),
        )
        self.fates: dict[str, Callable[[], Any]] = {}
        self.asked: list[str] = []
        self.surprises: dict[str, float] = {}
        self.settled: list[tuple[str, str]] = []
        self.tables: list[frozenset[str]] = []
        self.room = -1
        self.available = PLENTY
        self.movable = switch_facts(self.settings, devices, available_bytes=lambda: self.available)
        self.switcher = Switcher(
            SwitcherFacts(
                folder=self.folder,
                movable=self.movable,
                cluster=self.cluster,
                loop=self.loop,
                clock=self.clock,
                settle=lambda outcome: self.settled.append((outcome.plan.id, outcome.reason)),
                publish=self.round,
                journal=self._journal,
                weights=partial(
                    EngineWeights,
                    EngineWeightFacts(
                        cluster=self.cluster,
                        model="tiny",
                        mover=lambda _places, /, *, node_of: ToyMover(self),
                        transfer_limit_s=self.settings.switch.transfer_limit_s,
                        max_perplexity_rise=self.settings.switch.max_perplexity_rise,
                    ),
                ),
                unix_s=self.clock.now,
                plan_text=plan_yaml,
                transfer_limit_s=self.settings.switch.transfer_limit_s,
            )
        )

    def _journal(self, path: Path) -> Journal:
        return FullDisk(path, self.room)

    @property
    def folder(self) -> Path:
        return Path(self.settings.state_dir) / "switches"

    async def round(self) -> None:
        await self.loop.step()
        await self.look()

    async def look(self) -> None:
        """What the gateway would be told now."""
        observation = await self.cluster.observe()
        table = routing_table(self.loop.plan, observation, ordered=True, expected=True)
        self.tables.append(frozenset(r.id for r in table.replicas if r.phase is ReplicaPhase.READY))

    async def spend(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.25)):
            await self.round()
            await self.clock.advance(0.25)

    async def start(self) -> None:
        await self.spend(60)
        self.tables.clear()
        assert await self.alive() == {spec.id for spec in self.first.replicas}

    async def alive(self) -> set[str]:
        return {
            s.spec.id
            for s in (await self.cluster.observe()).replicas
            if s.phase is not ReplicaPhase.GONE
        }

    async def finish(self, plan: DeploymentPlan = NEW, seconds: float = 400.0) -> SwitchReport:
        report = self.switcher.want(plan, "test")
        await self.over(seconds)
        return report

    async def over(self, seconds: float = 400.0) -> None:
        for _ in range(int(seconds)):
            await asyncio.sleep(0)
            if not self.switcher.active:
                break
            # Preparing runs in a thread, for which virtual time does not wait.
            await asyncio.sleep(0.002)
            await self.spend(1)
        assert not self.switcher.active
        await self.spend(90)

    async def kill(self, name: str) -> None:
        self.cluster.crash(name)

    async def whole(self, report: SwitchReport) -> None:
        """It is in one of the plans, all of it, and says why it is not in the other."""
        old = report.state != "done"
        assert self.loop.plan.id == ("old" if old else "new")
        assert await self.alive() == {spec.id for spec in self.loop.plan.replicas}
        assert bool(report.reason) == old
        assert self.settled[-1] == (self.loop.plan.id, report.reason)
        assert self.loop.held == frozenset()
        # What routes never sees the old and the new halves of a replica at once, nor neither.
        assert set(self.tables) <= {
            frozenset(names) for names in ({"a", "b", "k"}, {"w", "k"}, *self.partial)
        }

    partial: tuple[set[str], ...] = ()


@pytest.fixture
async def scene(tmp_path: Path, model: str) -> Scene:
    scene = Scene(tmp_path / "state", model)
    await scene.start()
    return scene


async def fail() -> None:
    raise MoveError("the line is cut")


async def test_all_goes_well(scene: Scene) -> None:
    report = await scene.finish()
    await scene.whole(report)
    assert report.state == "done"
    assert scene.tables[0] == {"a", "b", "k"}
    assert scene.tables[-1] == {"w", "k"}
    assert scene.asked == ["move"]
    document = msgspec.json.decode(msgspec.json.encode(report.document()))
    assert document["programme"]["kept"] == ["k"]
    assert document["programme"]["waves"][0]["local_bytes"] > 0
    # What it took is expected of the next, and the controller is told of it.
    facts = scene.movable
    assert not isinstance(facts, str)
    took = report.durations_s(0)
    factor = (
        took[TransactionPhase.TRANSFER] / document["programme"]["waves"][0]["phases_s"]["transfer"]
    )
    assert facts.learned.factor("transfer") == pytest.approx(factor, rel=0.05)
    prices = SwitchPrices(facts)
    (leg,) = prices.legs(NEW.replicas, OLD.replicas) or ()
    assert {spec.id for spec in leg.started} == {"a", "b"}
    assert [spec.id for spec in leg.retired] == ["w"]
    assert not leg.leaving
    assert leg.seconds >= took[TransactionPhase.TRANSFER] / 2
    odd = replace(OLD.replicas[0], backend=VllmBackend(engine_args=("--dtype", "half")))
    assert prices.legs(NEW.replicas, [odd]) is None
    # And back, with the name that is free again.
    report = await scene.finish(OLD)
    assert report.state == "done"
    assert await scene.alive() == {"a", "b", "k"}
    assert recovered_switch(scene.settings, 0.0) is None


@pytest.mark.parametrize("where", ["move", "check", "generate", "layout"])
async def test_what_fails_before_the_commit_leaves_the_old_plan(scene: Scene, where: str) -> None:
    scene.fates[where] = fail
    report = await scene.finish()
    assert report.state == "rolled_back"
    await scene.whole(report)
    assert ("cut" in report.reason) == (where != "layout")
    assert len(scene.asked) == {"layout": 0, "move": 3}.get(where, 1)


async def test_weights_made_on_the_way_must_be_as_good(tmp_path: Path, model: str) -> None:
    """Perplexity may rise by a twentieth; beyond, the old plan stays."""
    wide = NEW.replicas[0]
    made = replace(wide, shape=replace(wide.shape, precision=Precision.BF16))
    plan = replace(NEW, replicas=(made, NEW.replicas[1]))
    for number, (nats, state) in enumerate(((2.04, "done"), (2.06, "rolled_back"))):
        scene = Scene(tmp_path / str(number), model)
        await scene.start()
        scene.surprises = {"w": nats}
        report = await scene.finish(plan)
        assert report.state == state
        await scene.whole(report)
        assert [one for one in scene.asked if one != "move"] == ["surprise a", "surprise w"]
    assert "raise perplexity by 6.2 %" in report.reason


@pytest.mark.parametrize("victim", ["k", "w"])
async def test_an_engine_that_ends_on_the_way(scene: Scene, victim: str) -> None:
    async def end() -> None:
        await scene.kill(victim)
        raise MoveError(f"{victim} does not answer")

    scene.fates["move"] = end
    scene.partial = ({"a", "b"},)
    report = await scene.finish()
    assert report.state == "rolled_back"
    await scene.whole(report)
    # It is plain that trying again does not help.
    assert scene.asked == ["move"]


async def test_a_transfer_that_never_ends(scene: Scene) -> None:
    async def hang() -> None:
        await scene.clock.sleep(1e9)

    scene.fates["move"] = hang
    report = await scene.finish()
    assert report.state == "rolled_back"
    assert "longer than" in report.reason
    await scene.whole(report)


async def test_one_that_ends_between_check_and_commit_is_started_from_disk(scene: Scene) -> None:
    async def end() -> None:
        await scene.kill("w")

    scene.fates["generate"] = end
    # The old ones serve until they must make room for it.
    scene.partial = ({"k"}, {"a", "k"}, {"b", "k"})
    report = await scene.finish()
    assert report.state == "done"
    await scene.whole(report)


@pytest.mark.parametrize("room", range(14))
async def test_a_full_disk(scene: Scene, room: int) -> None:
    """Whatever the journal still took, it and what runs agree."""
    scene.room = room
    report = await scene.finish()
    await scene.whole(report)
    if report.state != "done":
        assert "No space left" in report.reason
    left = recovered_switch(scene.settings, 0.0)
    if left is not None:
        assert left.plan.id == scene.loop.plan.id


async def test_a_kill_at_any_moment_leaves_a_journal_that_tells(scene: Scene) -> None:
    await scene.finish()
    (path,) = journals(scene.folder)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    committed = False
    for count in range(1, len(lines)):
        last = msgspec.json.decode(lines[count - 1])
        committed = committed or (last.get("kind") == "finished" and last["task"] == "check")
        # The next line may have been torn off in its middle.
        path.write_bytes(b"".join(lines[:count]) + lines[count][:7])
        left = recovered_switch(scene.settings, 5.0)
        assert left is not None
        assert left.plan.id == ("new" if committed else "old")
        assert {spec.id for spec in left.plan.replicas} == (
            {"w", "k"} if committed else {"a", "b", "k"}
        )
        assert recovered_switch(scene.settings, 6.0) is None
    path.write_bytes(b"nonsense\n")
    assert recovered_switch(scene.settings, 5.0) is None
    assert journals(scene.folder) == []


async def test_the_last_request_wins(scene: Scene) -> None:
    first = scene.switcher.want(NEW, "test")
    await asyncio.sleep(0.05)
    await scene.spend(1)
    assert first.state == "running"
    second = scene.switcher.want(plan_of("third", replica("x", "cpu:3"), *OLD.replicas), "test")
    await scene.over()
    assert first.state == "rolled_back"
    assert "third" in first.reason
    assert second.state == "done"
    assert await scene.alive() == {"a", "b", "k", "x"}


async def test_without_room_beside_it_goes_in_waves(scene: Scene) -> None:
    """Where both do not fit, what makes room is stopped first, and comes back if it fails."""
    scene.available = 1 << 20
    scene.partial = ({"k"},)
    scene.fates["check"] = fail
    report = await scene.finish()
    assert report.programme["waves"][0]["stop"] == ["a", "b"]
    assert report.state == "rolled_back"
    await scene.whole(report)
    scene.fates.clear()
    report = await scene.finish()
    assert report.state == "done"
    await scene.whole(report)


@pytest.mark.parametrize(
    ("settings", "plan", "reason"),
    [
        ({"keep_weights": False}, NEW, "do not keep"),
        ({}, plan_of("bad", replica("x", "cpu:3", precision=Precision.INT4)), "int4"),
        (
            {},
            plan_of(
                "attached",
                ReplicaSpec(
                    id="x",
                    shape=ReplicaShape(),
                    devices=(),
                    backend=AttachedBackend(url="http://h"),
                ),
            ),
            "attached",
        ),
    ],
)
async def test_what_cannot_be_moved_is_rolled_out(
    tmp_path: Path, model: str, settings: dict[str, Any], plan: DeploymentPlan, reason: str
) -> None:
    scene = Scene(tmp_path / "state", model, **settings)
    await scene.start()
    report = scene.switcher.want(plan, "test")
    await asyncio.sleep(0.05)
    await scene.spend(200)
    assert (report.method, scene.loop.plan) == ("restart", plan)
    assert reason in report.reason
    scene.switcher.observe(await scene.cluster.observe())
    (document,) = scene.switcher.documents()
    assert document["state"] == "done"
    foreseen = scene.switcher.foresee(NEW, await scene.cluster.observe())
    assert foreseen["method"] == "restart"


def test_names_and_shares_on_the_way() -> None:
    wished = plan_of(
        "wished",
        replica("other", "cpu:2"),  # this is k
        replica("a", "cpu:0", chunk=512),  # not the a there is
        replica("a-2", "cpu:3"),
    )
    found = renamed(wished, OLD.replicas)
    names = [spec.id for spec in found.replicas]
    assert names[0] == "k"
    assert len({*names, "a", "b"}) == 5
    assert set(found.routing_shares["all"]) == set(found.planned_types[0].shares) == set(names)
    step = between(found, OLD, [*OLD.replicas[1:], found.replicas[1]])
    for shares in (step.routing_shares["all"], step.planned_types[0].shares):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert set(shares) <= {"b", "k", names[1]}
    assert between(found, OLD, found.replicas) == found


async def test_the_same_replicas_need_no_wave(scene: Scene) -> None:
    """Another name and other shares are in force without anything being started."""
    wished = plan_of("new", replica("x", "cpu:0"), replica("y", "cpu:1"), replica("z", "cpu:2"))
    report = await scene.finish(wished)
    assert (report.state, report.waves) == ("done", 0)
    assert scene.asked == []
    assert [spec.id for spec in scene.loop.plan.replicas] == ["a", "b", "k"]
    assert scene.settled == [("new", "")]
    assert recovered_switch(scene.settings, 0.0) is None
