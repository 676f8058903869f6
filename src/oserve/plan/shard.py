"""Shards: the part of the model's weights on a device.

The model is a unit square: pipeline stages split one side, the layers; tensor-parallel ranks split
the other, the tensor dimension. Embeddings and the like are included.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import DeploymentPlan, Precision, ReplicaShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank of a replica: ``stage`` of ``stages`` and ``rank`` of ``ranks``."""

    stage: int
    stages: int
    rank: int
    ranks: int
    precision: Precision

    @property
    def share(self) -> float:
        """The fraction of the model's weights in the shard."""
        return 1.0 / (self.stages * self.ranks)

    def overlap(self, other: "Shard") -> float:
        """The fraction of the model's weights in both shards; 0 across precisions."""
        if self.precision is not other.precision:
            return 0.0
        layers = _common(self.stage, self.stages, other.stage, other.stages)
        return layers * _common(self.rank, self.ranks, other.rank, other.ranks)


def shards_of(shape: ReplicaShape) -> tuple[Shard, ...]:
    """The shards of a replica in the order of its devices: by stage, then by rank."""
    return tuple(
        Shard(
            stage=stage,
            stages=shape.pipeline_parallel_size,
            rank=rank,
            ranks=shape.tensor_parallel_size,
            precision=shape.precision,
        )
        for stage in range(shape.pipeline_parallel_size)
        for rank in range(shape.tensor_parallel_size)
    )


def shards_held(plan: DeploymentPlan | None) -> Mapping[str, Shard]:
    """The shard on each device of the plan, by device id."""
    held: dict[str, Shard] = {}
    for spec in plan.replicas if plan else ():
        held.update(zip(spec.devices, shards_of(spec.shape), strict=False))
    return held


def _common(part: int, parts: int, other: int, others: int) -> float:
    """The overlap of [part / parts, (part + 1) / parts) with the other such interval."""
    # Integers until the last division, so that equal intervals overlap exactly.
    end = min((part + 1) * others, (other + 1) * parts)
    return max(0, end - max(part * others, other * parts)) / (parts * others)
