"""Devices and replica shapes."""

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """The number format of a replica's weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Role(StrEnum):
    """The part of a request that a replica computes."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one slot of CPU cores.

    ``cores`` lists the CPU cores of a slot (empty for an accelerator); ``memory_bytes`` is the
    memory available to weights and KV cache, 0 when unknown. ``uuid`` is that of a GPU, the same
    whatever a process may see of its machine; empty when unknown.
    """

    id: str
    kind: str
    node: str = "local"
    memory_bytes: int = 0
    cores: tuple[int, ...] = ()
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """Everything that determines a replica's performance; replicas of one shape are equivalent.

    ``max_num_batched_tokens`` is the chunk budget: the tokens that one engine step may compute.
    ``kv_cache_memory_bytes`` is per device; with ``None`` the engine sizes the cache.
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
        """The number of devices of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def step_tokens(self) -> int:
        """The most tokens in concurrent steps: one chunk budget per pipeline stage."""
        return self.max_num_batched_tokens * self.pipeline_parallel_size

    @property
    def name(self) -> str:
        """A short label for tables and metrics, such as ``tp2-bf16-2048``."""
        parts = []
        if self.tensor_parallel_size > 1 or self.pipeline_parallel_size == 1:
            parts.append(f"tp{self.tensor_parallel_size}")
        if self.pipeline_parallel_size > 1:
            parts.append(f"pp{self.pipeline_parallel_size}")
        return f"{''.join(parts)}-{self.precision}-{self.max_num_batched_tokens}"
