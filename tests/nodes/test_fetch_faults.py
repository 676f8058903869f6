"""Fetches that fail, and nodes that do not tell: when they are tried and looked at again."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.test_model_fetch import FILES, having
from oserve.core import HatchAddress, VirtualClock
from oserve.nodes.directory import ClusterNode
from oserve.nodes.fetch_messages import (
    FetchEnd,
    FetchQuery,
    FilesOffered,
    HoldingsQuery,
    ModelHoldings,
    Query,
)
from oserve.nodes.model_fetch import ModelFetch
from oserve.nodes.node_standing import AGAIN_S, REFUSED_S, NodeStanding
from oserve.nodes.visit import NodeVisit

HATCH = HatchAddress(host="127.0.0.1", port=1, certificate="", token="")


class Cluster:
    """Nodes that answer at once; ``asked``: when each was asked what it has, or had to fetch."""

    def __init__(self, **holdings: ModelHoldings | Exception) -> None:
        self.holdings = holdings
        self.nodes = {name: ClusterNode(name=name, hatch=HATCH) for name in holdings}
        self.clock = VirtualClock()
        self.asked: list[tuple[str, str, float]] = []
        self.end: Callable[[FetchQuery], FetchEnd] = lambda _query: FetchEnd()
        self.open = 0

    def fetch(self, *models: str) -> ModelFetch:
        return ModelFetch(
            models or ["m"],
            lambda: self.nodes,
            self.clock,
            visit=lambda node: _Visit(node, self),
        )

    def times(self, name: str, kind: type) -> list[float]:
        return [at_s for node, asked, at_s in self.asked if (node, asked) == (name, kind.__name__)]

    async def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            await self.clock.advance(1.0)
            for _ in range(20):
                await asyncio.sleep(0)


class _Visit(NodeVisit):
    def __init__(self, node: ClusterNode, cluster: Cluster) -> None:
        super().__init__(node, purpose="test")
        self.cluster = cluster
        self.begun = False
        self.query: Query | None = None

    @property
    def open(self) -> bool:
        return self.begun

    async def begin(self) -> None:
        self.begun = True
        self.cluster.open += 1

    async def end(self) -> None:
        self.cluster.open -= self.begun
        self.begun = False

    def tell(self, query: Query) -> None:
        at_s = self.cluster.clock.now()
        self.cluster.asked.append((self.node.name, type(query).__name__, at_s))
        self.query = query

    async def heard(self, answer: type[Any], limit_s: float) -> Any:
        await asyncio.sleep(0)
        match self.query:
            case HoldingsQuery():
                found = self.cluster.holdings[self.node.name]
                if isinstance(found, Exception):
                    raise found
                return found
            case FetchQuery() as query:
                return self.cluster.end(query)
            case _:
                return FilesOffered()


async def test_a_fetch_that_fails_is_tried_less_and_less_often() -> None:
    cluster = Cluster(a=having(*FILES), b=having())
    cluster.end = lambda _query: FetchEnd(error="it arrived damaged")
    fetch = cluster.fetch()
    fetch.begin()
    await cluster.run(1000)
    times = cluster.times("b", FetchQuery)
    pauses = [round(after - before) for before, after in pairwise(times)]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
    # Each time the sender is asked anew what it has, and nobody is visited meanwhile.
    assert len(cluster.times("a", HoldingsQuery)) == 1 + len(times)
    assert cluster.open == 0
    assert fetch.lacks("b") == "it lacks the model: it arrived damaged"
    # It is gone there, and nobody else has it.
    cluster.holdings["a"] = having("config.json")
    await cluster.run(REFUSED_S)
    assert fetch.lacks("a") == fetch.lacks("b") == ""
    # One comes that has it.
    cluster.holdings |= {"c": having(*FILES)}
    cluster.nodes["c"] = ClusterNode(name="c", hatch=HATCH)
    cluster.end = lambda _query: FetchEnd()
    fetch.refresh()
    await cluster.run(3)
    assert fetch.lacks("a") == ""
    assert len(cluster.times("a", FetchQuery)) == 1
    assert fetch.lacks("b")
    await cluster.run(REFUSED_S)
    assert fetch.lacks("b") == ""
    await fetch.close()


async def test_a_node_that_did_not_tell_is_asked_again() -> None:
    cluster = Cluster(a=having(*FILES), b=ConnectionError("no"))
    fetch = cluster.fetch()
    fetch.begin()
    await cluster.run(20)
    assert fetch.lacks("b") == ""
    cluster.holdings["b"] = having()
    await cluster.run(REFUSED_S)
    assert len(cluster.times("b", FetchQuery)) == 1
    await fetch.close()


async def test_an_unforeseen_fault_holds_no_node_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster(a=having(*FILES), b=RuntimeError("odd"), c=having())
    fetch = cluster.fetch()

    def odd(_query: FetchQuery) -> FetchEnd:
        raise RuntimeError("odd")

    cluster.end = odd
    fetch.begin()
    await cluster.run(20)
    assert fetch.lacks("b") == ""
    assert "its model cannot be looked after" in caplog.text
    # A fault of a fetch is not met again at once.
    assert len(cluster.times("c", FetchQuery)) == 1
    assert "fault of this server" in (fetch.lacks("c") or "")
    await fetch.close()


async def test_the_sender_leaves_between_two_models(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(a=having(*FILES), b=having(), c=having(*FILES))

    def leaves(_query: FetchQuery) -> FetchEnd:
        if cluster.nodes.pop("a", None):
            fetch.refresh()
            # The step that notices it comes before the next model does.
            fetch._seen.pop("a")
        return FetchEnd()

    cluster.end = leaves
    fetch = cluster.fetch("m", "n")
    fetch.begin()
    await cluster.run(30)
    assert fetch.lacks("b") == ""
    assert "it lacks the model: node a is down" in caplog.text
    assert "cannot be looked after" not in caplog.text
    await fetch.close()


async def test_a_part_of_other_files_is_not_the_model() -> None:
    cluster = Cluster(a=having(*FILES), b=having("config.json", other=True))
    fetch = cluster.fetch()
    fetch.begin()
    await cluster.run(5)
    assert "other files of the model" in (fetch.lacks("b") or "")
    assert not cluster.times("b", FetchQuery)
    # They are removed by hand.
    cluster.holdings["b"] = having()
    await cluster.run(REFUSED_S)
    assert fetch.lacks("b") == ""
    await fetch.close()


@given(refusals=st.lists(st.booleans(), min_size=1, max_size=40))
def test_pauses_grow_up_to_a_limit(refusals: list[bool]) -> None:
    seen = NodeStanding(node=ClusterNode(name="a"))
    last_s = 0.0
    for refused in refusals:
        seen.failed("no", 0.0, sender="b", refused=refused)
        assert AGAIN_S <= seen.pause_until_s <= REFUSED_S
        if refused:
            assert seen.pause_until_s == REFUSED_S
        else:
            assert seen.pause_until_s >= last_s
            last_s = seen.pause_until_s
    seen.got("m", having(*FILES))
    seen.failed("no", 0.0, sender="b", refused=False)
    assert seen.pause_until_s == AGAIN_S
