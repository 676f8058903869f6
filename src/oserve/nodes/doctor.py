"""Examines the nodes of a cluster, each by an examiner that its keeper holds for a while.

The doctor is a guest of the keepers: it leaves what runs there alone, whatever its version.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from oserve.core import OServeError
from oserve.engines.dial import LOCAL_NODE, SILENCE_S
from oserve.engines.keeper_connection import KeeperConnection, LineTerms
from oserve.engines.keeper_messages import MAX_LINE_BYTES as KEEPER_LINE_BYTES
from oserve.engines.keeper_messages import ProcessStart
from oserve.nodes.checks import measuring_rounds
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import (
    MAX_LINE_BYTES,
    ClockFacts,
    ExaminerOrders,
    FactsQuery,
    LinkFacts,
    LinkQuery,
    MachineFacts,
    NodeExamination,
    Query,
    TimeQuery,
    TimeReply,
)
from oserve.nodes.machine import examine_machine
from oserve.wire.hatch import KEEPER_NAME, HatchError, open_hatch

MOST_PAIRS = 64
_CLOCK_TRIPS = 8
_START_S = 30.0
_POLL_S = 0.1
_FACTS_S = 180.0
_TIME_S = 5.0
_LINK_SPARE_S = 15.0
_Answer = TypeVar("_Answer", MachineFacts, LinkFacts, TimeReply)


def examine_here(model: str) -> list[NodeExamination]:
    """This machine, without a cluster."""
    return [NodeExamination(node=LOCAL_NODE, machine=examine_machine(model))]


class _Patient:
    """A node under examination. ``end`` ends its examiner."""

    def __init__(self, node: ClusterNode) -> None:
        self.node = node
        self.found = NodeExamination(node=node.name, devices=len(node.devices))
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._line: KeeperConnection | None = None

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
        streams = await open_hatch(hatch, KEEPER_NAME, limit=KEEPER_LINE_BYTES)
        line = self._line = await KeeperConnection.greeted(streams, terms)
        if line is None or not line.facts.python:
            raise OServeError(
                "its keeper is ending, or of another version",
                place=f"node {self.node.name}",
                remedy="install the same version of OServe on every node, and start the node again",
            )
        engines = sum(item.entry.engine for item in line.held.values())
        self.found = msgspec.structs.replace(self.found, engines=engines)
        name = f"doctor-{secrets.token_hex(4)}"
        orders = ExaminerOrders(socket=f"{line.facts.folder}/{name}/api.sock")
        process = line.hold(
            ProcessStart(
                name=name,
                argv=[line.facts.python, "-m", "oserve.nodes.examiner"],
                first_line=msgspec.json.encode(orders).decode(),
                log=f"{line.facts.logs}/doctor.log",
                grace_s=0.0,
            )
        )
        async with asyncio.timeout(_START_S):
            await process.begun()
            while self.streams is None:
                try:
                    self.streams = await open_hatch(hatch, f"{name}/api.sock", limit=MAX_LINE_BYTES)
                except HatchError:
                    if process.ended.done():
                        raise
                    await asyncio.sleep(_POLL_S)

    async def ask(self, query: Query, answer: type[_Answer], limit_s: float) -> _Answer:
        """One query to its examiner. Raises OSError."""
        if self.streams is None:
            raise ConnectionError("it is not examined")
        reader, writer = self.streams
        writer.write(msgspec.json.encode(query) + b"\n")
        try:
            async with asyncio.timeout(limit_s):
                return msgspec.json.decode(await reader.readline(), type=answer)
        except ValueError:
            raise ConnectionError("its examiner broke off; see doctor.log there") from None

    async def examine(self, model: str) -> None:
        """Its facts and its clock."""
        try:
            await self.begin()
            machine = await self.ask(FactsQuery(model=model), MachineFacts, _FACTS_S)
            clock = await self._clock()
            self.found = msgspec.structs.replace(self.found, machine=machine, clock=clock)
        except (OSError, OServeError) as error:
            known = isinstance(error, OServeError)
            self.found = msgspec.structs.replace(
                self.found,
                unreached=(error.message if isinstance(error, OServeError) else str(error))
                or "it did not answer in time",
                remedy=error.remedy if known and isinstance(error, OServeError) else "",
            )

    async def _clock(self) -> ClockFacts:
        """The clock's offset by the quickest of a few round trips."""
        best = ClockFacts(ahead_s=0.0, within_s=float("inf"))
        for _ in range(_CLOCK_TRIPS):
            before_s = time.time()
            told = await self.ask(TimeQuery(), TimeReply, _TIME_S)
            after_s = time.time()
            within_s = abs(after_s - before_s) / 2
            if within_s < best.within_s:
                best = ClockFacts(ahead_s=told.unix_s - (before_s + after_s) / 2, within_s=within_s)
        return best

    async def measure(self, other: "_Patient", *, bandwidth: bool, limit_s: float) -> None:
        """The way from this node to the other."""
        hatch = other.node.hatch
        if hatch is None or self.streams is None:
            return
        query = LinkQuery(
            target=other.node.name, address=hatch, bandwidth=bandwidth, limit_s=limit_s
        )
        try:
            link = await self.ask(query, LinkFacts, limit_s + _LINK_SPARE_S)
        except OSError as error:
            link = LinkFacts(target=other.node.name, error=str(error) or "no answer in time")
            self.streams[1].transport.abort()
            self.streams = None
        self.found = msgspec.structs.replace(self.found, links=(*self.found.links, link))

    async def end(self) -> None:
        """The examiner ends with its visitor."""
        if self.streams is not None:
            self.streams[1].close()
        if self._line is not None:
            await self._line.part()


async def examine_nodes(
    nodes: Mapping[str, ClusterNode],
    model: str = "",
    *,
    most_pairs: int = MOST_PAIRS,
    limit_s: float = 1.0,
) -> Sequence[NodeExamination]:
    """Every node, and the links of at most so many pairs, a round of pairs at a time.

    Of a pair the rate is measured one way, since an echo goes both, and the delay both ways.
    """
    patients = {name: _Patient(node) for name, node in sorted(nodes.items())}
    try:
        await asyncio.gather(*(patient.examine(model) for patient in patients.values()))
        well = [name for name, patient in patients.items() if patient.streams is not None]
        for pairs in measuring_rounds(well, most_pairs):
            for turned in (False, True):
                await asyncio.gather(
                    *(
                        patients[other if turned else one].measure(
                            patients[one if turned else other],
                            bandwidth=not turned,
                            limit_s=limit_s / 5 if turned else limit_s,
                        )
                        for one, other in pairs
                    )
                )
        return [patient.found for patient in patients.values()]
    finally:
        await asyncio.gather(*(patient.end() for patient in patients.values()))
