"""Measures the links between nodes in the background, when nodes come up and then once a day.

A pair takes a fraction of a second, no node is in two pairs at a time, and rounds have pauses
between them, so that streams of tokens are hardly held up.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from oserve.core import Clock, OServeError
from oserve.nodes.directory import ClusterNode
from oserve.nodes.due_work import DueWork
from oserve.nodes.examination import LinkFacts
from oserve.nodes.link_book import LinkBook
from oserve.nodes.visit import NodeVisit, measured_link

_log = logging.getLogger("oserve.nodes")

# Several nodes come up together.
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
        self._work = DueWork(
            self.measure,
            clock,
            fault="the links between nodes could not be measured",
            settle_s=_SETTLE_S,
            every_s=_LOOK_S,
        )

    @property
    def idle(self) -> bool:
        """Whether all is measured that can be measured now."""
        return self._work.idle

    def begin(self) -> None:
        """Measure from now on."""
        self._work.begin()

    def refresh(self) -> None:
        """A node has come up, or is down."""
        self._work.refresh()

    async def close(self) -> None:
        """Measure no more."""
        await self._work.close()

    async def measure(self) -> None:
        """Measure what is due, up to where something else needs the links."""
        while self.busy():
            await self._clock.sleep(_BUSY_S)
        nodes, now_s = dict(self._up()), self._unix_s()
        self._since = {name: self._since.get(name, now_s) for name in nodes}
        rounds = self._book.due(self._since, now_s)[:_MOST_ROUNDS]
        if not rounds:
            return
        measurers = {one for pairs in rounds for one, _ in pairs}
        visits = {name: self._visit(nodes[name]) for name in measurers}
        done = 0
        try:
            await asyncio.gather(*(self._begin(visit) for visit in visits.values()))
            for pairs in rounds:
                if self.busy():
                    # The visits do not wait: examiners end after a while.
                    self._work.refresh()
                    break
                await asyncio.gather(
                    *(self._measure(visits[one], nodes[one], nodes[other]) for one, other in pairs)
                )
                done += len(pairs)
                await self._clock.sleep(_PAUSE_S)
        finally:
            await asyncio.gather(*(visit.end() for visit in visits.values()))
        if done:
            self._tell(done)
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
        if found.error and not {one.name, other.name} <= self._up().keys():
            return  # of a node that is down, which says nothing of the link
        self._book.learn(one.name, found, self._unix_s())

    def _tell(self, count: int) -> None:
        network = self._book.network()
        if network is not None:
            _log.info(
                "%d links between nodes were measured; the median is %.2f ms there and back, %s",
                count,
                2e3 * network.latency_s,
                f"{network.bandwidth / 1e6:,.0f} MB/s",
            )
