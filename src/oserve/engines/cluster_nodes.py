"""The nodes of a cluster: this machine, and others that may be lost and come back."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from oserve.core import (
    Clock,
    Device,
    HatchAddress,
    NodeSighting,
    OServeError,
    ReplicaSpec,
    parts_of,
)
from oserve.engines.device_book import DeviceBook
from oserve.engines.engine_starts import LaunchFacts, platform_of
from oserve.engines.holding import HeldEngines
from oserve.engines.node_engines import KeptEngines, NodeEngines
from oserve.engines.node_tender import Adopted, NodeTender
from oserve.engines.part_engines import PartsEngines
from oserve.engines.ports import MasterPorts


class ClusterNodes:
    """This machine's engines, ``own``, and those of other nodes; ``book`` has all their devices.

    ``adopt`` sorts out what runs on a node before the node counts as up. ``on_node`` is called with
    a node that is up (an empty reason) or down (why). ``lacks`` may be set to what tells what a
    node must get before it is used; see ``NodeSighting``.
    """

    def __init__(
        self,
        own: NodeEngines,
        devices: Sequence[Device],
        *,
        facts: LaunchFacts,
        clock: Clock,
        adopt: Callable[[KeptEngines], Awaitable[Adopted]],
        on_node: Callable[[str, str], None] | None,
    ) -> None:
        self.own = own
        self.book = DeviceBook(devices)
        self.on_node = on_node
        self.lacks: Callable[[str], str | None] = lambda _node: ""
        self._facts = facts
        self._clock = clock
        self._adopt = adopt
        self._tenders: dict[str, NodeTender] = {}
        self._ports = MasterPorts()

    def engines_for(self, spec: ReplicaSpec) -> NodeEngines:
        """The engines of the node, or of the nodes, where a replica's devices are.

        Raises ``ValueError`` if vLLM cannot run the replica on several nodes so.
        """
        if len({device.node for device in self.book.of(spec)}) == 1:
            return self._engines(self.book.node_of(spec))
        try:
            return self._joined(spec)
        except OServeError as error:
            raise ValueError(str(error)) from None

    def parts_for(self, spec: ReplicaSpec) -> PartsEngines | None:
        """The engines of a replica over several nodes; ``None`` if it is none that can run here."""
        if not spec.devices or not self.book.knows(spec):
            return None
        if len({device.node for device in self.book.of(spec)}) == 1:
            return None
        try:
            return self._joined(spec)
        except OServeError:
            return None

    def _joined(self, spec: ReplicaSpec) -> PartsEngines:
        devices = self.book.of(spec)
        parts = parts_of(spec, {device.id: device for device in devices})
        nodes = [self._engines(part.node) for part in parts]
        facts = replace(self._facts, platform=platform_of(devices))
        return PartsEngines(facts, parts, nodes, self._ports)

    def has(self, node: NodeEngines, spec: ReplicaSpec) -> bool:
        """Whether all devices of a replica exist, on that node."""
        if not spec.devices or not self.book.knows(spec):
            return False
        return all(self._engines(device.node) is node for device in self.book.of(spec))

    def _engines(self, name: str) -> NodeEngines:
        return self._tenders[name].node if name in self._tenders else self.own

    def all(self) -> list[NodeEngines]:
        """This machine first."""
        return [self.own, *(tender.node for tender in self._tenders.values())]

    # -- what comes and goes --------------------------------------------------------------------
    def join(self, held: HeldEngines, devices: Sequence[Device] = ()) -> None:
        """Take up another node, to be called with ``begin``; its devices count once it is up."""
        self.book.add(devices)
        memory_bytes = float(sum(one.memory_bytes for one in self.book.on(held.node)))
        # The nodes of a cluster need not be alike.
        facts = replace(self._facts, platform=platform_of(self.book.on(held.node)))
        node = KeptEngines(
            name=held.node, facts=facts, keeper=held, free_bytes=memory_bytes or None
        )
        self._tenders[held.node] = NodeTender(
            node, clock=self._clock, adopt=self._adopt, turned=self._turned
        )
        self.book.down(held.node, "it has not been reached yet")

    def begin(self) -> None:
        """Call every node that is not called yet."""
        for tender in self._tenders.values():
            tender.begin()

    async def adopted(self) -> list[Adopted]:
        """What the first call of each node has found."""
        return list(await asyncio.gather(*(one.first() for one in self._tenders.values())))

    def lose(self, node: str, reason: str) -> None:
        """Someone else has told that a node is lost; it is called again after a pause."""
        if node in self._tenders:
            self._tenders[node].cut(reason)

    def is_up(self, node: str) -> bool:
        """Whether a node can be reached, and what runs there is known."""
        return node not in self.book.reasons()

    def redirect(self, node: str, hatch: HatchAddress) -> None:
        """A node is at this hatch, as someone else has told; it is called there at once."""
        if node in self._tenders:
            self._tenders[node].node.keeper.redirect(hatch)
            self._tenders[node].call()

    def sightings(self) -> tuple[NodeSighting, ...]:
        """What is seen of each node; nothing while there is only this machine."""
        if not self._tenders:
            return ()
        now_s = self._clock.now()
        mine = [NodeSighting(name=self.own.name)] if self.book.on(self.own.name) else []
        return (*mine, *(self._sighting(tender, now_s) for tender in self._tenders.values()))

    def _sighting(self, tender: NodeTender, now_s: float) -> NodeSighting:
        return replace(tender.sighting(now_s), lacks=self.lacks(tender.node.name))

    async def close(self) -> None:
        """Call nodes no more; connections stay."""
        await asyncio.gather(*(tender.close() for tender in self._tenders.values()))

    def _turned(self, node: str, reason: str) -> None:
        if reason:
            self.book.down(node, reason)
        else:
            self.book.up(node)
        if self.on_node is not None:
            self.on_node(node, reason)
