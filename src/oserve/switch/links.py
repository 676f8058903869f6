"""Links between devices, and how long a set of transfers keeps them busy.

Every device sends and receives over its own link (NVLink or PCIe); traffic between nodes also
passes the network ports of both. The two directions count separately. In this fluid model transfers
run at the same time, and their time is that of the busiest link. What a device copies to itself is
read and written in its own memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from oserve.core import Device, OServeError
from oserve.perf.device import Link, find_device


class Direction(StrEnum):
    """A direction of a device's own link, or of the network ports of a node."""

    DEVICE_OUT = "device out"
    DEVICE_IN = "device in"
    NODE_OUT = "node out"
    NODE_IN = "node in"
    BETWEEN = "between nodes"


# One direction of one link, by the device or node that it belongs to, or by both nodes.
LinkDirection = tuple[Direction, str]
# Between the names of two nodes, which have no spaces.
_ARROW = " -> "


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A device's place: node, bytes/s each way on its link, seconds per message, memory bytes/s."""

    node: str
    bandwidth: float
    latency_s: float
    memory_bandwidth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Devices by id and, for each node, the bytes per second it sends (and receives) outside.

    ``measured``: the bytes per second from one node to another, by (sender, receiver), where known.
    """

    ports: Mapping[str, Port]
    node_bandwidth: Mapping[str, float]
    node_latency_s: float
    measured: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def port(self, device: str) -> Port:
        """Return a device's port. Raises OServeError for an unknown device."""
        if device not in self.ports:
            raise OServeError(
                f"the device {device!r} is not in the cluster",
                place="plan.replicas",
                remedy="use one of: " + ", ".join(self.ports),
            )
        return self.ports[device]

    def ways(self, source: str, target: str) -> tuple[LinkDirection, ...]:
        """Return the links that a transfer between two devices passes."""
        own, other = self.port(source).node, self.port(target).node
        inside: tuple[LinkDirection, ...] = (
            (Direction.DEVICE_OUT, source),
            (Direction.DEVICE_IN, target),
        )
        if own == other:
            return inside
        outside = (*inside, (Direction.NODE_OUT, own), (Direction.NODE_IN, other))
        if (own, other) not in self.measured:
            return outside
        return (*outside, (Direction.BETWEEN, _ARROW.join((own, other))))

    def rate(self, way: LinkDirection) -> float:
        """Return bytes per second."""
        direction, owner = way
        if direction is Direction.BETWEEN:
            own, _, other = owner.partition(_ARROW)
            return self.measured[own, other]
        if direction in {Direction.NODE_OUT, Direction.NODE_IN}:
            return self.node_bandwidth[owner]
        return self.ports[owner].bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTraffic:
    """Bytes between devices, by (source, target), and inside devices."""

    pairs: Mapping[tuple[str, str], int]
    local: Mapping[str, int]

    @property
    def moved_bytes(self) -> int:
        """Bytes over links."""
        return sum(self.pairs.values())

    @property
    def local_bytes(self) -> int:
        """Bytes inside devices."""
        return sum(self.local.values())


def links_of(
    devices: Sequence[Device],
    network: Link,
    *,
    node_bandwidth: float | None = None,
    measured: Mapping[tuple[str, str], float] | None = None,
) -> Links:
    """Return links by device facts and the network's link, of which each device has a port.

    ``node_bandwidth`` (bytes/s one way) replaces the sum of a node's ports. ``measured``: see
    ``Links``; a node's ports carry at least what was measured from or to it.
    """
    ports: dict[str, Port] = {}
    outside: dict[str, float] = {}
    for device in devices:
        facts = find_device(device.kind)
        ports[device.id] = Port(
            node=device.node,
            bandwidth=facts.link.bandwidth,
            latency_s=facts.link.latency_s,
            memory_bandwidth=facts.bandwidth,
        )
        outside[device.node] = outside.get(device.node, 0.0) + network.bandwidth
    if node_bandwidth is not None:
        outside = dict.fromkeys(outside, node_bandwidth)
    known = {
        pair: rate
        for pair, rate in (measured or {}).items()
        if rate > 0 and outside.keys() >= set(pair)
    }
    for pair, rate in known.items():
        for node in pair:
            outside[node] = max(outside[node], rate)
    return Links(
        ports=ports, node_bandwidth=outside, node_latency_s=network.latency_s, measured=known
    )


def link_bytes(traffic: LinkTraffic, links: Links) -> dict[LinkDirection, float]:
    """Return the bytes on each direction of each link that is used."""
    loads: dict[LinkDirection, float] = {}
    for (source, target), size in traffic.pairs.items():
        for way in links.ways(source, target):
            loads[way] = loads.get(way, 0.0) + size
    return loads


def busy_s(traffic: LinkTraffic, links: Links) -> float:
    """Return the seconds until the busiest link is done, without latency."""
    loads = link_bytes(traffic, links)
    longest = max((size / links.rate(way) for way, size in loads.items()), default=0.0)
    return max(longest, local_s(traffic.local, links))


def local_s(local: Mapping[str, int], links: Links) -> float:
    """Return the seconds of the longest copy inside a device, which reads and writes each byte."""
    return max(
        (2 * size / links.port(device).memory_bandwidth for device, size in local.items()),
        default=0.0,
    )


def latency_s(pairs: Iterable[tuple[str, str]], links: Links) -> float:
    """Return the latency of messages: one batch per pair, one after the other on each device."""
    waits: dict[LinkDirection, float] = {}
    for source, target in pairs:
        own, other = links.port(source), links.port(target)
        inside = own.node == other.node
        each = max(own.latency_s, other.latency_s) if inside else links.node_latency_s
        for way in ((Direction.DEVICE_OUT, source), (Direction.DEVICE_IN, target)):
            waits[way] = waits.get(way, 0.0) + each
    return max(waits.values(), default=0.0)
