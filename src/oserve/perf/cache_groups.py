"""How vLLM lays out the caches of hybrid models, and so what a request of a length takes.

Layers with equal caches form groups of equal size; each group draws blocks from one pool, whose
blocks are as large as a group's layers. A layer group that is not full wastes the rest of its
blocks. Where page sizes differ, the smaller ones get longer blocks or padding, and states
lengthen the blocks of attention until these are as large. Follows vllm/v1/core/kv_cache_utils.py
(0.32): ``unify_kv_cache_spec_page_size`` and ``_get_kv_cache_groups_uniform_page_size``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oserve.perf.layers import Cache, CacheKind, LayerKind

# Fewer than 1.5 times as many layers are padded to one group rather than split.
_PADDED = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    """Layers with equal caches; ``tokens`` a block, ``size`` bytes a block of one layer."""

    cache: Cache
    count: int
    tokens: int
    size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroups:
    """The block tables of a model on one rank: ``(cache, tokens a block, tables)`` each.

    ``block_bytes``: of one block of the pool. Made by ``cache_groups``.
    """

    tables: tuple[tuple[Cache, int, int], ...]
    block_bytes: float

    def request_bytes(self, tokens: float, in_flight_tokens: int = 0) -> float:
        """Bytes that one request of ``tokens`` holds at most.

        ``in_flight_tokens``: scheduled at once, which windows hold besides themselves.
        """
        blocks = sum(
            tables * _blocks(cache, size, tokens, in_flight_tokens)
            for cache, size, tables in self.tables
        )
        return blocks * self.block_bytes


def cache_groups(
    kinds: Sequence[LayerKind],
    *,
    value_bytes: float,
    tensor_parallel_size: int = 1,
    block_tokens: int = 16,
) -> CacheGroups:
    """The groups of the layers that one rank holds; ``value_bytes`` is the cache's type."""
    counts: dict[Cache, int] = {}
    for kind in kinds:
        if kind.count and (kind.cache.kind.by_token or kind.cache.kind.fixed):
            counts[kind.cache] = counts.get(kind.cache, 0) + kind.count
    if not counts:
        return CacheGroups(tables=(), block_bytes=0.0)
    token = {cache: cache.token_bytes(value_bytes, tensor_parallel_size) for cache in counts}
    state = {cache: cache.state_bytes(value_bytes, tensor_parallel_size) for cache in counts}
    if len({(cache.kind, cache.window) for cache in counts}) == 1:
        # One kind of cache: one table for all, whatever the sizes of the layers.
        cache = next(iter(counts))
        size = sum(
            count * (state[one] or block_tokens * token[one]) for one, count in counts.items()
        )
        return CacheGroups(tables=((cache, block_tokens, 1),), block_bytes=size)
    if any(state.values()) and any(token.values()):
        block_tokens = _aligned(block_tokens, max(state.values()), max(token.values()))
    pages = [
        _Page(
            cache=cache,
            count=count,
            tokens=block_tokens,
            size=state[cache] or block_tokens * token[cache],
        )
        for cache, count in counts.items()
    ]
    largest = max(page.size for page in pages)
    longer = [_unified(page, largest) for page in pages]
    least, most = min(page.count for page in pages), max(page.count for page in pages)
    group = most if most < least * _PADDED else least
    return CacheGroups(
        tables=tuple((page.cache, page.tokens, math.ceil(page.count / group)) for page in longer),
        block_bytes=group * largest,
    )


def _aligned(block_tokens: int, state: float, token: float) -> int:
    """The tokens a block with which attention's page is no smaller than a state's."""
    return max(block_tokens, block_tokens * math.ceil(state / (block_tokens * token)))


def _unified(page: _Page, largest: float) -> _Page:
    ratio = largest / page.size
    longer = int(ratio) if page.cache.kind.by_token and ratio == int(ratio) else 1
    return _Page(cache=page.cache, count=page.count, tokens=page.tokens * longer, size=largest)


def _blocks(cache: Cache, size: int, tokens: float, in_flight: int) -> int:
    if cache.kind.fixed:
        return 1
    if cache.kind is CacheKind.WINDOW:
        return math.ceil(min(cache.window - 1 + in_flight, tokens) / size) + 1
    if cache.kind is CacheKind.CHUNK:
        return math.ceil(min(cache.window + in_flight, tokens) / size)
    return math.ceil(tokens / size)
