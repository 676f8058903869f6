"""Hatches hear of each other, however often they move or do not answer."""

import asyncio

from oserve.core import HatchAddress, VirtualClock
from oserve.nodes.directory import ClusterNode
from oserve.nodes.peers import PeerLists
from oserve.wire.hatch import HatchError


class Hatches:
    """What each hatch was told last, by its host; those of ``deaf`` do not answer."""

    def __init__(self) -> None:
        self.told: dict[str, set[str]] = {}
        self.deaf: set[str] = set()
        self.calls = 0

    async def tell(self, address: HatchAddress, peers: dict[str, HatchAddress]) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if address.host in self.deaf:
            raise HatchError("no answer")
        self.told[address.host] = {peer.host for peer in peers.values()}


def node(name: str, host: str = "") -> ClusterNode:
    hatch = HatchAddress(host=host or name, port=1, certificate="", token="secret")
    return ClusterNode(name=name, hatch=hatch)


async def settled(clock: VirtualClock, seconds: float = 0.0) -> None:
    for _ in range(20):
        await clock.advance(seconds / 20)
        await asyncio.sleep(0)


async def test_every_hatch_knows_the_others() -> None:
    clock, hatches = VirtualClock(), Hatches()
    lists = PeerLists(clock, hatches.tell)
    hatches.deaf.add("b")
    for name in "abc":
        lists.changed(node(name))
    lists.changed(ClusterNode(name="d"))  # never reached
    await settled(clock)
    assert hatches.told == {"a": {"b", "c"}, "c": {"a", "b"}}
    assert not lists.is_told("b")
    hatches.deaf.clear()
    await settled(clock, 3.0)
    assert hatches.told["b"] == {"a", "c"}
    # A hatch that is started anew elsewhere: all hear of it, and it hears of all.
    lists.changed(node("c", "c2"))
    await settled(clock)
    assert [hatches.told[host] for host in ("a", "b", "c2")] == [
        {"b", "c2"},
        {"a", "c2"},
        {"a", "b"},
    ]
    calls = hatches.calls
    lists.changed(node("c", "c2"))
    await settled(clock)
    assert hatches.calls == calls
    lists.forgotten("a")
    lists.forgotten("unknown")
    await settled(clock)
    assert hatches.calls == calls + 1
    await lists.close()
