"""Links of two nodes measured through their hatches, and kept."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examiners import examining_keeper
from hatches import running_hatch
from oserve.core import HatchAddress, VirtualClock
from oserve.nodes import link_measuring, visit
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import LinkFacts
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


class _Told(visit.NodeVisit):
    """A visit to a node whose examiner answers what the test says, after ``meanwhile``."""

    meanwhile: Callable[[str, str], LinkFacts]

    @property
    def open(self) -> bool:
        return True

    async def begin(self) -> None:
        pass

    async def ask(self, query: Any, answer: Any, limit_s: float) -> Any:
        return self.meanwhile(self.node.name, query.target)


async def test_what_a_node_that_goes_down_could_not_measure_says_nothing_of_its_links() -> None:
    book, clock = LinkBook(), VirtualClock()
    hatch = HatchAddress(host="h", port=1, certificate="c", token="t")
    nodes = {name: ClusterNode(name=name, hatch=hatch) for name in "abc"}
    lost: list[ClusterNode] = []

    def meanwhile(one: str, other: str) -> LinkFacts:
        if "c" in {one, other}:
            lost.extend(nodes.pop(name) for name in nodes.keys() & {"c"})
            return LinkFacts(target=other, error="its examiner broke off")
        return LinkFacts(target=other, bytes_per_s=1e9, round_trip_s=1e-3)

    def visited(node: ClusterNode) -> visit.NodeVisit:
        made = _Told(node, purpose="links")
        made.meanwhile = meanwhile
        return made

    async def changed() -> None:
        pass

    async def passes(task: "asyncio.Task[None]") -> None:
        while not task.done():
            await clock.advance(1.0)

    measuring = LinkMeasuring(
        lambda: nodes, book, clock, changed=changed, unix_s=lambda: 50.0, visit=visited
    )
    await passes(asyncio.create_task(measuring.measure()))
    assert [(link.one, link.other, link.error) for link in book.links()] == [("a", "b", "")]
    # It is measured as soon as it is back.
    nodes["c"] = lost[0]
    assert book.due(dict.fromkeys(nodes, 60.0), 60.0)


async def test_visits_do_not_last_while_something_else_needs_the_links() -> None:
    book, clock = LinkBook(), VirtualClock()
    hatch = HatchAddress(host="h", port=1, certificate="c", token="t")
    nodes = {name: ClusterNode(name=name, hatch=hatch) for name in "abcd"}
    busy, ended = [False], list[str]()

    def meanwhile(_one: str, other: str) -> LinkFacts:
        busy[0] = True
        return LinkFacts(target=other, bytes_per_s=1e9, round_trip_s=1e-3)

    class Visit(_Told):
        async def end(self) -> None:
            ended.append(self.node.name)

    def visited(node: ClusterNode) -> visit.NodeVisit:
        made = Visit(node, purpose="links")
        made.meanwhile = meanwhile
        return made

    async def changed() -> None:
        pass

    measuring = LinkMeasuring(
        lambda: nodes, book, clock, changed=changed, unix_s=lambda: 50.0, visit=visited
    )
    measuring.busy = lambda: busy[0]
    measuring.begin()
    for _ in range(60):
        await clock.advance(1.0)
    # One round, and nobody is on a node any more.
    assert len(book.links()) == 2
    assert ended
    while len(book.links()) < 6:
        busy[0] = False
        await clock.advance(1.0)
    assert not any(link.error for link in book.links())
    await measuring.close()
