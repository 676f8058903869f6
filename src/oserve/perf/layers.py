"""The kinds of layer in a model: what each caches, and the parameters it has.

Hybrid models mix attention over everything, over a window, over a compressed latent and layers with
a state of fixed size; some layers have experts. ``LayerKind`` counts like layers together: vLLM's
cache groups depend on counts, not on the order.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

# A plan that asks for 16 bits takes the checkpoint as it is.
AS_IT_IS_BYTES = 2.0
# Divided over any number of ranks.
ANY_SHARDS = 1 << 30


class CacheKind(StrEnum):
    """What a layer keeps of a request.

    ``CHUNK``: attention within chunks. ``LATENT``: one compressed vector per token, which every
    tensor-parallel rank holds whole. ``STATE`` and ``CONVOLUTION``: of fixed size. ``SHARED``: the
    cache of another layer. ``NONE``: no cache, as MLP layers have.
    """

    FULL = "full"
    WINDOW = "window"
    CHUNK = "chunk"
    LATENT = "latent"
    STATE = "state"
    CONVOLUTION = "convolution"
    SHARED = "shared"
    NONE = "none"

    @property
    def fixed(self) -> bool:
        """Whether the size does not depend on the tokens."""
        return self in {CacheKind.STATE, CacheKind.CONVOLUTION}

    @property
    def by_token(self) -> bool:
        """Whether each token adds to it, at least within a window."""
        return self in {CacheKind.FULL, CacheKind.WINDOW, CacheKind.CHUNK, CacheKind.LATENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The cache of one layer.

    ``values``: per token, keys and values of all heads, or one latent. ``heads``: key-value heads
    over which tensor parallelism divides ``values``, 1 for a latent; the parts into which a fixed
    size divides. ``window``: tokens, of a window or chunk. ``state_values`` (of the model's type)
    and ``state_wide_bytes`` (of a type of its own) are the fixed size of a state. ``extra_bytes``:
    per token, in a type of its own. ``sparse_tokens``: of which a step reads the most relevant, 0
    for all.
    """

    kind: CacheKind = CacheKind.FULL
    values: int = 0
    heads: int = 1
    window: int = 0
    state_values: int = 0
    state_wide_bytes: int = 0
    extra_bytes: int = 0
    sparse_tokens: int = 0

    def token_bytes(self, value_bytes: float, tensor_parallel_size: int) -> float:
        """Bytes per token on one rank; ranks beyond the heads hold copies."""
        if not self.kind.by_token:
            return 0.0
        shards = min(self.heads, tensor_parallel_size)
        return self.values * value_bytes / shards + self.extra_bytes

    def state_bytes(self, value_bytes: float, tensor_parallel_size: int) -> float:
        """Bytes per request on one rank, of a fixed size."""
        if not self.kind.fixed:
            return 0.0
        whole = self.state_values * value_bytes + self.state_wide_bytes
        return whole / tensor_parallel_size

    @property
    def state_size(self) -> int:
        """The values of a state."""
        return self.state_values + self.state_wide_bytes // 4 if self.kind.fixed else 0


class Part(StrEnum):
    """A part of a layer. ``HELD``: copies that vLLM makes of weights in 16 bits, see ``mixers``."""

    MIXER = "mixer"
    DENSE = "dense"
    EXPERT = "expert"
    HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Weights of one layer that are divided and stored alike: ``parameters`` in all.

    ``shards``: the most tensor-parallel ranks that share them; further ones hold copies.
    ``stored_bytes``: per weight of a quantised checkpoint as it is, 2 for what stays in 16 bits; 0
    for weights that take the precision that is asked for.
    """

    part: Part
    parameters: int
    shards: int
    stored_bytes: float = 0.0

    def bytes_each(self, asked: float, plain: float) -> float:
        """Bytes per weight: ``asked`` of the quantised layers, ``plain`` of others."""
        if self.part is Part.HELD:
            return plain
        if asked != AS_IT_IS_BYTES or not self.stored_bytes:
            return asked
        return self.stored_bytes


def summed(matrices: Iterable[Matrices]) -> tuple[Matrices, ...]:
    """Those that are divided and stored alike, taken together."""
    sums: dict[Matrices, int] = {}
    for one in matrices:
        key = replace(one, parameters=0)
        sums[key] = sums.get(key, 0) + one.parameters
    return tuple(replace(key, parameters=count) for key, count in sums.items() if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """``count`` like layers, and the parameters of each.

    ``mixer``: of attention, state space or convolution. ``dense``: of the MLP that each token
    passes, with shared experts and the router. ``expert``: of one of ``experts``, of which a token
    passes ``experts_per_token``. ``attention``: query heads times head size, for the attention's
    work; 0 without. ``latent_attention``: the same where a query meets a latent. ``dense_width``
    and ``expert_width``: of the MLPs, which tensor parallelism divides. ``matrices``: all of these
    weights by how ranks share them and checkpoints store them.
    """

    count: int
    cache: Cache
    mixer: int = 0
    dense: int = 0
    expert: int = 0
    experts: int = 0
    experts_per_token: int = 0
    attention: int = 0
    latent_attention: int = 0
    dense_width: int = 0
    expert_width: int = 0
    matrices: tuple[Matrices, ...] = ()

    def weight_bytes(
        self, asked: float, plain: float, *, tensor_parallel_size: int = 1, expert_unit: int = 1
    ) -> float:
        """Bytes of one such layer's weights on one rank.

        ``asked``: bytes per weight, ``plain`` of weights that are never quantised; see
        ``StoredWeights.expert_unit``.
        """
        if not self.matrices:
            return self.parameters * asked / tensor_parallel_size
        filled = 1.0
        if self.expert_width and expert_unit > 1:
            own = self.expert_width / tensor_parallel_size
            filled = expert_unit * math.ceil(own / expert_unit) / own
        return sum(
            one.parameters
            * one.bytes_each(asked, plain)
            * (filled if one.part is Part.EXPERT else 1.0)
            / min(one.shards, tensor_parallel_size)
            for one in self.matrices
        )

    def mean_bytes(self, part: Part, asked: float) -> float:
        """Bytes per weight of a part of the layer, on average."""
        own = [one for one in self.matrices if one.part is part]
        count = sum(one.parameters for one in own)
        if not count:
            return asked
        return sum(one.parameters * one.bytes_each(asked, asked) for one in own) / count

    @property
    def parameters(self) -> int:
        """Parameters of one such layer."""
        return self.mixer + self.dense + self.experts * self.expert

    @property
    def active_parameters(self) -> int:
        """Parameters of one such layer that a token uses."""
        return self.mixer + self.dense + self.experts_per_token * self.expert
