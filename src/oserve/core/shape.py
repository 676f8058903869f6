"""Devices and replica shapes."""

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """How a replica holds its weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Role(StrEnum):
    """What part of a request a replica computes."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one slot of CPU cores.

    ``cores`` lists the CPU cores of a slot (empty for an accelerator); ``memory_bytes`` is what
    weights and KV cache may fill, 0 when unknown.
    """

    id: str
    kind: str
    node: str = "local"
    memory_bytes: int = 0
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """Everything that decides what one replica can do; two replicas of one shape are alike.

    ``max_num_batched_tokens`` is the chunk budget: the tokens one engine step may compute.
    ``kv_cache_memory_bytes`` is per device; ``None`` leaves the engine to size it.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    precision: Precision = Precision.BF16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 128
    kv_cache_memory_bytes: int | None = None
    role: Role = Role.BOTH
    device_kind: str = "any"

    @property
    def device_count(self) -> int:
        """Devices one replica of this shape takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def step_tokens(self) -> int:
        """Tokens that the steps under way hold at most: a chunk budget in each stage."""
        return self.max_num_batched_tokens * self.pipeline_parallel_size

    @property
    def name(self) -> str:
        """Short label for tables and metrics, such as ``tp2-bf16-2048``."""
        parts = []
        if self.tensor_parallel_size > 1 or self.pipeline_parallel_size == 1:
            parts.append(f"tp{self.tensor_parallel_size}")
        if self.pipeline_parallel_size > 1:
            parts.append(f"pp{self.pipeline_parallel_size}")
        return f"{''.join(parts)}-{self.precision}-{self.max_num_batched_tokens}"
