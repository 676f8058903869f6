"""Links of two nodes measured through their hatches, and kept."""

import asyncio
from pathlib import Path

import pytest

from examiners import examining_keeper
from hatches import running_hatch
from oserve.core import VirtualClock
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


async def test_a_node_that_cannot_be_visited_is_asked_again_later() -> None:
    book = LinkBook()
    nodes = {name: ClusterNode(name=name, refused="no") for name in "ab"}

    async def changed() -> None:
        pass

    measuring = LinkMeasuring(
        lambda: nodes, book, VirtualClock(), changed=changed, unix_s=lambda: 50.0
    )
    task = asyncio.create_task(measuring.measure())
    while not task.done():
        await measuring._clock.advance(1.0)  # type: ignore[attr-defined]
    # Without a hatch there is nothing to measure.
    assert book.links() == ()
