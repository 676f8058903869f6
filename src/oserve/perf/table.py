"""The resource-performance table: what one replica of each shape can do for each type."""

from dataclasses import dataclass

from oserve.core import ReplicaShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePerformance:
    """One row: a shape on its kind of device (``shape.device_kind``).

    ``capacity_rps[j]`` is the most requests per second of type ``j`` that the replica serves when
    it serves nothing else, within the SLOs; 0 where it cannot serve the type at all.
    ``latency_s[j]`` is the predicted seconds from arrival to last token of such a request at
    moderate load (infinite where the capacity is 0). ``power_w`` is what all its devices draw.
    """

    shape: ReplicaShape
    capacity_rps: tuple[float, ...]
    latency_s: tuple[float, ...]
    power_w: float = 0.0
