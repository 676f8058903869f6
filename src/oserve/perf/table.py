"""The resource-performance table: the capacity of each replica shape for each workload type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from oserve.core import ReplicaShape, WorkloadType
from oserve.perf.capacity import Capacity, LatencyLimits, TypeLoad, capacities
from oserve.perf.power import ReplicaWork
from oserve.perf.roofline import StepModel
from oserve.perf.sequence_cache import SequenceCache

# The share of its capacity that a replica serves on average.
_BUSY = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePerformance:
    """One row: a shape on its kind of device (``shape.device_kind``).

    ``capacity_rps[j]`` is the largest rate of type ``j`` that the replica serves exclusively within
    the SLOs; 0 if it cannot serve the type. ``latency_s[j]`` is the predicted end-to-end latency at
    moderate load in seconds (infinite where the capacity is 0). ``power_w`` is the power of all its
    devices at a usual load, the mean over the types that it can serve. ``ttft_s``, ``tpot_s`` (at
    capacity) and ``bound_by`` (what bounds it) are per type.
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
        """Joules per request of a type at the usual load; infinite where it cannot be served."""
        rate = _BUSY * self.capacity_rps[index]
        return self.power_w / rate if rate > 0 else float("inf")


class PerformanceSource(Protocol):
    """A source of step times: the roofline, a profile, or another provider."""

    @property
    def origin(self) -> str:
        """The origin of the numbers, in words."""
        ...

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """What was not measured of these shapes, in words."""
        ...

    def step_model(self, shape: ReplicaShape) -> StepModel:
        """The step model of a shape on its device kind."""
        ...

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """A replica's KV cache in tokens; 0 if the weights do not fit."""
        ...

    def sequence_cache(self, shape: ReplicaShape) -> SequenceCache | None:
        """How sequences take the KV cache of a model whose layers differ; ``None``: by tokens."""
        ...

    def power_w(self, shape: ReplicaShape, work: ReplicaWork, seconds: float) -> float:
        """Mean watts of all devices of a started replica over ``seconds`` of such ``work``."""
        ...


def performance_table(
    source: PerformanceSource,
    shapes: Sequence[ReplicaShape],
    types: Sequence[WorkloadType],
    *,
    limits: Mapping[str, LatencyLimits] | None = None,
    longest_tokens: Mapping[str, float] | None = None,
) -> tuple[ShapePerformance, ...]:
    """A row per shape that holds the weights. ``limits`` and ``longest_tokens`` are by type name.

    ``longest_tokens`` is the total length of the longest request that a replica must hold.
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
        found = capacities(
            source.step_model(shape), shape, kv_tokens, loads, source.sequence_cache(shape)
        )
        rows.append(
            ShapePerformance(
                shape=shape,
                capacity_rps=tuple(item.capacity_rps for item in found),
                latency_s=tuple(item.latency_s for item in found),
                power_w=_power_w(source, shape, loads, found),
                ttft_s=tuple(item.ttft_s for item in found),
                tpot_s=tuple(item.tpot_s for item in found),
                bound_by=tuple(item.why for item in found),
                kv_tokens=kv_tokens,
            )
        )
    return tuple(rows)


def _power_w(
    source: PerformanceSource,
    shape: ReplicaShape,
    loads: Sequence[TypeLoad],
    found: Sequence[Capacity],
) -> float:
    """Mean power over the types, of a replica that is busy for ``_BUSY`` of the time."""
    powers = [
        source.power_w(shape, _second_at_capacity(shape, load, item), 1.0 / _BUSY)
        for load, item in zip(loads, found, strict=True)
        if item.capacity_rps > 0
    ]
    return sum(powers) / len(powers) if powers else source.power_w(shape, ReplicaWork(), 1.0)


def _second_at_capacity(shape: ReplicaShape, load: TypeLoad, item: Capacity) -> ReplicaWork:
    """What a replica does in a second at capacity, with a micro-batch in each stage."""
    steps = shape.pipeline_parallel_size / item.tpot_s if item.tpot_s > 0 else item.capacity_rps
    return ReplicaWork(
        busy_s=1.0,
        prompt_tokens=item.capacity_rps * load.prompt_tokens,
        generated_tokens=item.capacity_rps * load.output_tokens,
        steps=steps,
    )
