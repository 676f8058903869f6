"""Measures the links between nodes in the background, when nodes come up and then once a day.

A pair takes a fraction of a second, no node is in two pairs at a time, and rounds have pauses
between them, so that streams of tokens are hardly held up.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from oserve.core import Clock, OServeError
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import LinkFacts
from oserve.nodes.link_book import LinkBook
from oserve.nodes.visit import NodeVisit, measured_link

_log = logging.getLogger("oserve.nodes")

_SETTLE_S = 3.0
_LOOK_S = 600.0
_PAIR_S = 0.4
_PAUSE_S = 0.5
_BUSY_S = 5.0
# Of one go: a thousand nodes take a few.
_MOST_ROUNDS = 64


class LinkMeasuring:
    """Keeps ``book`` up to date with the nodes that ``up`` returns, by name.

    ``changed`` is called after each go. While ``busy``, nothing is measured. ``unix_s`` and
    ``visit`` are for tests.
    """

    def __init__(
        self,
        up: Callable[[], Mapping[str, ClusterNode]],
        book: LinkBook,
        clock: Clock,
        *,
        changed: Callable[[], Awaitable[None]],
        busy: Callable[[], bool] = lambda: False,
        unix_s: Callable[[], float] = time.time,
        visit: Callable[[ClusterNode], NodeVisit] | None = None,
    ) -> None:
        self.busy = busy
        self._up = up
        self._book = book
        self._clock = clock
        self._changed = changed
        self._unix_s = unix_s
        self._visit = visit or (lambda node: NodeVisit(node, purpose="links"))
        self._since: dict[str, float] = {}
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._measuring = False

    @property
    def idle(self) -> bool:
        """Whether all is measured that can be measured now."""
        return not self._measuring and not self._due.is_set()

    def begin(self) -> None:
        """Measure from now on."""
        self._due.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def refresh(self) -> None:
        """A node has come up, or is down."""
        self._due.set()

    async def close(self) -> None:
        """Measure no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            if not self._due.is_set():
                waits = [
                    asyncio.ensure_future(work)
                    for work in (self._due.wait(), self._clock.sleep(_LOOK_S))
                ]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
            self._measuring = True
            # Several nodes come up together.
            await self._clock.sleep(_SETTLE_S)
            self._due.clear()
            try:
                await self.measure()
            # An unforeseen fault in measuring must not end serving.
            except Exception:
                _log.exception("the links between nodes could not be measured")
            self._measuring = False

    async def measure(self) -> None:
        """Measure what is due."""
        nodes, now_s = dict(self._up()), self._unix_s()
        self._since = {name: self._since.get(name, now_s) for name in nodes}
        rounds = self._book.due(self._since, now_s)[:_MOST_ROUNDS]
        if not rounds:
            return
        measurers = {one for pairs in rounds for one, _ in pairs}
        visits = {name: self._visit(nodes[name]) for name in measurers}
        try:
            await asyncio.gather(*(self._begin(visit) for visit in visits.values()))
            for pairs in rounds:
                while self.busy():
                    await self._clock.sleep(_BUSY_S)
                await asyncio.gather(
                    *(self._measure(visits[one], nodes[one], nodes[other]) for one, other in pairs)
                )
                await self._clock.sleep(_PAUSE_S)
        finally:
            await asyncio.gather(*(visit.end() for visit in visits.values()))
        self._tell(rounds)
        await self._changed()

    async def _begin(self, visit: NodeVisit) -> None:
        with contextlib.suppress(OSError, OServeError):
            await visit.begin()

    async def _measure(self, visit: NodeVisit, one: ClusterNode, other: ClusterNode) -> None:
        if other.hatch is None:
            return
        if visit.open:
            found = await measured_link(
                visit, other.name, other.hatch, bandwidth=True, limit_s=_PAIR_S
            )
        else:
            found = LinkFacts(target=other.name, error=f"node {one.name} could not be visited")
        self._book.learn(one.name, found, self._unix_s())

    def _tell(self, rounds: Sequence[Sequence[tuple[str, str]]]) -> None:
        count = sum(len(pairs) for pairs in rounds)
        network = self._book.network()
        if network is not None:
            _log.info(
                "%d links between nodes were measured; the median is %.2f ms there and back, %s",
                count,
                2e3 * network.latency_s,
                f"{network.bandwidth / 1e6:,.0f} MB/s",
            )
