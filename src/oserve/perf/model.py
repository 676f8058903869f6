"""The sizes of a model that determine its memory and work.

They come from a Hugging Face ``config.json`` (see ``model_config``) or the small built-in
catalogue.
"""

from dataclasses import dataclass, field

from oserve.perf.layers import ANY_SHARDS, Cache, CacheKind, LayerKind, Matrices, Part, summed
from oserve.perf.stored import StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Counts, not bytes. ``gated``: the MLP has three matrices instead of two.

    ``intermediate`` is the MLP width, of one expert where there are ``experts``;
    ``experts_per_token`` of them compute each token. ``tied``: the LM head is the embedding.
    ``kinds``: the layers of a model whose layers differ, or are not plain attention with an MLP;
    the sizes before are then those of its first attention and widest experts.
    ``extra_parameters``: besides layers, embedding and head, such as a vision tower.
    ``stored``: how a quantised checkpoint holds its weights. ``file_bytes``: of the model's weight
    files, as a 16-bit engine holds them, 0 if there are none. ``read_by``: how the configuration
    was read.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    experts_per_token: int = 1
    shared_intermediate: int = 0
    max_model_len: int = 4096
    kinds: tuple[LayerKind, ...] = ()
    extra_parameters: int = 0
    stored: StoredWeights | None = None
    file_bytes: int = field(default=0, compare=False)
    read_by: str = field(default="", compare=False)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one plain layer's query, key, value and output projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of a plain layer (the whole MLP of a dense model)."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def shared_parameters(self) -> int:
        """Parameters of a plain layer's shared expert, if there is one."""
        return 3 * self.hidden * self.shared_intermediate

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """All layers by kind, also those of a plain model; without norms, which are negligible."""
        return self.kinds or (self.plain_kind,)

    @property
    def plain_kind(self) -> LayerKind:
        """The one kind of a model whose layers are alike: attention and an MLP or experts."""
        sparse = self.experts > 1
        router = self.hidden * self.experts if sparse else 0
        return LayerKind(
            count=self.layers,
            cache=Cache(
                kind=CacheKind.FULL,
                values=2 * self.kv_heads * self.head_dim,
                heads=self.kv_heads,
            ),
            mixer=self.attention_parameters,
            dense=router + self.shared_parameters + (0 if sparse else self.expert_parameters),
            expert=self.expert_parameters if sparse else 0,
            experts=self.experts if sparse else 0,
            experts_per_token=self.experts_per_token if sparse else 0,
            attention=self.heads * self.head_dim,
            dense_width=self.shared_intermediate if sparse else self.intermediate,
            expert_width=self.intermediate if sparse else 0,
            matrices=self._plain_matrices(),
        )

    def _plain_matrices(self) -> tuple[Matrices, ...]:
        """Of a plain layer: heads divide attention, and ranks beyond the key-value heads copy."""
        if self.stored is not None and self.stored.matrices:
            return self.stored.matrices
        each, sparse = self.hidden * self.head_dim, self.experts > 1
        router = self.hidden * self.experts if sparse else 0
        dense = self.shared_parameters + (0 if sparse else self.expert_parameters)
        found = (
            (Part.MIXER, 2 * each * self.heads, self.heads),
            (Part.MIXER, 2 * each * self.kv_heads, self.kv_heads),
            (Part.DENSE, router, 1),
            (Part.DENSE, dense, ANY_SHARDS),
            (Part.EXPERT, self.experts * self.expert_parameters if sparse else 0, ANY_SHARDS),
        )
        return summed(
            Matrices(part=part, parameters=count, shards=shards) for part, count, shards in found
        )

    @property
    def body_parameters(self) -> int:
        """Parameters of all layers."""
        return sum(kind.count * kind.parameters for kind in self.layer_kinds)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.body_parameters + embeddings + self.extra_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        idle = sum(
            kind.count * (kind.parameters - kind.active_parameters) for kind in self.layer_kinds
        )
        return self.parameters - idle
