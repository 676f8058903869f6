"""Links of two nodes measured through their hatches, and kept."""

import asyncio
from pathlib import Path

import pytest

from examiners import examining_keeper
from hatches import running_hatch
from oserve.core import HatchAddress, VirtualClock
from oserve.nodes import link_measuring, visit
from oserve.nodes.directory import ClusterNode
from oserve.nodes.link_book import LinkBook
from oserve.nodes.link_measuring import LinkMeasuring
from oserve.startup.link_memory import LinkMemory


async def test_nodes_that_come_up_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "SILENCE_S", 0.0)
    monkeypatch.setattr(link_measuring, "_PAIR_S", 0.01)
    started: list[str] = []
    memory = LinkMemory(tmp_path / "state.sqlite")
    assert memory.read() == ()
    book, clock, told = LinkBook(), VirtualClock(), asyncio.Event()

    async def changed() -> None:
        memory.write(book.links())
        told.set()

    async with (
        running_hatch(tmp_path) as one,
        running_hatch(tmp_path) as other,
        examining_keeper(one, started),
        examining_keeper(other, started),
    ):
        nodes = {"a": ClusterNode(name="a", hatch=one.address)}
        measuring = LinkMeasuring(lambda: nodes, book, clock, changed=changed, unix_s=lambda: 50.0)
        await measuring.measure()
        assert started == []
        measuring.begin()
        nodes["b"] = ClusterNode(name="b", hatch=other.address)
        measuring.refresh()
        while not told.is_set():
            await clock.advance(1.0)
            await asyncio.sleep(0.001)
        # One of the two measures.
        assert len(started) == 1
        [link] = book.links()
        assert (link.one, link.other, link.at_s, link.error) == ("a", "b", 50.0, "")
        assert link.bytes_per_s > 0 < link.round_trip_s
        told.clear()
        await measuring.measure()
        assert not told.is_set()
        await measuring.close()
    assert memory.read() == book.links()


class _Closed(visit.NodeVisit):
    """A visit to a node whose keeper does not answer."""

    async def begin(self) -> None:
        raise OSError("no answer")


async def test_a_node_that_cannot_be_visited_is_asked_again_later() -> None:
    book, clock, now_s = LinkBook(), VirtualClock(), [50.0]
    hatch = HatchAddress(host="h", port=1, certificate="c", token="t")
    nodes = {name: ClusterNode(name=name, hatch=hatch) for name in "ab"}
    asked: list[str] = []

    async def changed() -> None:
        pass

    def visited(node: ClusterNode) -> visit.NodeVisit:
        asked.append(node.name)
        return _Closed(node, purpose="links")

    measuring = LinkMeasuring(
        lambda: nodes, book, clock, changed=changed, unix_s=lambda: now_s[0], visit=visited
    )

    async def measured() -> int:
        before = len(asked)
        task = asyncio.create_task(measuring.measure())
        while not task.done():
            await clock.advance(1.0)
        return len(asked) - before

    assert await measured() == 1
    [link] = book.links()
    assert "could not be visited" in link.error
    assert await measured() == 0
    now_s[0] += 601.0
    assert await measured() == 1
