"""A visit to a node: an examiner that its keeper holds for as long as the visitor stays.

The visitor is a guest of the keeper: it leaves what runs there alone, whatever its version.
"""

import asyncio
import contextlib
import secrets
from typing import TypeVar

import msgspec

from oserve.core import HatchAddress, OServeError
from oserve.engines.dial import SILENCE_S
from oserve.engines.held_process import HeldProcess
from oserve.engines.keeper_connection import KeeperConnection, LineTerms
from oserve.engines.keeper_messages import MAX_LINE_BYTES as KEEPER_LINE_BYTES
from oserve.engines.keeper_messages import ProcessStart
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import (
    MAX_LINE_BYTES,
    ExaminerOrders,
    LinkFacts,
    LinkQuery,
)
from oserve.nodes.fetch_messages import Query
from oserve.wire.hatch import KEEPER_NAME, HatchError, open_hatch

_GREETING_S = 10.0
_START_S = 30.0
_POLL_S = 0.1
_END_S = 2.0
_LINK_SPARE_S = 15.0
_Answer = TypeVar("_Answer")


class NodeVisit:
    """One visit to ``node``; ``end`` ends the examiner there.

    ``purpose`` begins the name of the examiner among the keeper's processes, and is that of its
    log. ``limit_s``: the examiner ends after so long in any case; ``nice``: see ``ExaminerOrders``.
    """

    def __init__(
        self, node: ClusterNode, *, purpose: str, limit_s: float = 600.0, nice: int = 0
    ) -> None:
        self.node = node
        self.engines = 0
        """The engines that ran there when the visit began."""
        self.name = f"{purpose}-{secrets.token_hex(4)}"
        self._purpose = purpose
        self._limit_s, self._nice = limit_s, nice
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._line: KeeperConnection | None = None
        self._process: HeldProcess | None = None

    @property
    def open(self) -> bool:
        """Whether the examiner can be asked."""
        return self._streams is not None

    async def begin(self) -> None:
        """Have the keeper start an examiner, and visit it. Raises OServeError, OSError."""
        hatch = self.node.hatch
        if hatch is None or not self.node.usable:
            raise OServeError(
                self.node.refused or self.node.lost or "it was never reached",
                place=f"node {self.node.name}",
                remedy="is the node up, and its hatch's port open to this machine?",
            )
        terms = LineTerms(
            node=self.node.name,
            place=f"node {self.node.name}",
            local=False,
            differs=lambda _hello: "",
            silence_s=SILENCE_S,
        )
        async with asyncio.timeout(_GREETING_S):
            streams = await open_hatch(hatch, KEEPER_NAME, limit=KEEPER_LINE_BYTES)
            line = self._line = await KeeperConnection.greeted(streams, terms)
        if line is None or not line.facts.python:
            raise OServeError(
                "its keeper is ending, or of another version",
                place=f"node {self.node.name}",
                remedy="install the same version of OServe on every node, and start the node again",
            )
        self.engines = sum(item.entry.engine for item in line.held.values())
        orders = ExaminerOrders(
            socket=f"{line.facts.folder}/{self.name}/api.sock",
            limit_s=self._limit_s,
            nice=self._nice,
        )
        process = self._process = line.hold(
            ProcessStart(
                name=self.name,
                argv=[line.facts.python, "-m", "oserve.nodes.examiner"],
                first_line=msgspec.json.encode(orders).decode(),
                log=f"{line.facts.logs}/{self._purpose}.log",
                grace_s=0.0,
            )
        )
        async with asyncio.timeout(_START_S):
            await process.begun()
            while self._streams is None:
                try:
                    self._streams = await open_hatch(
                        hatch, f"{self.name}/api.sock", limit=MAX_LINE_BYTES
                    )
                except HatchError:
                    if process.ended.done():
                        raise
                    await asyncio.sleep(_POLL_S)

    async def ask(self, query: Query, answer: type[_Answer], limit_s: float) -> _Answer:
        """One query to the examiner. Raises OSError; the visit is over then."""
        self.tell(query)
        return await self.heard(answer, limit_s)

    def tell(self, query: Query) -> None:
        """Send a query. Raises OSError if the visit is over."""
        if self._streams is None:
            raise ConnectionError("it is not examined")
        self._streams[1].write(msgspec.json.encode(query) + b"\n")

    async def heard(self, answer: type[_Answer], limit_s: float) -> _Answer:
        """The next answer. Raises OSError; the visit is over then."""
        if self._streams is None:
            raise ConnectionError("it is not examined")
        try:
            async with asyncio.timeout(limit_s):
                line = await self._streams[0].readline()
            return msgspec.json.decode(line, type=answer)
        except ValueError:
            self._break_off()
            reason = f"its examiner broke off; see {self._purpose}.log there"
            raise ConnectionError(reason) from None
        except (OSError, asyncio.CancelledError):
            self._break_off()
            raise

    def _break_off(self) -> None:
        # An answer that comes late must not be taken for that to the next query.
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None

    async def end(self) -> None:
        """The examiner ends with its visitor; one that was never reached is ended."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
        elif self._process is not None and self._line is not None:
            self._process.terminate()
            with contextlib.suppress(OSError, OServeError):
                async with asyncio.timeout(_END_S):
                    await self._process.wait()
        if self._line is not None:
            await self._line.part()
            self._line = None


async def measured_link(
    visit: NodeVisit, target: str, hatch: HatchAddress, *, bandwidth: bool, limit_s: float
) -> LinkFacts:
    """The way from a node that is visited to another one's hatch, as its examiner measures it."""
    query = LinkQuery(target=target, address=hatch, bandwidth=bandwidth, limit_s=limit_s)
    try:
        return await visit.ask(query, LinkFacts, limit_s + _LINK_SPARE_S)
    except OSError as error:
        return LinkFacts(target=target, error=str(error) or "no answer in time")
