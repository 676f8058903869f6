"""The parameters of model families, by vLLM's names (0.32).

Each builder lists linear layers, which a precision may replace by quantised ones, and plain
tensors, which stay as they are. Sources: vllm/model_executor/models/{llama,qwen2,qwen3,opt,
mixtral,qwen3_moe}.py. Precisions and layouts are not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from oserve.core import OServeError
from oserve.perf.model import ModelFacts
from oserve.switch.tensor import WHOLE, Cut, CutKind, Where


class Family(StrEnum):
    """Models whose parameters have the same names and cuts."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    OPT = "opt"
    MIXTRAL = "mixtral"
    QWEN3_MOE = "qwen3_moe"


_ARCHITECTURES = {
    "LlamaForCausalLM": Family.LLAMA,
    "MistralForCausalLM": Family.LLAMA,
    "Qwen2ForCausalLM": Family.QWEN2,
    "Qwen3ForCausalLM": Family.QWEN3,
    "OPTForCausalLM": Family.OPT,
    "MixtralForCausalLM": Family.MIXTRAL,
    "Qwen3MoeForCausalLM": Family.QWEN3_MOE,
}
_NAMED = {
    "llama": Family.LLAMA,
    "mistral": Family.LLAMA,
    "qwen2": Family.QWEN2,
    "qwen3": Family.QWEN3,
    "opt": Family.OPT,
}
_NAMED_MIXTURES = {"mixtral": Family.MIXTRAL, "qwen3": Family.QWEN3_MOE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One of the matrices fused in a linear layer: its rows, and how ranks share them."""

    name: str
    rows: int
    cut: Cut = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer, weight [rows, inputs], of each of ``experts`` if there are any.

    ``stem`` + ``weight`` is the parameter's name. ``row_parallel``: ranks share the inputs in
    ``input_units`` pieces that stay whole, and have all rows.
    """

    stem: str
    outputs: tuple[Output, ...]
    inputs: int
    row_parallel: bool = False
    input_units: int = 1
    bias: bool = False
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A tensor that no precision changes: norms, embeddings, router gates."""

    name: str
    shape: tuple[int, ...]
    cut: Cut = WHOLE
    where: Where = Where.LAYER


Member = Linear | Plain
_VOCABULARY = Cut(kind=CutKind.VOCABULARY)


def family_of(model: ModelFacts, architecture: str = "") -> Family:
    """Return the family by the ``architectures`` entry of config.json, else by the model's name.

    Raises OServeError if its layout is not known: a guess would move the wrong bytes.
    """
    name = model.name.lower()
    found = _ARCHITECTURES.get(architecture)
    if not architecture:
        named = _NAMED_MIXTURES if model.experts > 1 else _NAMED
        found = next((family for part, family in named.items() if part in name), None)
    if found is None:
        raise OServeError(
            f"the parameter layout of {architecture or model.name} is not known",
            place="model",
            remedy="switch by reloading, or use one of: " + ", ".join(_ARCHITECTURES),
        )
    return found


def members_of(model: ModelFacts, family: Family) -> tuple[Member, ...]:
    """Return all linear layers and plain tensors; ``{}`` in names stands for the layer."""
    return tuple(_BUILDERS[family](model))


def _even(units: int, dim: int = 0) -> Cut:
    return Cut(kind=CutKind.EVEN, dim=dim, units=units)


def _qkv(model: ModelFacts, stem: str, *, bias: bool) -> Linear:
    heads = Cut(kind=CutKind.EVEN, units=model.heads)
    kv = Cut(kind=CutKind.KV_HEADS, units=model.kv_heads)
    key_value = model.kv_heads * model.head_dim
    return Linear(
        stem=stem,
        outputs=(
            Output(name="q", rows=model.heads * model.head_dim, cut=heads),
            Output(name="k", rows=key_value, cut=kv),
            Output(name="v", rows=key_value, cut=kv),
        ),
        inputs=model.hidden,
        bias=bias,
    )


def _row(stem: str, rows: int, inputs: int, units: int, *, bias: bool = False) -> Linear:
    return Linear(
        stem=stem,
        outputs=(Output(name="", rows=rows),),
        inputs=inputs,
        row_parallel=True,
        input_units=units,
        bias=bias,
    )


def _gated_mlp(stem: str, hidden: int, wide: int) -> tuple[Linear, Linear]:
    up = tuple(Output(name=name, rows=wide, cut=_even(wide)) for name in ("gate", "up"))
    return (
        Linear(stem=f"{stem}.gate_up_proj.", outputs=up, inputs=hidden),
        _row(f"{stem}.down_proj.", hidden, wide, wide),
    )


def _ends(model: ModelFacts, *, everywhere: bool = False) -> tuple[Plain, ...]:
    """Return embedding, last norm and head; ``everywhere``: all stages have all of them."""
    first, last = (Where.EVERY, Where.EVERY) if everywhere else (Where.FIRST, Where.LAST)
    if model.tied and not everywhere:
        first = Where.ENDS
    shape = (model.vocab, model.hidden)
    embed = Plain(name="model.embed_tokens.weight", shape=shape, cut=_VOCABULARY, where=first)
    norm = Plain(name="model.norm.weight", shape=(model.hidden,), where=last)
    if model.tied:
        return embed, norm
    head = Plain(name="lm_head.weight", shape=shape, cut=_VOCABULARY, where=last)
    return embed, norm, head


def _attention(model: ModelFacts, *, qkv_bias: bool, head_norms: bool) -> tuple[Member, ...]:
    layer = "model.layers.{}."
    attention = layer + "self_attn."
    members: tuple[Member, ...] = (
        _qkv(model, attention + "qkv_proj.", bias=qkv_bias),
        _row(attention + "o_proj.", model.hidden, model.heads * model.head_dim, model.heads),
        Plain(name=layer + "input_layernorm.weight", shape=(model.hidden,)),
        Plain(name=layer + "post_attention_layernorm.weight", shape=(model.hidden,)),
    )
    if head_norms:
        members += tuple(
            Plain(name=f"{attention}{norm}.weight", shape=(model.head_dim,))
            for norm in ("q_norm", "k_norm")
        )
    return members


def _dense(
    *, qkv_bias: bool = False, head_norms: bool = False
) -> Callable[[ModelFacts], tuple[Member, ...]]:
    def build(model: ModelFacts) -> tuple[Member, ...]:
        return (
            *_attention(model, qkv_bias=qkv_bias, head_norms=head_norms),
            *_gated_mlp("model.layers.{}.mlp", model.hidden, model.intermediate),
            *_ends(model),
        )

    return build


def _mixture(block: str, *, head_norms: bool) -> Callable[[ModelFacts], tuple[Member, ...]]:
    def build(model: ModelFacts) -> tuple[Member, ...]:
        stem = f"model.layers.{{}}.{block}."
        wide, hidden = model.intermediate, model.hidden
        up = tuple(Output(name=name, rows=wide, cut=_even(wide)) for name in ("gate", "up"))
        experts = stem + "experts.routed_experts."
        members: tuple[Member, ...] = (
            *_attention(model, qkv_bias=False, head_norms=head_norms),
            Plain(name=stem + "gate.weight", shape=(model.experts, hidden)),
            Linear(stem=experts + "w13_", outputs=up, inputs=hidden, experts=model.experts),
            Linear(
                stem=experts + "w2_",
                outputs=(Output(name="", rows=hidden),),
                inputs=wide,
                row_parallel=True,
                input_units=wide,
                experts=model.experts,
            ),
            # Every stage has both ends, used or not (models/mixtral.py, qwen3_moe.py).
            *_ends(model, everywhere=True),
        )
        if model.shared_intermediate:
            members += _gated_mlp(stem + "shared_expert", hidden, model.shared_intermediate)
            members += (Plain(name=stem + "shared_expert_gate.weight", shape=(1, hidden)),)
        return members

    return build


def _opt(model: ModelFacts) -> tuple[Member, ...]:
    root, layer = "model.decoder.", "model.decoder.layers.{}."
    hidden, wide = model.hidden, model.intermediate
    # OPT's embeddings, final norm and head exist in every stage, used or not (models/opt.py).
    every = Where.EVERY
    shape = (model.vocab, hidden)
    members: tuple[Member, ...] = (
        _qkv(model, layer + "self_attn.qkv_proj.", bias=True),
        _row(layer + "self_attn.out_proj.", hidden, hidden, model.heads, bias=True),
        Linear(
            stem=layer + "fc1.",
            outputs=(Output(name="", rows=wide, cut=_even(wide)),),
            inputs=hidden,
            bias=True,
        ),
        _row(layer + "fc2.", hidden, wide, wide, bias=True),
        *(
            Plain(name=f"{layer}{norm}.{kind}", shape=(hidden,))
            for norm in ("self_attn_layer_norm", "final_layer_norm")
            for kind in ("weight", "bias")
        ),
        *(
            Plain(name=f"{root}final_layer_norm.{kind}", shape=(hidden,), where=every)
            for kind in ("weight", "bias")
        ),
        Plain(name=root + "embed_tokens.weight", shape=shape, cut=_VOCABULARY, where=every),
        # Positions start at 2 in OPT's table.
        Plain(
            name=root + "embed_positions.weight",
            shape=(model.max_model_len + 2, hidden),
            where=every,
        ),
    )
    if not model.tied:
        members += (Plain(name="lm_head.weight", shape=shape, cut=_VOCABULARY, where=every),)
    return members


_BUILDERS: dict[Family, Callable[[ModelFacts], tuple[Member, ...]]] = {
    Family.LLAMA: _dense(),
    Family.QWEN2: _dense(qkv_bias=True),
    Family.QWEN3: _dense(head_norms=True),
    Family.OPT: _opt,
    Family.MIXTRAL: _mixture("block_sparse_moe", head_norms=False),
    Family.QWEN3_MOE: _mixture("mlp", head_norms=True),
}
