"""Examines the nodes of a cluster, each by an examiner that its keeper holds for a while.

It leaves what runs there alone, whatever its version.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence

import msgspec

from oserve.core import OServeError
from oserve.engines.dial import LOCAL_NODE
from oserve.nodes.checks import measuring_rounds
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import (
    ClockFacts,
    FactsQuery,
    MachineFacts,
    NodeExamination,
    TimeQuery,
    TimeReply,
)
from oserve.nodes.machine import examine_machine
from oserve.nodes.visit import NodeVisit, measured_link

MOST_PAIRS = 64
_CLOCK_TRIPS = 8
_FACTS_S = 180.0
_TIME_S = 5.0


def examine_here(model: str) -> list[NodeExamination]:
    """This machine, without a cluster."""
    return [NodeExamination(node=LOCAL_NODE, machine=examine_machine(model))]


class _Patient:
    """A node under examination. ``end`` ends its examiner."""

    def __init__(self, node: ClusterNode) -> None:
        self.node = node
        self.found = NodeExamination(node=node.name, devices=len(node.devices))
        self.visit = NodeVisit(node, purpose="doctor")

    async def examine(self, model: str) -> None:
        """Its facts and its clock."""
        try:
            await self.visit.begin()
            self.found = msgspec.structs.replace(self.found, engines=self.visit.engines)
            machine = await self.visit.ask(FactsQuery(model=model), MachineFacts, _FACTS_S)
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
            told = await self.visit.ask(TimeQuery(), TimeReply, _TIME_S)
            after_s = time.time()
            within_s = abs(after_s - before_s) / 2
            if within_s < best.within_s:
                best = ClockFacts(ahead_s=told.unix_s - (before_s + after_s) / 2, within_s=within_s)
        return best

    async def measure(self, other: "_Patient", *, bandwidth: bool, limit_s: float) -> None:
        """The way from this node to the other."""
        if other.node.hatch is None or not self.visit.open:
            return
        link = await measured_link(
            self.visit, other.node.name, other.node.hatch, bandwidth=bandwidth, limit_s=limit_s
        )
        self.found = msgspec.structs.replace(self.found, links=(*self.found.links, link))

    async def end(self) -> None:
        """The examiner ends with its visitor."""
        await self.visit.end()


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
        well = [name for name, patient in patients.items() if patient.visit.open]
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
