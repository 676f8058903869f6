"""Tells the hatches of all nodes of each other, so that weights can move from node to node.

A hatch keeps what it was told on disk, so that it needs no server for a transfer under way.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from oserve.core import Clock, HatchAddress, OServeError
from oserve.nodes.directory import ClusterNode
from oserve.nodes.hatch_messages import tell_peers
from oserve.wire.hatch import HatchError

_log = logging.getLogger("oserve.nodes")

_FIRST_RETRY_S = 1.0
_MAX_RETRY_S = 30.0

Tell = Callable[[HatchAddress, dict[str, HatchAddress]], Awaitable[None]]


class PeerLists:
    """Keeps the list of the other nodes with each hatch up to date.

    Call ``changed`` with every change of a node, as a directory tells it, and ``forgotten`` when a
    hatch may have lost its list, such as when its node is back.
    """

    def __init__(self, clock: Clock, tell: Tell = tell_peers) -> None:
        self._clock = clock
        self._tell = tell
        self._hatches: dict[str, HatchAddress] = {}
        self._told: dict[str, dict[str, HatchAddress]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def changed(self, node: ClusterNode) -> None:
        """Take up a node's hatch; one that is lost stays listed, since it may be back soon."""
        if node.hatch is not None and self._hatches.get(node.name) != node.hatch:
            self._hatches[node.name] = node.hatch
            self._told.pop(node.name, None)
            for name in self._hatches:
                self._begin(name)

    def forgotten(self, name: str) -> None:
        """Tell this node's hatch again."""
        self._told.pop(name, None)
        if name in self._hatches:
            self._begin(name)

    def is_told(self, name: str) -> bool:
        """Whether a node's hatch has the present list."""
        return self._told.get(name) == self._peers(name)

    async def close(self) -> None:
        """Tell nothing more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _peers(self, name: str) -> Mapping[str, HatchAddress]:
        return {other: hatch for other, hatch in self._hatches.items() if other != name}

    def _begin(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is None or task.done():
            self._tasks[name] = asyncio.create_task(self._keep_told(name))

    async def _keep_told(self, name: str) -> None:
        """Tell one hatch until it has the present list."""
        wait_s = _FIRST_RETRY_S
        while not self.is_told(name):
            peers = dict(self._peers(name))
            try:
                await self._tell(self._hatches[name], peers)
            except (HatchError, OServeError) as error:
                if wait_s == _FIRST_RETRY_S:
                    _log.warning("node %s was not told of the others: %s", name, error)
                await self._clock.sleep(wait_s)
                wait_s = min(2 * wait_s, _MAX_RETRY_S)
            else:
                self._told[name] = peers
                wait_s = _FIRST_RETRY_S
