"""The MLPs of a configuration: of two or three matrices, with or without experts, by layer."""

from dataclasses import dataclass
from typing import Any

from oserve.core import OServeError
from oserve.perf.checked import WITHOUT_FACTS
from oserve.perf.config_keys import ConfigKeys
from oserve.perf.layer_types import names_of_layers
from oserve.perf.mixers import hidden_of, part_of_block
from oserve.perf.modules import Module, parameters_of

# MLPs of two matrices, up and down.
_TWO_MATRICES = """
opt gpt2 gptj gpt_neox falcon bloom gpt_bigcode starcoder2 arcee apertus persimmon phi nemotron
nemotron_h jais2
"""
_PLAIN = frozenset(_TWO_MATRICES.split())
_NO_MLP = frozenset({"mamba", "mamba2", "falcon_mamba"})
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Modules of one layer's MLP, ``own`` for all tokens; for the rest see ``LayerKind``.

    ``routed``: of all experts together.
    """

    own: tuple[Module, ...] = ()
    routed: tuple[Module, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    dense_width: int = 0
    expert_width: int = 0

    @property
    def dense(self) -> int:
        """Parameters of what each token passes."""
        return parameters_of(self.own)

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return parameters_of(self.routed) // self.experts if self.experts else 0


def is_gated(keys: ConfigKeys) -> bool:
    """Whether an MLP has three matrices."""
    return keys.kind not in _PLAIN


def width_of(keys: ConfigKeys, layer: int = 0) -> int:
    """The width of the dense MLP."""
    names: tuple[str, ...] = (
        "intermediate_size",
        "n_inner",
        "ffn_hidden_size",
        "ffn_dim",
        "inner_dim",
    )
    if keys.kind == "opt":
        names = ("ffn_dim",)
    elif keys.kind == "llama4_text":
        names = ("intermediate_size_mlp",)
    by_layer = keys.value("intermediate_size")
    if isinstance(by_layer, list):
        return int(by_layer[min(layer, len(by_layer) - 1)])
    nested = keys.value("ffn_config")
    if isinstance(nested, dict) and nested.get("ffn_hidden_size"):
        return int(nested["ffn_hidden_size"])
    if keys.kind in {"lfm2"} and keys.flag("block_auto_adjust_ff_dim"):
        wide = int(2 * keys.count("intermediate_size") / 3)
        wide = int(float(keys.value("block_ffn_dim_multiplier") or 1.0) * wide)
        unit = keys.count("block_multiple_of")
        return unit * -(-wide // unit)
    if keys.kind in {"gpt2", "gptj", "gpt_bigcode", "falcon", "bloom"}:
        return keys.optional(*names) or 4 * hidden_of(keys)
    return keys.count(*names)


def experts_of(keys: ConfigKeys) -> int:
    """Routed experts of a layer that has them; 0 for a dense model."""
    nested = keys.value("ffn_config")
    if isinstance(nested, dict) and nested.get("moe_num_experts"):
        return int(nested["moe_num_experts"])
    found = keys.value(*_EXPERTS)
    if isinstance(found, list):
        return max(int(one) for one in found)
    if keys.kind == "gemma4_text" and not keys.flag("enable_moe_block"):
        return 0
    count = keys.natural(*_EXPERTS)
    # A dense model may say that it has one expert or none.
    return count if count > 1 else 0


def experts_per_token_of(keys: ConfigKeys) -> int:
    """Routed experts that a token passes."""
    nested = keys.value("ffn_config")
    if isinstance(nested, dict) and nested.get("moe_top_k"):
        return int(nested["moe_top_k"])
    found = keys.value(*_EXPERTS_PER_TOKEN)
    if isinstance(found, list):
        return max(int(one) for one in found)
    return keys.optional(*_EXPERTS_PER_TOKEN) or min(2, experts_of(keys))


def expert_width_of(keys: ConfigKeys) -> int:
    """The width of one expert."""
    found = keys.value("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size")
    if isinstance(found, list):
        return int(found[0])
    if isinstance(found, int) and found > 0:
        return found
    return keys.count("intermediate_size") if keys.kind == "llama4_text" else width_of(keys)


def mlps(keys: ConfigKeys, layers: int) -> list[Mlp]:
    """The MLP of each layer."""
    if keys.kind in _NO_MLP:
        return [Mlp()] * layers
    blocks = keys.list("block_configs")
    if blocks:
        return [_block(keys, block) for block in blocks]
    named = names_of_layers(keys)
    listed = tuple(str(one) for one in keys.list("mlp_layer_types"))
    experts = experts_of(keys)
    return [_mlp(keys, layer, named, listed, experts) for layer in range(layers)]


def _block(keys: ConfigKeys, block: Any) -> Mlp:
    """The MLP of one of Nemotron-NAS's blocks."""
    own = part_of_block(block, "ffn")
    if own is None:
        return Mlp()
    factor, width = own.get("ffn_mult"), own.get("intermediate_size")
    if isinstance(factor, int | float):
        # As vLLM's nemotron_nas.py rounds it.
        width = 256 * -(-int(2 * factor * hidden_of(keys) / 3) // 256)
    if own.get("replace_with_linear") or not isinstance(width, int) or width < 1:
        raise OServeError(
            "an MLP without ffn_mult is not known",
            place=f"{keys.place}:block_configs",
            remedy=WITHOUT_FACTS,
        )
    return Mlp(own=_matrices("mlp", True, hidden_of(keys) * width), dense_width=width)


def _mlp(
    keys: ConfigKeys, layer: int, named: tuple[str, ...], listed: tuple[str, ...], experts: int
) -> Mlp:
    hidden = hidden_of(keys)
    gated = is_gated(keys)
    sparse = experts > 0
    if keys.kind == "nemotron_h":
        if named[layer] not in {"mlp", "moe"}:
            return Mlp()
        sparse = named[layer] == "moe"
    elif listed and layer < len(listed):
        sparse = sparse and listed[layer] == "sparse"
    elif sparse:
        sparse = _is_sparse(keys, layer)
    if not sparse:
        width = width_of(keys, layer)
        if keys.kind == "zamba2":
            return Mlp()
        if keys.kind == "granitemoehybrid":
            width = keys.optional("shared_intermediate_size") or width
        shared = keys.natural("num_kv_shared_layers")
        total = keys.natural("num_hidden_layers")
        if keys.flag("use_double_wide_mlp") and shared and layer >= total - shared:
            width *= 2
        return Mlp(own=_matrices("mlp", gated, hidden * width), dense_width=width)
    wide = expert_width_of(keys)
    inner = keys.optional("moe_latent_size") or hidden
    shared = shared_width_of(keys)
    router = Module(name="mlp.gate", parameters=hidden * experts, shards=1, linear=False)
    own = [router, *_matrices("mlp.shared_experts", gated, hidden * shared)]
    if inner != hidden:
        latent = 2 * hidden * inner
        own.append(Module(name="mlp.fc1_latent_proj", parameters=latent, shards=1))
    if keys.kind == "gemma4_text":
        # Its dense MLP stands beside the experts.
        shared = width_of(keys, layer)
        own += _matrices("mlp", True, hidden * shared)
    return Mlp(
        own=tuple(own),
        routed=_matrices("mlp.experts.0", gated, experts * inner * wide),
        experts=experts,
        experts_per_token=experts_per_token_of(keys),
        dense_width=shared,
        expert_width=wide,
    )


def _matrices(name: str, gated: bool, each: int) -> tuple[Module, ...]:
    """The matrices of an MLP, ``each`` of so many parameters."""
    leaves = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    return tuple(Module(name=f"{name}.{leaf}", parameters=each) for leaf in leaves)


def shared_width_of(keys: ConfigKeys) -> int:
    """The width of all shared experts together."""
    if keys.kind == "llama4_text":
        return keys.count("intermediate_size")
    given = keys.optional(
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
        least=0,
    )
    if given is not None:
        return given
    each = keys.optional("moe_shared_expert_intermediate_size") or expert_width_of(keys)
    count = keys.value(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"
    )
    if isinstance(count, list):
        count = count[0]
    return each * count if isinstance(count, int) else 0


def _is_sparse(keys: ConfigKeys, layer: int) -> bool:  # noqa: PLR0911
    """Whether that layer of a model with experts has them."""
    kind = keys.kind
    if kind in {"jamba"}:
        period, offset = keys.count("expert_layer_period"), keys.natural("expert_layer_offset")
        return layer % period == offset
    if kind in {"llama4_text"}:
        chosen = keys.list("moe_layers")
        step = keys.optional("interleave_moe_layer_step") or 1
        return layer in chosen if chosen else (layer + 1) % step == 0
    if kind == "ernie4_5_moe":
        first, interval = keys.natural("moe_layer_start_index"), keys.count("moe_layer_interval")
        last = keys.value("moe_layer_end_index")
        last = last if isinstance(last, int) and last >= 0 else 1 << 30
        return (layer + 1) % interval == 0 and first <= layer <= last
    chosen = keys.value("moe_layers_enum")
    if isinstance(chosen, str):
        return str(layer) in chosen.split(",")
    frequency = keys.value("moe_layer_freq")
    if isinstance(frequency, list):
        return bool(frequency[layer]) if layer < len(frequency) else True
    dense = keys.natural("first_k_dense_replace") or keys.natural("num_dense_layers")
    if dense:
        step = frequency if isinstance(frequency, int) and frequency > 0 else 1
        return layer >= dense and layer % step == 0
    if layer in keys.list("mlp_only_layers"):
        return False
    step = keys.optional("decoder_sparse_step") or 1
    return (layer + 1) % step == 0
