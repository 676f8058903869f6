"""What fits: weights per device, bytes of KV cache per token, tokens of KV cache per replica."""

import math
from dataclasses import dataclass

from oserve.core import Precision, ReplicaShape
from oserve.perf.model import ModelFacts
from oserve.perf.roofline import kv_bytes_per_value, weight_bytes

# Share of a device's memory that vLLM uses by default.
MEMORY_SHARE = 0.9
# What an engine takes beside weights, cache and activations: runtime, graphs, communication.
_ENGINE_BYTES = 2.0e9
_GROUP_BYTES = 0.5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Bytes per device, and the tokens of KV cache that one replica holds; 0 if weights miss."""

    weights_bytes: float
    reserve_bytes: float
    usable_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int

    @property
    def missing_bytes(self) -> float:
        """By how much weights and reserve exceed what is usable; 0 if they fit."""
        return max(0.0, self.weights_bytes + self.reserve_bytes - self.usable_bytes)


def memory_fit(
    model: ModelFacts, shape: ReplicaShape, memory_bytes: float, *, share: float = MEMORY_SHARE
) -> MemoryFit:
    """Of a replica whose devices have ``memory_bytes`` each, of which the engine takes ``share``.

    The fullest device counts: with pipeline parallel the stage with most layers and an embedding.
    """
    precision = shape.precision
    plain = Precision.FP32 if precision is Precision.FP32 else Precision.BF16
    tp, pp = shape.tensor_parallel_size, shape.pipeline_parallel_size
    layers = math.ceil(model.layers / pp)
    embedding = model.vocab * model.hidden * weight_bytes(plain)
    # Both ends of an untied model lie on one device only if there is one stage.
    ends = embedding * (2 if pp == 1 and not model.tied else 1)
    weights = (layers * model.layer_parameters * weight_bytes(precision) + ends) / tp
    chunk, seqs = shape.max_num_batched_tokens, shape.max_num_seqs
    wide = 4.0 if precision is Precision.FP32 else 2.0
    up = 3 if model.gated else 2
    activations = chunk * wide * (6 * model.hidden + up * model.intermediate / tp)
    logits = seqs * model.vocab * 4.0 * 2 / tp
    reserve = activations + logits + _ENGINE_BYTES + (_GROUP_BYTES if tp * pp > 1 else 0.0)
    kv_heads = max(1.0, model.kv_heads / tp)
    per_token = 2 * layers * kv_heads * model.head_dim * kv_bytes_per_value(precision)
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
