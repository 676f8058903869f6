"""Memory use: weights per device, KV cache bytes per token, KV cache tokens per replica."""

import math
from dataclasses import dataclass

from oserve.core import Precision, ReplicaShape
from oserve.perf.model import ModelFacts
from oserve.perf.roofline import kv_bytes_per_value, weight_bytes

# The share of a device's memory that vLLM uses by default.
MEMORY_SHARE = 0.9
# An engine's memory besides weights, cache and activations: on a GPU its context, graphs and
# workspace; on CPU its processes, as measured for engines that a zygote forked.
GPU_ENGINE_BYTES = 2.0e9
CPU_ENGINE_BYTES = 0.7e9
_GROUP_BYTES = 0.5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Bytes per device, and one replica's KV cache in tokens; 0 if the weights do not fit."""

    weights_bytes: float
    reserve_bytes: float
    usable_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int

    @property
    def missing_bytes(self) -> float:
        """By how much weights and reserve exceed the usable memory; 0 if they fit."""
        return max(0.0, self.weights_bytes + self.reserve_bytes - self.usable_bytes)


def memory_fit(
    model: ModelFacts, shape: ReplicaShape, memory_bytes: float, *, share: float = MEMORY_SHARE
) -> MemoryFit:
    """The memory use of a replica whose engine may use ``share`` of ``memory_bytes`` per device.

    The fullest device counts: with pipeline parallelism that of the stage with the most layers and
    an embedding.
    """
    groups = shape.device_count > 1
    weights = weights_bytes(model, shape)
    reserve = activation_bytes(model, shape) + GPU_ENGINE_BYTES + (_GROUP_BYTES if groups else 0.0)
    per_token = kv_bytes_per_token(model, shape)
    usable = memory_bytes * share
    room = usable - weights - reserve
    if shape.kv_cache_memory_bytes is not None and room >= 0:
        room = float(shape.kv_cache_memory_bytes)
    return MemoryFit(
        weights_bytes=weights,
        reserve_bytes=reserve,
        usable_bytes=usable,
        kv_bytes_per_token=per_token,
        kv_tokens=max(0, int(room / per_token)),
    )


def weights_bytes(model: ModelFacts, shape: ReplicaShape) -> float:
    """The weights on the fullest device, that of the stage with most layers and an embedding."""
    plain = Precision.FP32 if shape.precision is Precision.FP32 else Precision.BF16
    embedding = model.vocab * model.hidden * weight_bytes(plain)
    # With one stage, a device holds both the embedding and the untied LM head.
    ends = embedding * (2 if shape.pipeline_parallel_size == 1 and not model.tied else 1)
    layers = _stage_layers(model, shape) * model.layer_parameters * weight_bytes(shape.precision)
    return (layers + ends) / shape.tensor_parallel_size


def activation_bytes(model: ModelFacts, shape: ReplicaShape) -> float:
    """The activations of a full step on one device."""
    wide = 4.0 if shape.precision is Precision.FP32 else 2.0
    up, tp = 3 if model.gated else 2, shape.tensor_parallel_size
    each = wide * (6 * model.hidden + up * model.intermediate / tp)
    logits = shape.max_num_seqs * model.vocab * 4.0 * 2 / tp
    return shape.max_num_batched_tokens * each + logits


def kv_bytes_per_token(model: ModelFacts, shape: ReplicaShape) -> float:
    """The KV cache per token on the fullest device; ranks beyond the KV heads hold copies."""
    kv_heads = max(1.0, model.kv_heads / shape.tensor_parallel_size)
    values = 2 * _stage_layers(model, shape) * kv_heads * model.head_dim
    return values * kv_bytes_per_value(shape.precision)


def _stage_layers(model: ModelFacts, shape: ReplicaShape) -> int:
    return math.ceil(model.layers / shape.pipeline_parallel_size)
