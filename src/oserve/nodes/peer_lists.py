"""Keeps each node's hatch told of the other nodes, so that ranks reach ranks elsewhere."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from oserve.core import Clock, HatchAddress, OServeError
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
        self._due = asyncio.Event()
        self._failing: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Tell all nodes, and again after each ``refresh``."""
        self._due.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def refresh(self) -> None:
        """A node has come, or has another hatch."""
        self._due.set()

    async def close(self) -> None:
        """Tell no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._due.wait()
            self._due.clear()
            hatches = dict(self._hatches())
            told = await asyncio.gather(*(self._one(name, hatches) for name in hatches))
            if all(told):
                pause_s = _FIRST_PAUSE_S
                continue
            await self._clock.sleep(pause_s)
            pause_s = min(2.0 * pause_s, _MAX_PAUSE_S)
            self._due.set()

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
