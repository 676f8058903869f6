"""The links between nodes as they were measured, and which are to be measured next. Pure.

An echo goes there and back, so a link is that of a pair, whichever node measured it. In a large
cluster each node is measured with a few others; the others are taken for the median of those.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import msgspec

from oserve.nodes.checks import measuring_rounds
from oserve.nodes.examination import LinkFacts
from oserve.perf.device import Link

MEASURED: Final = "measured"
"""The name of a link that was measured, among those of the catalogue."""


_MOST_LINKS = 8192


class MeasuredLink(msgspec.Struct, frozen=True, kw_only=True):
    """The link of two nodes, ``one`` before ``other`` by name; ``at_s``: Unix time.

    ``bytes_per_s`` each way, a lower bound; ``round_trip_s``: of a small message. ``error``: why it
    could not be measured; both are 0 then.
    """

    one: str
    other: str
    at_s: float
    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPolicy:
    """When links are measured, in seconds.

    Each node is measured with ``partners`` others, if there are so many. A measurement holds for
    ``holds_s``, and one that failed for ``retry_s``. When a node comes up, what was measured more
    than ``fresh_s`` before counts no more.
    """

    partners: int = 8
    holds_s: float = 86400.0
    retry_s: float = 600.0
    fresh_s: float = 3600.0


class LinkBook:
    """The links of all pairs of nodes that were measured; ``links`` are those of an earlier one."""

    def __init__(
        self, links: Iterable[MeasuredLink] = (), *, policy: LinkPolicy | None = None
    ) -> None:
        self._policy = policy or LinkPolicy()
        self._links = {(link.one, link.other): link for link in links}
        self._rates: dict[tuple[str, str], float] | None = None
        self._summaries: dict[str, dict[str, Any]] = {}

    def links(self) -> tuple[MeasuredLink, ...]:
        """All of them, by the names of the nodes."""
        return tuple(self._links[pair] for pair in sorted(self._links))

    def learn(self, one: str, found: LinkFacts, now_s: float) -> None:
        """Add what ``one`` measured of its way to another node."""
        first, second = sorted((one, found.target))
        self._rates, self._summaries = None, {}
        self._links[first, second] = MeasuredLink(
            one=first,
            other=second,
            at_s=now_s,
            bytes_per_s=found.bytes_per_s,
            round_trip_s=found.round_trip_s,
            error=found.error,
        )
        if len(self._links) > _MOST_LINKS:  # nodes that never come back
            del self._links[min(self._links, key=lambda pair: self._links[pair].at_s)]

    def due(self, up: Mapping[str, float], now_s: float) -> list[list[tuple[str, str]]]:
        """The pairs to measure now, in rounds in which no node is in two pairs.

        ``up``: the nodes that can be measured, each with the time since when it is up.
        """
        names = sorted(up)
        wanted = min(self._policy.partners, len(names) - 1)
        settled = dict.fromkeys(names, 0)
        for one, other in self._links:
            if self._settled(one, other, up, now_s):
                settled[one] += 1
                settled[other] += 1
        rounds = []
        for pairs in measuring_rounds(names, len(names) ** 2):
            chosen = [
                pair
                for pair in pairs
                if min(settled[name] for name in pair) < wanted
                and not self._settled(min(pair), max(pair), up, now_s)
            ]
            for pair in chosen:
                for name in pair:
                    settled[name] += 1
            if chosen:
                rounds.append(chosen)
        return rounds

    def _settled(self, one: str, other: str, up: Mapping[str, float], now_s: float) -> bool:
        link = self._links.get((one, other))
        if link is None or one not in up or other not in up:
            return False
        policy = self._policy
        since_s = max(up[one], up[other])
        if link.at_s < since_s - policy.fresh_s:
            return False
        age_s = now_s - link.at_s
        # A clock that was set back makes no measurement last for ever.
        return abs(age_s) < (policy.retry_s if link.error else policy.holds_s)

    # -- what others make of them ---------------------------------------------------------------
    def rates(self) -> Mapping[tuple[str, str], float]:
        """Bytes per second from one node to another, of all pairs of nodes that were measured."""
        if self._rates is None:
            self._rates = _filled(self._measured())
        return self._rates

    def network(self) -> Link | None:
        """The link between two nodes of which nothing else is known; ``None``: none was measured.

        The medians; the latency is half of a round trip.
        """
        known = self._measured()
        if not known:
            return None
        return Link(
            name=MEASURED,
            bandwidth=median(link.bytes_per_s for link in known),
            latency_s=median(link.round_trip_s for link in known) / 2,
        )

    def summary(self, node: str) -> dict[str, Any]:
        """The links of one node as JSON values: how many were measured, medians, the slowest.

        ``failed``: the nodes to which none could be measured.
        """
        if node not in self._summaries:
            own = [link for link in self.links() if node in {link.one, link.other}]
            known = [link for link in own if link.bytes_per_s > 0]
            slowest = min(known, key=lambda link: link.bytes_per_s, default=None)
            self._summaries[node] = {
                "measured": len(known),
                "bytes_per_s": median(link.bytes_per_s for link in known) if known else 0.0,
                "round_trip_s": median(link.round_trip_s for link in known) if known else 0.0,
                "slowest": "" if slowest is None else _opposite(slowest, node),
                "slowest_bytes_per_s": 0.0 if slowest is None else slowest.bytes_per_s,
                "failed": [_opposite(link, node) for link in own if link.error],
            }
        return self._summaries[node]

    def _measured(self) -> list[MeasuredLink]:
        return [link for link in self.links() if link.bytes_per_s > 0]


def _opposite(link: MeasuredLink, node: str) -> str:
    return link.other if link.one == node else link.one


def _filled(known: Sequence[MeasuredLink]) -> dict[tuple[str, str], float]:
    """The rates both ways. Those of other pairs are the least median of their two nodes."""
    own: dict[str, list[float]] = {}
    for link in known:
        for name in (link.one, link.other):
            own.setdefault(name, []).append(link.bytes_per_s)
    typical = {name: median(rates) for name, rates in own.items()}
    found = {
        (one, other): min(typical[one], typical[other])
        for one in sorted(typical)
        for other in sorted(typical)
        if one != other
    }
    for link in known:
        found[link.one, link.other] = found[link.other, link.one] = link.bytes_per_s
    return found
