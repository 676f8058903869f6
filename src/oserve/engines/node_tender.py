"""Tends the connection to another node: calls its keeper, and calls again when that is lost."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oserve.core import Clock, NodeSighting, OServeError
from oserve.engines.node_engines import KeptEngines

_log = logging.getLogger("oserve.engines")

_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 10.0

Adopted = tuple[list[str], list[str]]


class NodeTender:
    """One node. ``adopt`` sorts out what runs there; ``turned`` hears that it is up, or why not.

    The node is up only after ``adopt``, so that nothing starts on a device in use.
    """

    def __init__(
        self,
        node: KeptEngines,
        *,
        clock: Clock,
        adopt: Callable[[KeptEngines], Awaitable[Adopted]],
        turned: Callable[[str, str], None],
    ) -> None:
        self.node = node
        self._clock = clock
        self._adopt = adopt
        self._turned = turned
        self._adopted: asyncio.Future[Adopted] | None = None
        self._task: asyncio.Task[None] | None = None
        self._reason = ""
        # When it was last heard; ``None`` while it is up.
        self._heard_s: float | None = clock.now()
        self._dead = ""
        self._told = asyncio.Event()

    def begin(self) -> None:
        """Call it from now on."""
        if self._task is None:
            self._adopted = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._adopted))

    async def first(self) -> Adopted:
        """What the first call has found; nothing if the node could not be reached."""
        return await self._adopted if self._adopted is not None else ([], [])

    def cut(self, reason: str) -> None:
        """The node is lost, as someone else has told."""
        self._dead = reason
        self.node.keeper.cut(reason)

    def call(self) -> None:
        """The node is there, as someone else has told: do not wait for the next call's time."""
        self._told.set()

    def sighting(self, now_s: float) -> NodeSighting:
        """What is seen of it."""
        heard_s = now_s - self.node.keeper.silent_s if self._heard_s is None else self._heard_s
        return NodeSighting(name=self.node.name, silent_s=now_s - heard_s, dead=self._dead)

    async def close(self) -> None:
        """Call it no more; the connection stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, first: "asyncio.Future[Adopted]") -> None:
        pause_s = _PAUSE_S
        while True:
            try:
                await self.node.keeper.connect()
                adopted = await self._adopt(self.node)
            except OServeError as error:
                self._down(error.message)
                adopted = ([], [])
            # An unforeseen fault must not end the calls, nor keep the server from its start.
            except Exception as error:
                _log.exception("what runs on node %s cannot be taken up", self.node.name)
                self._down(f"a fault of this server, see its log: {type(error).__name__}")
                adopted = ([], [])
            else:
                pause_s = _PAUSE_S
                self._up(adopted)
            if not first.done():
                first.set_result(adopted)
            if not self._reason:
                self._down(await self.node.keeper.lost())
            told = await self._pause(pause_s)
            pause_s = _PAUSE_S if told else min(2.0 * pause_s, _LONGEST_PAUSE_S)

    async def _pause(self, pause_s: float) -> bool:
        """Wait before the next call; whether someone has told that the node is there."""
        waits = {
            asyncio.ensure_future(self._clock.sleep(pause_s)),
            asyncio.ensure_future(self._told.wait()),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        told = self._told.is_set()
        self._told.clear()
        return told

    def _up(self, adopted: Adopted) -> None:
        kept, ended = (", ".join(names) or "-" for names in adopted)
        _log.info("node %s is up; adopted: %s; ended: %s", self.node.name, kept, ended)
        self._reason = self._dead = ""
        self._told.clear()
        self._heard_s = None
        self._turned(self.node.name, "")

    def _down(self, reason: str) -> None:
        if reason != self._reason:
            _log.warning("node %s is down: %s", self.node.name, reason)
        self._reason = reason
        if self._heard_s is None:
            self._heard_s = self._clock.now() - self.node.keeper.silent_s
        self._turned(self.node.name, reason)
