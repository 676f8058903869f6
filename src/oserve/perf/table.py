"""The resource-performance table: what one replica of each shape can do for each type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from oserve.core import ReplicaShape, WorkloadType
from oserve.perf.capacity import LatencyLimits, TypeLoad, capacities
from oserve.perf.roofline import StepModel

# Of the span between idle and full power that serving takes, on average.
_BUSY = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePerformance:
    """One row: a shape on its kind of device (``shape.device_kind``).

    ``capacity_rps[j]`` is the most requests per second of type ``j`` that the replica serves when
    it serves nothing else, within the SLOs; 0 where it cannot serve the type at all.
    ``latency_s[j]`` is the predicted seconds from arrival to last token of such a request at
    moderate load (infinite where the capacity is 0). ``power_w`` is what all its devices draw.
    ``ttft_s`` and ``tpot_s`` are those at capacity, ``bound_by`` says what bounds it; per type.
    """

    shape: ReplicaShape
    capacity_rps: tuple[float, ...]
    latency_s: tuple[float, ...]
    power_w: float = 0.0
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    bound_by: tuple[str, ...] = ()
    kv_tokens: int = 0

    def energy_j(self, index: int) -> float:
        """Joules per request of a type at capacity; infinite where it cannot be served."""
        rate = self.capacity_rps[index]
        return self.power_w / rate if rate > 0 else float("inf")


class PerformanceSource(Protocol):
    """Where step times come from: the roofline, a profile, or another provider."""

    @property
    def origin(self) -> str:
        """In words, for explanations."""
        ...

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """What is not measured of these shapes, in words."""
        ...

    def step_model(self, shape: ReplicaShape) -> StepModel:
        """Step times of a shape on its device kind."""
        ...

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """Tokens of KV cache a replica holds; 0 where the weights do not fit."""
        ...

    def power_w(self, shape: ReplicaShape, busy: float) -> float:
        """Watts that all devices of a replica draw, ``busy`` of the time computing."""
        ...


def performance_table(
    source: PerformanceSource,
    shapes: Sequence[ReplicaShape],
    types: Sequence[WorkloadType],
    *,
    limits: Mapping[str, LatencyLimits] | None = None,
    longest_tokens: Mapping[str, float] | None = None,
) -> tuple[ShapePerformance, ...]:
    """A row per shape that holds the weights. ``limits``, ``longest_tokens``: by type name.

    ``longest_tokens`` is prompt and output of the longest request that a replica must hold.
    """
    loads = [
        TypeLoad(
            prompt_tokens=kind.prompt_tokens,
            output_tokens=kind.output_tokens,
            limits=(limits or {}).get(kind.name, LatencyLimits()),
            longest_tokens=(longest_tokens or {}).get(kind.name, 0.0),
        )
        for kind in types
    ]
    rows = []
    for shape in shapes:
        kv_tokens = source.kv_tokens(shape)
        if kv_tokens <= 0:
            continue
        found = capacities(source.step_model(shape), shape, kv_tokens, loads)
        rows.append(
            ShapePerformance(
                shape=shape,
                capacity_rps=tuple(item.capacity_rps for item in found),
                latency_s=tuple(item.latency_s for item in found),
                power_w=source.power_w(shape, _BUSY),
                ttft_s=tuple(item.ttft_s for item in found),
                tpot_s=tuple(item.tpot_s for item in found),
                bound_by=tuple(item.why for item in found),
                kv_tokens=kv_tokens,
            )
        )
    return tuple(rows)
