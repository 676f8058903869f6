"""The size of an engine's KV cache, and what does not fit, from memory, model and context.

vLLM starts only if its cache holds one request of the whole context, so that is the minimum. A
larger cache lets requests run concurrently: OServe gives up to the size of ``_REQUESTS`` such
requests, within half of the memory, since a switch starts new engines beside the serving ones. All
shapes of a server get one size, in bytes per device. Pure: the caller passes in the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oserve.core import ReplicaShape
from oserve.perf.memory import (
    MEMORY_SHARE,
    activation_bytes,
    groups_of,
    kv_bytes_per_token,
    weights_bytes,
)
from oserve.perf.model import ModelFacts

_REQUESTS = 8
_STEADY_SHARE = 0.5
# For a model of unknown sizes: this share of the memory, within bounds.
_BLIND_SHARE = 0.2
_BLIND_LEAST, _BLIND_MOST = 64 << 20, 4 << 30
# The largest block size of vLLM (its default on CPU), and the one block that it reserves.
BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """The memory of one device of an engine, and its uses besides weights and cache.

    ``device_bytes``: available memory. ``copies``: copies of the weights (two on CPU if raw weights
    are kept). ``engine_bytes``: memory of the process. ``context_tokens``: the longest request.
    """

    model: ModelFacts
    context_tokens: int
    device_bytes: float
    copies: int = 1
    engine_bytes: float = 0.0

    def fixed_bytes(self, shape: ReplicaShape) -> float:
        """The bytes on a device of all but the KV cache."""
        weights = self.copies * weights_bytes(self.model, shape)
        return weights + activation_bytes(self.model, shape) + self.engine_bytes

    def request_bytes(self, shape: ReplicaShape, context_tokens: int | None = None) -> int:
        """The KV cache on a device of one request of the whole context, in bytes."""
        context = self.context_tokens if context_tokens is None else context_tokens
        if self.model.kinds:
            groups = groups_of(self.model, shape, BLOCK_TOKENS)
            chunk = shape.max_num_batched_tokens
            return math.ceil(groups.request_bytes(context, chunk) + groups.block_bytes)
        tokens = BLOCK_TOKENS * (math.ceil(context / BLOCK_TOKENS) + 1)
        return math.ceil(tokens * kv_bytes_per_token(self.model, shape))

    def held_tokens(self, shape: ReplicaShape, cache_bytes: float) -> int:
        """The longest context that fits a cache of that size; 0 if none does."""
        if self.model.kinds:
            return self._held(shape, cache_bytes)
        blocks = int(cache_bytes / (BLOCK_TOKENS * kv_bytes_per_token(self.model, shape)))
        return max(0, BLOCK_TOKENS * (blocks - 1))

    def _held(self, shape: ReplicaShape, cache_bytes: float) -> int:
        """By bisection, as windows and states make the size uneven."""
        least, most = 0, math.ceil(self.model.max_model_len / BLOCK_TOKENS)
        while least < most:
            middle = (least + most + 1) // 2
            if self.request_bytes(shape, middle * BLOCK_TOKENS) <= cache_bytes:
                least = middle
            else:
                most = middle - 1
        return least * BLOCK_TOKENS

    def room_bytes(self, shape: ReplicaShape, share: float = MEMORY_SHARE) -> float:
        """The bytes left for the cache of an engine that may use ``share`` of the device.

        May be negative.
        """
        return self.device_bytes * share - self.fixed_bytes(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """``cache_bytes`` per device for engines of the shapes that fit; 0 if none does."""

    cache_bytes: int
    fitting: tuple[ReplicaShape, ...]
    misfits: tuple[ReplicaShape, ...]


def cache_size(memory: EngineMemory, shapes: Sequence[ReplicaShape]) -> CacheSize:
    """One size for all shapes that can have it; those that cannot are told apart.

    Shapes are dropped from the one that misses most until the rest fits.
    """
    fitting = [shape for shape in shapes if _least(memory, [shape]) <= memory.room_bytes(shape)]
    while fitting and _least(memory, fitting) > _room(memory, fitting):
        fitting.remove(min(fitting, key=memory.room_bytes))
    size = 0
    if fitting:
        least = _least(memory, fitting)
        size = _ample(least, _room(memory, fitting, _STEADY_SHARE))
    kept = set(fitting)
    return CacheSize(
        cache_bytes=size,
        fitting=tuple(fitting),
        misfits=tuple(shape for shape in shapes if shape not in kept),
    )


def shared_cache_bytes(
    memory: EngineMemory, shared_bytes: float, planned: Sequence[tuple[ReplicaShape, int]]
) -> int:
    """The cache size per device for shapes with their device counts, which share one memory.

    0 without shapes; otherwise at least the size of one request, even if that does not fit.
    """
    if not planned:
        return 0
    fixed = sum(count * memory.fixed_bytes(shape) for shape, count in planned)
    steady = (shared_bytes * _STEADY_SHARE - fixed) / sum(count for _, count in planned)
    return _ample(_least(memory, [shape for shape, _ in planned]), steady)


def blind_cache_bytes(device_bytes: float) -> int:
    """The cache size for a model of unknown sizes: a share of the memory."""
    return int(min(_BLIND_MOST, max(_BLIND_LEAST, device_bytes * _BLIND_SHARE)))


def _ample(least: int, steady: float) -> int:
    return max(least, min(_REQUESTS * least, int(steady)))


def _least(memory: EngineMemory, shapes: Sequence[ReplicaShape]) -> int:
    return max(memory.request_bytes(shape) for shape in shapes)


def _room(
    memory: EngineMemory, shapes: Sequence[ReplicaShape], share: float = MEMORY_SHARE
) -> float:
    return min(memory.room_bytes(shape, share) for shape in shapes)
