"""How much KV cache an engine is to get, and what does not fit: from memory, model and context.

vLLM starts only where one request of the whole context fits its cache, so that is the least. More
lets requests run side by side: up to that of ``_REQUESTS`` such requests is given, within half of
the memory, since a switch starts new engines beside those that serve. One size goes for all shapes
of a server, in bytes per device. Pure: memory is passed in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oserve.core import ReplicaShape
from oserve.perf.memory import (
    MEMORY_SHARE,
    activation_bytes,
    kv_bytes_per_token,
    weights_bytes,
)
from oserve.perf.model import ModelFacts

_REQUESTS = 8
_STEADY_SHARE = 0.5
# Of a model whose sizes nobody knows: this part of the memory, within bounds.
_BLIND_SHARE = 0.2
_BLIND_LEAST, _BLIND_MOST = 64 << 20, 4 << 30
# Largest block that vLLM cuts caches into (its own on CPU), and one block that it keeps back.
BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """What one device of an engine has, and what goes off it beside weights and cache.

    ``device_bytes`` are free to use. ``copies``: how often weights are held (twice on CPU where
    they are kept as loaded). ``engine_bytes``: of the process. ``context_tokens``: of the longest
    request.
    """

    model: ModelFacts
    context_tokens: int
    device_bytes: float
    copies: int = 1
    engine_bytes: float = 0.0

    def fixed_bytes(self, shape: ReplicaShape) -> float:
        """All but the cache, on a device."""
        weights = self.copies * weights_bytes(self.model, shape)
        return weights + activation_bytes(self.model, shape) + self.engine_bytes

    def request_bytes(self, shape: ReplicaShape, context_tokens: int | None = None) -> int:
        """Of KV cache on a device, for one request of the whole context."""
        context = self.context_tokens if context_tokens is None else context_tokens
        tokens = BLOCK_TOKENS * (math.ceil(context / BLOCK_TOKENS) + 1)
        return math.ceil(tokens * kv_bytes_per_token(self.model, shape))

    def held_tokens(self, shape: ReplicaShape, cache_bytes: float) -> int:
        """The longest context of which one request fits so large a cache; 0 for none."""
        blocks = int(cache_bytes / (BLOCK_TOKENS * kv_bytes_per_token(self.model, shape)))
        return max(0, BLOCK_TOKENS * (blocks - 1))

    def room_bytes(self, shape: ReplicaShape, share: float = MEMORY_SHARE) -> float:
        """For the cache of an engine that may take ``share`` of the device; may be negative."""
        return self.device_bytes * share - self.fixed_bytes(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """``cache_bytes`` per device for engines of the shapes that fit; 0 where none does."""

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
    """Per device, for shapes with the devices they take, all in one memory; 0 without any.

    Never less than one request needs, whether there is room for it or not.
    """
    if not planned:
        return 0
    fixed = sum(count * memory.fixed_bytes(shape) for shape, count in planned)
    steady = (shared_bytes * _STEADY_SHARE - fixed) / sum(count for _, count in planned)
    return _ample(_least(memory, [shape for shape, _ in planned]), steady)


def blind_cache_bytes(device_bytes: float) -> int:
    """For a model of which nothing is known: a part of the memory."""
    return int(min(_BLIND_MOST, max(_BLIND_LEAST, device_bytes * _BLIND_SHARE)))


def _ample(least: int, steady: float) -> int:
    return max(least, min(_REQUESTS * least, int(steady)))


def _least(memory: EngineMemory, shapes: Sequence[ReplicaShape]) -> int:
    return max(memory.request_bytes(shape) for shape in shapes)


def _room(
    memory: EngineMemory, shapes: Sequence[ReplicaShape], share: float = MEMORY_SHARE
) -> float:
    return min(memory.room_bytes(shape, share) for shape in shapes)
