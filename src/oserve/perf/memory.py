"""Memory use: weights per device, KV cache bytes per token, KV cache tokens per replica."""

import math
from dataclasses import dataclass, replace

from oserve.core import Precision, ReplicaShape
from oserve.perf.cache_groups import CacheGroups, cache_groups
from oserve.perf.layers import AS_IT_IS_BYTES, Part
from oserve.perf.model import ModelFacts
from oserve.perf.roofline import kv_bytes_per_value, weight_bytes
from oserve.perf.sequence_cache import SequenceCache, sequence_cache

# The share of a device's memory that vLLM uses by default.
MEMORY_SHARE = 0.9
# An engine's memory besides weights, cache and activations: on a GPU its context, graphs and
# workspace; on CPU its processes, as measured for engines that a zygote forked.
GPU_ENGINE_BYTES = 2.0e9
CPU_ENGINE_BYTES = 0.7e9
_GROUP_BYTES = 0.5e9
# Where a cache is not proportional to the tokens: the length at which it is stated.
USUAL_TOKENS = 8192
_GPU_BLOCK_TOKENS = 16
# A model without any cache is not limited by it.
_NO_CACHE_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """Bytes per device, and one replica's KV cache in tokens; 0 if the weights do not fit.

    ``cache``: of a model whose layers differ, how sequences take it.
    """

    weights_bytes: float
    reserve_bytes: float
    usable_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int
    cache: SequenceCache | None = None

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
    tokens = max(0, int(room / per_token)) if per_token else _NO_CACHE_TOKENS
    cache = _sequence_cache(model, shape, room)
    if cache is not None and cache.sequences(1, 1) < 1:
        tokens = 0
    return MemoryFit(
        weights_bytes=weights,
        reserve_bytes=reserve,
        usable_bytes=usable,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        cache=cache,
    )


def cache_of_tokens(
    model: ModelFacts, shape: ReplicaShape, kv_tokens: int, longest_tokens: int
) -> SequenceCache | None:
    """The cache of which an engine says that it holds so many tokens.

    vLLM states them for requests of the longest length. ``None`` for a plain model.
    """
    if not model.kinds or kv_tokens <= 0:
        return None
    longest = max(1, longest_tokens)
    taken = groups_of(model, shape).request_bytes(longest, shape.max_num_batched_tokens)
    return _sequence_cache(model, shape, kv_tokens * taken / longest)


def _sequence_cache(
    model: ModelFacts, shape: ReplicaShape, room_bytes: float
) -> SequenceCache | None:
    if not model.kinds:
        return None
    return sequence_cache(groups_of(model, shape), room_bytes, shape.max_num_batched_tokens)


def weights_bytes(model: ModelFacts, shape: ReplicaShape) -> float:
    """The weights on the fullest device, that of the stage with most layers and an embedding.

    Weight files, where they are there, correct the whole.
    """
    plain = weight_bytes(Precision.FP32 if shape.precision is Precision.FP32 else Precision.BF16)
    asked, tp = weight_bytes(shape.precision), shape.tensor_parallel_size
    as_it_is = asked == AS_IT_IS_BYTES
    stored = model.stored if as_it_is else None
    unit = 1 if stored is None else stored.expert_unit
    head, outer = (plain, plain) if stored is None else (stored.head_bytes, stored.outside_bytes)

    def layers(ranks: int) -> float:
        return sum(
            kind.count
            * kind.weight_bytes(asked, plain, tensor_parallel_size=ranks, expert_unit=unit)
            for kind in model.layer_kinds
        )

    embedding = model.vocab * model.hidden
    # With one stage, a device holds both the embedding and the untied LM head.
    ends = embedding * plain
    heads = 0.0 if model.tied else embedding * head
    outside = model.extra_parameters * outer
    share = _stage_layers(model, shape) / model.layers
    held = share * layers(tp) + (ends + outside) / tp
    held += heads / tp if shape.pipeline_parallel_size == 1 else 0.0
    if not model.file_bytes or not as_it_is:
        return held
    copies = sum(
        kind.count * one.parameters * plain
        for kind in model.layer_kinds
        for one in kind.matrices
        if one.part is Part.HELD
    )
    return held * model.file_bytes / (layers(1) - copies + ends + heads + outside)


def activation_bytes(model: ModelFacts, shape: ReplicaShape) -> float:
    """The activations of a full step on one device."""
    wide = 4.0 if shape.precision is Precision.FP32 else 2.0
    up, tp = 3 if model.gated else 2, shape.tensor_parallel_size
    each = wide * (6 * model.hidden + up * model.intermediate / tp)
    logits = shape.max_num_seqs * model.vocab * 4.0 * 2 / tp
    return shape.max_num_batched_tokens * each + logits


def kv_bytes_per_token(
    model: ModelFacts, shape: ReplicaShape, tokens: float | None = None
) -> float:
    """The KV cache per token on the fullest device; ranks beyond the KV heads hold copies.

    ``tokens``: the length of the request, on which it depends where layers have windows or states;
    ``USUAL_TOKENS`` or the model's context by default.
    """
    if not model.kinds:
        kv_heads = max(1.0, model.kv_heads / shape.tensor_parallel_size)
        values = 2 * _stage_layers(model, shape) * kv_heads * model.head_dim
        return values * kv_bytes_per_value(shape.precision)
    length = min(USUAL_TOKENS, model.max_model_len) if tokens is None else max(1.0, tokens)
    return groups_of(model, shape).request_bytes(length, shape.max_num_batched_tokens) / length


def groups_of(
    model: ModelFacts, shape: ReplicaShape, block_tokens: int = _GPU_BLOCK_TOKENS
) -> CacheGroups:
    """vLLM's cache groups on the fullest device, whose stage has its share of each kind."""
    stages = shape.pipeline_parallel_size
    return cache_groups(
        [replace(kind, count=math.ceil(kind.count / stages)) for kind in model.layer_kinds],
        value_bytes=kv_bytes_per_value(shape.precision),
        tensor_parallel_size=shape.tensor_parallel_size,
        block_tokens=block_tokens,
    )


def _stage_layers(model: ModelFacts, shape: ReplicaShape) -> int:
    return math.ceil(model.layers / shape.pipeline_parallel_size)
