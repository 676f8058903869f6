"""Keeps each node's hatch told of the other nodes, so that ranks reach ranks elsewhere."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from oserve.core import Clock, HatchAddress, OServeError
from oserve.nodes.due_work import DueWork
from oserve.nodes.hatch_messages import tell_peers

_log = logging.getLogger("oserve.nodes")

_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 30.0


class PeerLists:
    """``hatches`` returns those of all nodes that can be called now, by name.

    ``tell`` is for tests.
    """

    def __init__(
        self,
        hatches: Callable[[], Mapping[str, HatchAddress]],
        clock: Clock,
        *,
        tell: Callable[[HatchAddress, dict[str, HatchAddress]], Awaitable[None]] = tell_peers,
    ) -> None:
        self._hatches = hatches
        self._clock = clock
        self._tell = tell
        self._pause_s = _FIRST_PAUSE_S
        self._failing: dict[str, str] = {}
        self._telling = DueWork(
            self._tell_all,
            clock,
            fault="the nodes are not told of each other",
            again_s=_MAX_PAUSE_S,
        )

    def begin(self) -> None:
        """Tell all nodes, and again after each ``refresh``."""
        self._telling.begin()

    def refresh(self) -> None:
        """A node has come, or has another hatch."""
        self._telling.refresh()

    async def close(self) -> None:
        """Tell no more."""
        await self._telling.close()

    async def _tell_all(self) -> None:
        hatches = dict(self._hatches())
        told = await asyncio.gather(*(self._one(name, hatches) for name in hatches))
        if all(told):
            self._pause_s = _FIRST_PAUSE_S
            return
        await self._clock.sleep(self._pause_s)
        self._pause_s = min(2.0 * self._pause_s, _MAX_PAUSE_S)
        self._telling.refresh()

    async def _one(self, name: str, hatches: Mapping[str, HatchAddress]) -> bool:
        others = {other: hatch for other, hatch in hatches.items() if other != name}
        try:
            await self._tell(hatches[name], others)
        # An unforeseen fault must not leave all nodes untold.
        except Exception as error:
            reason = error.message if isinstance(error, OServeError) else str(error)
            if self._failing.get(name) != reason:
                _log.warning("node %s is not told of the other nodes: %s", name, reason)
            self._failing[name] = reason
            return False
        self._failing.pop(name, None)
        return True
