"""The kinds of layer in a model: what each caches, and the parameters it has.

Hybrid models mix attention over everything, over a window, over a compressed latent and layers with
a state of fixed size; some layers have experts. ``LayerKind`` counts like layers together: vLLM's
cache groups depend on counts, not on the order.
"""

from dataclasses import dataclass
from enum import StrEnum


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
    per token, in a type of its own.
    """

    kind: CacheKind = CacheKind.FULL
    values: int = 0
    heads: int = 1
    window: int = 0
    state_values: int = 0
    state_wide_bytes: int = 0
    extra_bytes: int = 0

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """``count`` like layers, and the parameters of each.

    ``mixer``: of attention, state space or convolution. ``dense``: of the MLP that each token
    passes, with shared experts and the router. ``expert``: of one of ``experts``, of which a token
    passes ``experts_per_token``. ``attention``: query heads times head size, for the attention's
    work; 0 without. ``dense_width`` and ``expert_width``: of the MLPs, which tensor parallelism
    divides.
    """

    count: int
    cache: Cache
    mixer: int = 0
    dense: int = 0
    expert: int = 0
    experts: int = 0
    experts_per_token: int = 0
    attention: int = 0
    dense_width: int = 0
    expert_width: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of one such layer."""
        return self.mixer + self.dense + self.experts * self.expert

    @property
    def active_parameters(self) -> int:
        """Parameters of one such layer that a token uses."""
        return self.mixer + self.dense + self.experts_per_token * self.expert
