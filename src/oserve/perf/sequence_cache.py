"""The blocks of a hybrid model's cache, and those that one sequence of a length takes.

A plain model's cache takes tokens in blocks of 16, whatever the request. Where layers have windows
or states, a sequence takes some blocks whatever its length, and further ones as it grows:
``CacheGroups`` says which.
"""

import math
from dataclasses import dataclass

import numpy as np

from oserve.perf.cache_groups import CacheGroups
from oserve.perf.layers import CacheKind
from oserve.perf.roofline import Floats

_PLAIN_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCache:
    """``blocks``: of one replica's pool.

    A sequence takes one of each of ``tables`` every ``block_tokens`` tokens; ``state_blocks``
    whatever its length; and in each of ``window_tables`` blocks of ``window_block_tokens`` for its
    tokens, at most ``window_tokens``.
    """

    blocks: int
    block_tokens: int = _PLAIN_BLOCK_TOKENS
    tables: int = 1
    state_blocks: int = 0
    window_tables: int = 0
    window_tokens: int = 0
    window_block_tokens: int = _PLAIN_BLOCK_TOKENS

    def sequence_blocks(self, tokens: Floats | float, whole: Floats | float) -> Floats:
        """Blocks of a sequence of ``tokens`` that will have ``whole``; arrays, or numbers.

        Windows are counted as they will be, as the simulator does.
        """
        grown = self.tables * np.ceil(np.asarray(tokens, dtype=np.float64) / self.block_tokens)
        seen = np.minimum(self.window_tokens, np.asarray(whole, dtype=np.float64))
        windows = self.window_tables * np.ceil(seen / self.window_block_tokens)
        blocks: Floats = grown + windows + self.state_blocks
        return blocks

    def sequences(self, tokens: Floats | float, whole: Floats | float) -> Floats:
        """Sequences of that length that fit at once, on average."""
        held: Floats = self.blocks / np.maximum(1.0, self.sequence_blocks(tokens, whole))
        return held

    @property
    def most_tokens(self) -> int:
        """The most tokens in it, of one sequence; 0 if there is no limit."""
        if not self.tables:
            return 0
        return max(0, self.blocks - self.state_blocks) // self.tables * self.block_tokens


def sequence_cache(
    groups: CacheGroups, room_bytes: float, in_flight_tokens: int
) -> SequenceCache | None:
    """The cache that ``groups`` make of so many bytes; ``None`` if there are no groups.

    ``in_flight_tokens``: scheduled at once, which windows hold besides themselves. Several windows
    are taken as one of the longest, and tables of longer blocks as a part of a table.
    """
    if not groups.tables or not groups.block_bytes:
        return None
    growing = [one for one in groups.tables if one[0].kind in {CacheKind.FULL, CacheKind.LATENT}]
    windowed = [one for one in groups.tables if one[0].kind in {CacheKind.WINDOW, CacheKind.CHUNK}]
    states = sum(tables for cache, _, tables in groups.tables if cache.kind.fixed)
    # A window's first block is seldom full, so it takes one more.
    states += sum(tables for cache, _, tables in windowed if cache.kind is CacheKind.WINDOW)
    block = min((size for _, size, _ in growing), default=_PLAIN_BLOCK_TOKENS)
    spans = [
        cache.window + in_flight_tokens - (1 if cache.kind is CacheKind.WINDOW else 0)
        for cache, _, _ in windowed
    ]
    return SequenceCache(
        blocks=max(0, int(room_bytes / groups.block_bytes)),
        block_tokens=block,
        tables=math.ceil(sum(tables * block / size for _, size, tables in growing)),
        state_blocks=states,
        window_tables=sum(tables for _, _, tables in windowed),
        window_tokens=max(spans, default=0),
        window_block_tokens=min((size for _, size, _ in windowed), default=_PLAIN_BLOCK_TOKENS),
    )
