"""The facts of device kinds and of the links between devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import OServeError, Precision
from oserve.perf.catalogue import catalogue, nearest

# The batch of ``PowerFacts.decode_128_w``.
_BATCH = 128.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Bandwidth per device and direction in bytes/s, and the latency of an empty message in s."""

    name: str
    bandwidth: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerFacts:
    """Watts of one device: idle, with a process, decoding batches of 1 and 128, and its limit."""

    idle_w: float
    context_w: float
    decode_1_w: float
    decode_128_w: float
    max_w: float
    source: str = ""

    def decode_w(self, sequences: float) -> float:
        """Watts while decoding so many sequences per device, from ``context_w`` to ``max_w``."""
        if sequences <= 0:
            return self.context_w
        share = math.log2(sequences) / math.log2(_BATCH)
        power_w = self.decode_1_w + share * (self.decode_128_w - self.decode_1_w)
        return min(self.max_w, max(self.context_w, power_w))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """Peaks from a data sheet: operations per second by precision, bytes, bytes per second."""

    kind: str
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float]
    link: Link
    power: PowerFacts
    source: str = ""

    def peak_flops(self, precision: Precision) -> float:
        """Peak operations per second of matrix products at that precision.

        Devices widen 4-bit weights to 16 bits first, and 8-bit ones if they lack 8-bit units.
        """
        return self.flops.get(precision.value) or self.flops["bf16"]


def find_device(kind: str) -> DeviceFacts:
    """The facts of a device kind by name or alias; raises OServeError for an unknown one."""
    known = catalogue("devices")
    wanted = kind.lower().replace(" ", "-").replace("_", "-")
    for name, row in known.items():
        if wanted in {name.lower(), *(alias.lower() for alias in row["aliases"])}:
            return DeviceFacts(
                kind=name,
                memory_bytes=row["memory_bytes"],
                bandwidth=float(row["bandwidth"]),
                flops={key: float(peak) for key, peak in row["flops"].items() if peak is not None},
                link=find_link(row["link"]),
                power=PowerFacts(**row["power"], source=row["power_source"]),
                source=row["source"],
            )
    raise OServeError(
        f"nothing is known of the device {kind!r}",
        place="cluster",
        remedy="use one of: " + ", ".join(known) + nearest(kind, known),
    )


def find_link(name: str) -> Link:
    """A link by name; raises OServeError for an unknown one."""
    known = catalogue("links")
    if name not in known:
        raise OServeError(
            f"nothing is known of the link {name!r}",
            place="cluster",
            remedy="use one of: " + ", ".join(known) + nearest(name, known),
        )
    row = known[name]
    return Link(name=name, bandwidth=float(row["bandwidth"]), latency_s=float(row["latency_s"]))
