"""The gateway processes of other nodes: started through the nodes' keepers, called by the hub."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from oserve.core import Clock, HatchAddress
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_call import HubStreams
from oserve.gateway.process.hub_lines import MAX_LINE_BYTES
from oserve.gateway.process.keeper import NodeKeeper
from oserve.gateway.process.node_gateway import GatewayPlan, NodeGateway, process_name
from oserve.gateway.process.states import GatewayStatus
from oserve.wire.hatch import open_hatch

_log = logging.getLogger("oserve.gateway")

Dialer = Callable[[HatchAddress, str], Awaitable[HubStreams]]


async def dial_through_hatch(hatch: HatchAddress, name: str) -> HubStreams:
    """Open the way to a socket behind a hatch. Raises HatchError."""
    return await open_hatch(hatch, name, limit=MAX_LINE_BYTES)


class NodeGateways:
    """Keeps ``plan.count`` gateway processes on each node that is in use.

    ``dial`` is for tests.
    """

    def __init__(
        self, hub: Hub, plan: GatewayPlan, clock: Clock, dial: Dialer = dial_through_hatch
    ) -> None:
        self._hub = hub
        self._plan = plan
        self._clock = clock
        self._dial = dial
        self._nodes: dict[str, list[NodeGateway]] = {}
        self._asides: set[asyncio.Task[None]] = set()
        self._closing = False

    def follow(self, keepers: Mapping[str, NodeKeeper], leaving: Collection[str] = ()) -> None:
        """Call it whenever nodes may have come or gone, with the keepers of those that are up.

        On nodes that are ``leaving``, processes finish their requests and end. Those of nodes that
        are not named serve on as long as their keepers have it.
        """
        if self._closing:
            return
        for name, keeper in keepers.items():
            gateways = self._nodes.get(name)
            if gateways is None:
                gateways = self._nodes[name] = [
                    NodeGateway(index, keeper, self._hub, self._plan, self._clock, self._dial)
                    for index in range(self._plan.count)
                ]
                self._aside(self._end_others(keeper))
            for gateway in gateways:
                if name in leaving:
                    gateway.leave()
                else:
                    gateway.begin()

    async def _end_others(self, keeper: NodeKeeper) -> None:
        """End processes of a server with other settings."""
        names = {process_name(index) for index in range(self._plan.count)}
        others = [
            process
            for name, process in keeper.processes().items()
            if name.startswith(process_name("")) and name not in names
        ]
        for process in others:
            with contextlib.suppress(ConnectionError):
                await process.end(self._plan.end_s)

    def status(self) -> list[GatewayStatus]:
        """Every process, by node."""
        return [one.status() for name in sorted(self._nodes) for one in self._nodes[name]]

    async def close(self) -> None:
        """End all of them, within their grace."""
        self._closing = True
        await asyncio.gather(*(one.close() for one in self._all()), *self._asides)

    def _all(self) -> Iterable[NodeGateway]:
        return [one for gateways in self._nodes.values() for one in gateways]

    def _aside(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)
