"""The connections of one keeper: a server, the next one, guests; and what stays with the node."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from keepers import FakeNode
from oserve.core import OServeError, VirtualClock
from oserve.engines.group import start_ticks
from oserve.engines.held_process import NodeLostError
from oserve.engines.holding import HeldEngines, ServerOwner
from oserve.engines.keeper_messages import EndProcesses, Ping, Pong, ServerHello, encoded

CAT = ["cat"]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[FakeNode]:
    node = FakeNode("one", tmp_path, VirtualClock())
    await node.begun()
    yield node
    await node.close()


async def connected(node: FakeNode, *, guest: bool = False) -> HeldEngines:
    held = HeldEngines(node.dial, grace_s=600.0, guest=guest)
    await held.connect()
    return held


async def launched(held: HeldEngines, node: FakeNode, name: str) -> None:
    await held.launch(name, [], {}, [], node.log(name), "note", folder=held.folder / name)


async def rounds(count: int = 100) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_keeper_tells_its_node(node: FakeNode) -> None:
    held = await connected(node)
    assert (held.facts.host, held.facts.folder) == ("one", str(node.run))
    assert held.logs == node.state
    assert held.facts.boot != ""
    assert held.facts.oserve != ""


async def test_the_next_server_replaces_the_first_and_no_process_ends(node: FakeNode) -> None:
    first = await connected(node)
    await launched(first, node, "a-1")
    process = first.engines()["a-1"]
    second = await connected(node)
    with pytest.raises(NodeLostError, match="another server has taken"):
        await process.wait()
    assert "another server" in await first.lost()
    assert [item.entry.note for item in second.engines().values()] == ["note"]
    assert len(node.launcher.alive) == 1
    # The first does not fight for it.
    with pytest.raises(NodeLostError, match="another server"):
        await launched(first, node, "b-2")
    with pytest.raises(NodeLostError, match="another server"):
        await first.connect()


async def test_a_keeper_has_one_server_and_its_engines_are_nobody_else_s(node: FakeNode) -> None:
    ours, theirs = (ServerOwner(key=key, title=f"{key}:/state") for key in ("ours", "theirs"))
    first = HeldEngines(node.dial, grace_s=600.0, owner=ours)
    await first.connect()
    await launched(first, node, "a-1")
    other = HeldEngines(node.dial, grace_s=600.0, owner=theirs)
    with pytest.raises(NodeLostError, match="it serves another server: ours:/state"):
        await other.connect()
    assert "ours:/state" in other.taken
    assert first.engines().keys() == {"a-1"}
    # It ends nothing when it closes, and what it sends anyhow is not read.
    await other.close()
    reader, writer = await asyncio.open_unix_connection(str(node.run / "keeper.sock"))
    writer.write(encoded(ServerHello(grace_s=1.0, owner="theirs")) + encoded(EndProcesses()))
    while await reader.readline():
        continue
    writer.close()
    await rounds()
    assert len(node.launcher.alive) == 1
    # Without its server they wait for it, not for another one.
    first.cut("the server was killed")
    await first.lost()
    await rounds()
    with pytest.raises(NodeLostError, match="ours:/state, and is held for it for at most 600 s"):
        await HeldEngines(node.dial, grace_s=600.0, owner=theirs).connect()
    again = HeldEngines(node.dial, grace_s=600.0, owner=ours)
    await again.connect()
    assert again.engines().keys() == {"a-1"}
    # A server that has left nothing makes room.
    await again.close()
    other = HeldEngines(node.dial, grace_s=600.0, owner=theirs)
    await other.connect()
    assert other.taken == ""
    await launched(other, node, "b-2")


async def test_a_guest_leaves_the_server_alone_and_its_process_stays(node: FakeNode) -> None:
    server = await connected(node)
    await launched(server, node, "a-1")
    guest = await connected(node, guest=True)
    hatch = await guest.hold("hatch", CAT, "hello", node.log("hatch"), 0.0, None, stays=True)
    again = await connected(node, guest=True)
    assert set(again.processes()) == {"hatch"}
    await again.close()
    # It is none of the server's, which does not end it when it closes.
    assert server.processes() == {}
    await server.hold("gateway:0", CAT, "hello", node.log("gateway"), 0.0, None)
    assert set((await connected(node, guest=True)).processes()) == {"hatch", "gateway:0"}
    await server.close()
    assert not node.launcher.alive
    assert not node.running.done()
    assert start_ticks(hatch.pid)
    # Another server finds a keeper that starts engines.
    fresh = await connected(node)
    await launched(fresh, node, "b-2")
    # When no server comes, engines end, and the keeper stays with the hatch.
    fresh.cut("the server was killed")
    node.keeper._grace_s = 0.0
    async with asyncio.timeout(60.0):
        while node.launcher.alive:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await rounds()
    assert not node.running.done()
    assert not hatch.ended.done()
    hatch.terminate()
    await hatch.wait()


async def silent_server(
    node: FakeNode, grace_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A server that has greeted, and then says nothing for long enough."""
    reader, writer = await asyncio.open_unix_connection(str(node.run / "keeper.sock"))
    await reader.readline()
    writer.write(encoded(ServerHello(grace_s=grace_s, silence_s=5.0)))
    await rounds()
    assert node.keeper._timer is None
    for _ in range(7):
        await node._clock.advance(1.0)
        await rounds()
    return reader, writer


async def test_a_server_that_was_held_up_keeps_its_connection(
    node: FakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await silent_server(node, 600.0)
    assert "nothing has been heard of the server" in caplog.text
    assert node.keeper._timer is not None
    writer.write(encoded(Ping()))
    assert await reader.readline() == encoded(Pong())
    assert node.keeper._timer is None
    # The next silence counts anew, and so does the end of the connection, once.
    for _ in range(7):
        await node._clock.advance(1.0)
        await rounds()
    timer = node.keeper._timer
    assert timer is not None
    writer.close()
    await rounds()
    assert node.keeper._server is None
    assert node.keeper._timer is timer
    assert not timer.cancelled()


async def test_a_server_that_stays_silent_is_gone(node: FakeNode) -> None:
    held = await connected(node)
    await launched(held, node, "a-1")
    reader, writer = await silent_server(node, 0.0)
    async with asyncio.timeout(60.0):
        await node.running
    assert not node.launcher.alive
    assert await reader.read()
    assert reader.at_eof()
    writer.close()


async def test_what_a_keeper_is_ending_is_no_engine_for_the_next_server(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, go_on, close = asyncio.Event(), asyncio.Event(), node.launcher.close

    async def slowly() -> None:
        closing.set()
        await go_on.wait()
        await close()

    held = await connected(node)
    await launched(held, node, "a-1")
    monkeypatch.setattr(node.launcher, "close", slowly)
    held.cut("the cable is out")
    # The grace is over, and the cable is back at this moment.
    node.keeper._clear(patient=True)
    async with asyncio.timeout(60.0):
        await closing.wait()
        held = await connected(node)
        assert {name: one.entry.ending for name, one in held.engines().items()} == {"a-1": True}
        go_on.set()
        while held.engines():  # noqa: ASYNC110
            await asyncio.sleep(0)
    await held.close()


async def test_what_an_engine_does_and_logs_is_asked_of_its_keeper(node: FakeNode) -> None:
    held = await connected(node)
    await launched(held, node, "a-1")
    process = held.engines()["a-1"]
    # No real process has its number.
    assert await process.activity() is None
    node.log("a-1").write_text("ValueError: out of luck\n")
    assert await process.cause() == "ValueError: out of luck"
    # Its end tells the cause too; the keeper has cleared up.
    assert (node.run / "a-1").is_dir()
    node.crash("a-1")
    assert await process.wait() == 1
    node.log("a-1").unlink()
    assert await process.cause() == "ValueError: out of luck"
    assert await process.activity() is None
    assert not (node.run / "a-1").exists()


async def test_a_folder_that_is_there_already_refuses_the_start(node: FakeNode) -> None:
    held = await connected(node)
    (node.run / "a-1").mkdir()
    with pytest.raises(OServeError, match="exists"):
        await launched(held, node, "a-1")
    assert node.launcher.asked == []


async def test_a_real_process_s_activity_is_told(node: FakeNode) -> None:
    held = await connected(node)
    cat = await held.hold("p", CAT, "hello", node.log("p"), 0.0, None)
    # It leads no group of its own, so ask for this test's.
    node.keeper._children["p"].entry.pid = os.getpgrp()
    activity = await cat.activity()
    assert activity is not None
    assert activity.work_s > 0.0
    assert activity.moved > 0


async def test_the_zygote_is_prepared_for_a_server_that_will_fork(node: FakeNode) -> None:
    node.launcher.gate.clear()
    for forks, guest, prepared in ((False, False, 0), (True, True, 0), (True, False, 1)):
        held = HeldEngines(node.dial, grace_s=600.0, guest=guest, forks=forks)
        await held.connect()
        await rounds()
        assert node.launcher.prepared == prepared
    # Once is enough while it comes up, and it does not delay the keeper's end.
    await HeldEngines(node.dial, grace_s=600.0, forks=True).connect()
    await rounds()
    assert node.launcher.prepared == 1
