"""vLLM's objects as far as the KV connector uses them, as protocols; members as in vLLM 0.32."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class CacheModelConfig(Protocol):
    """vLLM's ``ModelConfig``."""

    dtype: object
    quantization: str | None

    def get_total_num_kv_heads(self) -> int: ...

    def get_head_size(self) -> int: ...


class CacheParallelConfig(Protocol):
    """vLLM's ``ParallelConfig``; ``rank`` is that of this worker."""

    rank: int
    tensor_parallel_size: int
    pipeline_parallel_size: int


class CacheBlockConfig(Protocol):
    """vLLM's ``CacheConfig``; ``block_size`` is in tokens."""

    block_size: int
    cache_dtype: str


class ConnectorConfig(Protocol):
    """vLLM's ``VllmConfig``."""

    model_config: CacheModelConfig
    parallel_config: CacheParallelConfig
    cache_config: CacheBlockConfig


class ScheduledRequest(Protocol):
    """vLLM's ``Request`` in the scheduler. ``kv_transfer_params`` is what the client has sent."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    kv_transfer_params: Mapping[str, object] | None


class RequestBlocks(Protocol):
    """vLLM's ``KVCacheBlocks``; block ids by group of layers."""

    def get_block_ids(self) -> Sequence[Sequence[int]]: ...


class StepPlan(Protocol):
    """vLLM's ``SchedulerOutput``."""

    total_num_scheduled_tokens: int


class StepResult(Protocol):
    """vLLM's ``KVConnectorOutput``; ids of requests."""

    finished_sending: set[str] | None
    finished_recving: set[str] | None


class TensorSlice(Protocol):
    """A tensor of a safetensors file, of which parts are read by index."""

    def get_shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: tuple[slice, ...]) -> object: ...
