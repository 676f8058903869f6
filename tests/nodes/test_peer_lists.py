"""Every hatch is told of all others, again and again until it knows."""

import asyncio
import logging

import pytest

from oserve.core import HatchAddress, VirtualClock
from oserve.nodes.peer_lists import PeerLists
from oserve.wire.hatch import HatchError


def hatch(name: str, port: int = 1) -> HatchAddress:
    return HatchAddress(host=name, port=port, certificate="", token="secret-7")


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_node_is_told_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    hatches = {"a": hatch("a"), "b": hatch("b")}
    told: dict[str, dict[str, HatchAddress]] = {}
    failing = {"b"}

    async def tell(address: HatchAddress, others: dict[str, HatchAddress]) -> None:
        if address.host in failing:
            raise HatchError("the node's hatch cannot be reached")
        told[address.host] = others

    clock = VirtualClock()
    lists = PeerLists(lambda: hatches, clock, tell=tell)
    with caplog.at_level(logging.WARNING):
        lists.begin()
        await settled()
        assert told == {"a": {"b": hatches["b"]}}
        # One that failed is asked again, and told of in the log once.
        failing.clear()
        await clock.advance(1.0)
        await settled()
    assert told["b"] == {"a": hatches["a"]}
    assert caplog.text.count("node b is not told") == 1
    assert "secret-7" not in caplog.text
    hatches["c"], hatches["a"] = hatch("c"), hatch("a", 2)
    lists.refresh()
    await settled()
    assert told.keys() == {"a", "b", "c"}
    assert told["b"] == {"a": hatches["a"], "c": hatches["c"]}
    await lists.close()
