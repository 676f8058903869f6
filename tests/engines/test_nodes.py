"""Engines on several nodes: real keepers with fake processes, and cables that are pulled."""

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from keepers import FakeNode, Fleet, spec
from oserve.core import (
    Device,
    OServeError,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartReplica,
    StopReplica,
)
from oserve.engines.device_book import DeviceBook
from oserve.engines.engine_starts import LaunchFacts
from oserve.engines.holding import HeldEngines
from oserve.engines.line_watch import LineWatch
from oserve.engines.node_engines import model_folder

GONE, READY = ReplicaPhase.GONE, ReplicaPhase.READY


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path, "one", "two")
    yield fleet
    await fleet.close()


async def test_replicas_start_where_their_devices_are(fleet: Fleet) -> None:
    assert await fleet.server() == ([], [])
    assert await fleet.devices() == {"one/cpu:0", "one/cpu:1", "two/cpu:0", "two/cpu:1"}
    await fleet.start("a", "one/cpu:1")
    await fleet.start("b", "two/cpu:0", "two/cpu:1")
    one, two = fleet.nodes.values()
    assert [cores for _, _, cores in one.launcher.asked] == [(1,)]
    assert [cores for _, _, cores in two.launcher.asked] == [(0, 1)]
    endpoint = fleet.state("b").endpoint
    assert (endpoint.unix_socket, endpoint.hatch) == ("b-2/api.sock", two.dial.hatch)
    # The keeper has made the folder, and the server nothing.
    argv, env, _ = two.launcher.asked[0]
    assert argv[argv.index("--uds") + 1] == str(two.run / "b-2" / "api.sock")
    assert env["TMPDIR"] == str(two.run / "b-2")
    assert (two.run / "b-2").stat().st_mode & 0o077 == 0
    assert "--kv-transfer-config" not in argv
    await fleet.cluster.apply(StopReplica(replica="b"))
    await fleet.until(lambda: fleet.phase("b") is GONE)
    with pytest.raises(ValueError, match="over nodes"):
        await fleet.cluster.apply(StartReplica(spec=spec("c", "one/cpu:0", "two/cpu:0")))
    assert not (two.run / "b-2").exists()


async def test_the_cause_of_an_end_is_told_by_the_node(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    node = fleet.nodes["one"]
    node.log("a").write_text("ValueError: out of luck\n")
    node.launcher.alive[0].end(1)
    await fleet.until(lambda: fleet.phase("a") is GONE)
    failures = (await fleet.cluster.observe()).failures["a"]
    assert failures.reason == "ended with status 1: ValueError: out of luck"
    # Its next log begins anew.
    await fleet.start("a", "one/cpu:0")
    assert not node.log("a").exists()
    assert node.log("a").with_name("a.log.1").read_text() == "ValueError: out of luck\n"


async def test_an_engine_that_never_serves_is_judged_by_its_node_s_log(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0", ready=False)
    fleet.probes["a-1"].completes = False
    await fleet.settle()
    fleet.nodes["one"].log("a").write_text("ValueError: no first step\n")
    fleet.well.add("a-1")
    await fleet.until(lambda: fleet.phase("a") is GONE)
    reason = (await fleet.cluster.observe()).failures["a"].reason
    assert reason == "did not answer its first request: ValueError: no first step"


async def test_a_silent_node_is_lost_and_taken_up_again(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    await fleet.start("b", "two/cpu:0")
    since_s = fleet.state("a").since_s
    node = fleet.nodes["one"]
    node.cable.pull()
    pulled_s = fleet.clock.now()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    # Noticed after five seconds, by a look each second.
    assert 4.0 <= fleet.clock.now() - pulled_s <= 7.5
    assert fleet.state("a").detail.startswith("node one is lost: nothing has been heard")
    assert await fleet.devices() == {"two/cpu:0", "two/cpu:1"}
    observation = await fleet.cluster.observe()
    # It is no failure of the replica.
    assert observation.failures == {}
    silent_s = {seen.name: seen.silent_s for seen in observation.nodes}
    assert silent_s["two"] < 2.0
    assert silent_s["one"] >= 4.0
    # Its engine may still run: nothing starts there.
    assert len(node.launcher.alive) == 1
    with pytest.raises(ValueError, match="node one is down"):
        await fleet.cluster.apply(StartReplica(spec=spec("c", "one/cpu:1")))
    # It was called in vain for a while, ever more seldom; one who knows has it called at once.
    await fleet.settle(30.0)
    node.cable.plug()
    assert node.dial.hatch is not None
    fleet.cluster.nodes.redirect("one", node.dial.hatch)
    plugged_s = fleet.clock.now()
    await fleet.until(lambda: ("one", True) in fleet.turned[2:])
    assert fleet.clock.now() - plugged_s < 2.0
    assert fleet.phase("a") is READY
    assert fleet.state("a").since_s == since_s
    assert len(await fleet.devices()) == 4
    assert (await fleet.cluster.observe()).nodes[0].silent_s < 2.0
    # It is watched and ended as before.
    await fleet.cluster.apply(StopReplica(replica="a"))
    await fleet.until(lambda: fleet.phase("a") is GONE)
    assert node.launcher.processes[0].signals == ["TERM"]
    assert fleet.phase("b") is READY


async def test_an_engine_that_was_replaced_meanwhile_is_ended_first(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    node = fleet.nodes["one"]
    node.launcher.processes[0].stubborn = True
    node.cable.pull()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    await fleet.start("a", "two/cpu:0")
    node.cable.plug()
    await fleet.until(lambda: node.launcher.processes[0].signals == ["TERM"])
    # It holds its device until it is gone, so the node is not back.
    assert not node.launcher.processes[0].ended.done()
    assert await fleet.devices() == {"two/cpu:0", "two/cpu:1"}
    await fleet.settle(10.0)
    await fleet.until(lambda: not node.launcher.alive)
    await fleet.until(lambda: fleet.turned[-1] == ("one", True))
    assert fleet.phase("a") is READY
    assert fleet.state("a").spec.devices == ("two/cpu:0",)
    await fleet.start("b", "one/cpu:0")


async def test_a_broken_connection_is_mended_and_someone_s_word_counts(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    fleet.nodes["one"].cable.cut()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    assert "the connection to it has broken" in fleet.state("a").detail
    await fleet.until(lambda: fleet.phase("a") is READY)
    fleet.nodes["one"].cable.pull()
    fleet.cluster.nodes.lose("one", "it is dead, says the head")
    await fleet.until(lambda: fleet.phase("a") is GONE)
    assert fleet.state("a").detail == "node one is lost: it is dead, says the head"
    dead = {seen.name: seen.dead for seen in (await fleet.cluster.observe()).nodes}
    assert dead == {"one": "it is dead, says the head", "two": ""}
    fleet.nodes["one"].cable.plug()
    await fleet.until(lambda: fleet.phase("a") is READY)
    assert not any(seen.dead for seen in (await fleet.cluster.observe()).nodes)


async def test_a_replica_that_is_being_taken_up_is_not_started_again(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    fleet.tell.clear()
    fleet.nodes["one"].cable.cut()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    await fleet.until(lambda: fleet.phase("a") is ReplicaPhase.LOADING)
    for device in ("one/cpu:0", "one/cpu:1", "two/cpu:0"):
        with contextlib.suppress(ValueError):
            await fleet.cluster.apply(StartReplica(spec=spec("a", device)))
    fleet.tell.set()
    await fleet.until(lambda: fleet.phase("a") is READY)
    assert [len(node.launcher.asked) for node in fleet.nodes.values()] == [1, 0]


async def test_the_next_server_takes_over_on_every_node(fleet: Fleet) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    await fleet.start("b", "two/cpu:0")
    await fleet.start("c", "two/cpu:1", ready=False)
    kept, ended = await fleet.server()
    assert (sorted(kept), ended) == (["a", "b", "c"], [])
    assert [fleet.phase(name) for name in "abc"] == [READY, READY, ReplicaPhase.LOADING]
    with pytest.raises(ValueError, match="which c has"):
        await fleet.cluster.apply(StartReplica(spec=spec("d", "two/cpu:1")))
    # Names of engines are not used twice.
    await fleet.start("d", "one/cpu:1")
    assert fleet.engine("d") == "d-4"


async def test_a_fault_while_a_node_is_taken_up_ends_neither_its_calls_nor_the_start(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    stamp, faults = LaunchFacts.stamp, [PermissionError("the model's folder")]

    def stamped(facts: LaunchFacts, devices: Sequence[Device]) -> str:
        if faults:
            raise faults.pop()
        return stamp(facts, devices)

    monkeypatch.setattr(LaunchFacts, "stamp", stamped)
    assert await fleet.server() == ([], [])
    assert await fleet.devices() == {"two/cpu:0", "two/cpu:1"}
    await fleet.until(lambda: fleet.turned[-1] == ("one", True))
    await fleet.start("a", "one/cpu:0")


async def test_a_node_that_cannot_be_reached_at_first_joins_later(fleet: Fleet) -> None:
    fleet.nodes["two"].cable.pull()
    await fleet.server()
    assert await fleet.devices() == {"one/cpu:0", "one/cpu:1"}
    await fleet.start("a", "one/cpu:0")
    assert ("two", False) in fleet.turned
    fleet.nodes["two"].cable.plug()
    await fleet.until(lambda: fleet.turned[-1] == ("two", True))
    await fleet.start("b", "two/cpu:0")


async def test_a_keeper_that_nobody_reaches_ends_what_it_holds(fleet: Fleet) -> None:
    await fleet.server(grace_s=0.0)
    await fleet.start("a", "one/cpu:0")
    node = fleet.nodes["one"]
    node.cable.pull()
    await fleet.until(node.running.done)
    assert not node.launcher.alive
    # Its agent starts another one.
    node.cable.plug()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    node.begin()
    await node.begun()
    await fleet.until(lambda: fleet.turned[-1] == ("one", True))
    await fleet.start("a", "one/cpu:0")


async def test_a_keeper_of_another_version_is_ended_for_its_agent_to_start_anew(
    fleet: Fleet,
) -> None:
    node = fleet.nodes["one"]
    node.keeper.stop(patient=False)
    await node.running
    node.begin(oserve="0.0.1")
    await fleet.server()
    await fleet.until(node.running.done)
    assert await fleet.devices() == {"two/cpu:0", "two/cpu:1"}
    node.begin()
    await fleet.until(lambda: fleet.turned[-1] == ("one", True))


async def test_a_start_on_a_node_that_is_lost_meanwhile_ends(fleet: Fleet) -> None:
    await fleet.server()
    node = fleet.nodes["one"]
    node.launcher.gate.clear()
    await fleet.start("a", "one/cpu:0", ready=False)
    await fleet.settle()
    node.cable.pull()
    await fleet.until(lambda: fleet.phase("a") is GONE)
    assert "node one is lost" in fleet.state("a").detail
    node.launcher.gate.set()
    node.cable.plug()
    fleet.well.add("a-1")
    # It has come up there, and is found.
    await fleet.until(lambda: fleet.phase("a") is READY)
    assert len(node.launcher.alive) == 1


async def test_a_node_can_join_a_running_cluster(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.server()
    node = fleet.nodes["three"] = FakeNode("three", tmp_path, fleet.clock)
    await node.begun()
    fleet.cluster.nodes.join(HeldEngines(node.dial, grace_s=600.0), node.devices)
    assert "three/cpu:0" not in await fleet.devices()
    fleet.cluster.nodes.begin()
    await fleet.until(lambda: fleet.turned[-1] == ("three", True))
    await fleet.start("a", "three/cpu:1")


async def test_nodes_need_not_be_alike(fleet: Fleet) -> None:
    node = fleet.nodes["two"]
    node.devices = tuple(
        Device(id=f"two/gpu:{n}", kind="h100", node="two", memory_bytes=1 << 36) for n in range(2)
    )
    await fleet.server()
    await fleet.start("a", "one/cpu:0")
    await fleet.start("b", "two/gpu:1")
    environments = [one.launcher.asked[0][1] for one in fleet.nodes.values()]
    assert ["CUDA_VISIBLE_DEVICES" in env for env in environments] == [False, True]
    assert ["VLLM_CPU_OMP_THREADS_BIND" in env for env in environments] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_no_device_is_ever_used_twice(fleet: Fleet, seed: int) -> None:
    draw = random.Random(seed)
    await fleet.server()
    for _ in range(40):
        deed = draw.choice(("start", "start", "stop", "crash", "server", "pull", "plug", "cut"))
        name, node = draw.choice("abc"), draw.choice(list(fleet.nodes.values()))
        if deed == "start":
            device = draw.choice(node.devices).id
            try:
                await fleet.cluster.apply(StartReplica(spec=spec(name, device)))
            except ValueError:
                continue
            fleet.well.add(fleet.engine(name))
        elif deed == "stop":
            await fleet.cluster.apply(StopReplica(replica=name))
        elif deed == "crash" and node.launcher.alive:
            draw.choice(node.launcher.alive).end(1)
        elif deed == "server":
            await fleet.server()
        elif deed == "pull":
            node.cable.pull()
        elif deed == "plug":
            node.cable.plug()
        elif deed == "cut":
            node.cable.cut()
        await fleet.settle(draw.choice((0.3, 3.0)))
        for one in fleet.nodes.values():
            held = [child.entry for child in one.keeper._children.values()]
            used = [device for entry in held for device in entry.note["devices"]]  # type: ignore[index]
            assert len(used) == len(set(used))
    for one in fleet.nodes.values():
        one.cable.plug()


def test_a_look_that_comes_late_is_no_long_silence() -> None:
    watch = LineWatch(0.0, 5.0)
    assert not watch.is_lost(100.0)
    assert watch.silent_s == 1.5
    assert [watch.is_lost(101.0 + n) for n in range(4)] == [False, False, False, True]
    watch.heard()
    assert not watch.is_lost(105.0)


def test_two_nodes_cannot_have_a_device_of_the_same_name() -> None:
    book = DeviceBook([Device(id="gpu:0", kind="h100", node="one")])
    with pytest.raises(OServeError, match="two devices have the id gpu:0"):
        book.add([Device(id="gpu:0", kind="h100", node="two")])


def test_devices_of_a_node_that_is_down_do_not_count() -> None:
    book = DeviceBook([Device(id=f"{n}/gpu:0", kind="h100", node=n) for n in ("one", "two")])
    wish = ReplicaSpec(id="a", shape=ReplicaShape(), devices=("one/gpu:0",))
    book.check(wish, ())
    book.down("one", "silent")
    assert [device.id for device in book.usable()] == ["two/gpu:0"]
    with pytest.raises(ValueError, match="node one is down: silent"):
        book.check(wish, ())
    with pytest.raises(ValueError, match="unknown devices"):
        book.check(ReplicaSpec(id="a", shape=ReplicaShape(), devices=("x",)), ())
    book.up("one")
    book.check(wish, ())


async def test_a_node_without_the_model_s_files_says_so(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.server()
    missing = tmp_path / "nowhere"
    argv = ["serve", "--model", str(missing), "--dtype", "bfloat16"]
    assert model_folder(argv) == str(missing)
    assert model_folder(["serve", "--model", "some/model"]) == ""
    with pytest.raises(OServeError, match=f"has no model at {missing}.*same folder on every node"):
        await fleet.held[0].launch(
            "x-9", argv, {}, [0], tmp_path / "x.log", None, model=model_folder(argv)
        )
    assert not fleet.nodes["one"].launcher.asked


async def test_what_a_node_lacks_is_told_with_it(fleet: Fleet) -> None:
    await fleet.server()
    fleet.cluster.nodes.lacks = lambda name: "its model" if name == "two" else None
    seen = (await fleet.cluster.observe()).nodes
    assert {one.name: one.lacks for one in seen} == {"one": None, "two": "its model"}
