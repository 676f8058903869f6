"""The modules of a layer, by which checkpoints say what is quantised, and how.

Names are those within a layer of most families (``self_attn.q_proj``); ``layer_names`` gives the
spellings of others.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from oserve.perf.layers import ANY_SHARDS

_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "backbone.", "")
# Other names of the same projections, also of those that hold several.
_ALIASES = {
    "q_proj": ("qkv_proj", "query_key_value", "Wqkv", "c_attn"),
    "k_proj": ("qkv_proj", "query_key_value", "Wqkv", "c_attn"),
    "v_proj": ("qkv_proj", "query_key_value", "Wqkv", "c_attn"),
    "o_proj": ("out_proj", "dense"),
    "gate_proj": ("gate_up_proj", "w1", "input_linear"),
    "up_proj": ("gate_up_proj", "w3", "input_linear"),
    "down_proj": ("w2", "output_linear"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "gate": ("router", "router.layer", "router.proj"),
}
_CONTAINERS = {
    "mlp": ("feed_forward", "block_sparse_moe", "mixer", "shared_mlp", "ffn"),
    "shared_experts": ("shared_expert",),
    "self_attn": ("attn", "attention", "self_attention", "mixer"),
    "mamba": ("mixer",),
}
# What stands beside the layers of a multimodal model: a module of each kind of tower.
_OUTSIDE = """
visual.blocks.0.attn.qkv vision_tower.vision_model.encoder.layers.0.self_attn.q_proj
vision_tower.transformer.layers.0.attention.q_proj vision_model.model.layers.0.self_attn.q_proj
multi_modal_projector.linear_1
"""
OUTSIDE_NAMES = tuple(
    prefix + name for name in _OUTSIDE.split() for prefix in ("", "model.", "vlm.")
)
HEAD_NAMES = ("lm_head", "language_model.lm_head", "model.language_model.lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One matrix of a layer, or all experts' ones of a name.

    ``shards``: the most tensor-parallel ranks over which vLLM divides it; 1: each holds all of it.
    ``linear``: quantisation may apply, unlike to routers, convolutions and states.
    """

    name: str
    parameters: int
    shards: int = ANY_SHARDS
    linear: bool = True


def parameters_of(modules: Iterable[Module]) -> int:
    """The parameters of all of them."""
    return sum(module.parameters for module in modules)


@functools.cache
def layer_names(layer: int, name: str) -> tuple[str, ...]:
    """The full names that checkpoints of the known families give a module of a layer."""
    container, _, inner = name.partition(".")
    middle, dot, leaf = inner.rpartition(".")
    first = middle.partition(".")[0]
    middles = [middle, *(other + middle[len(first) :] for other in _CONTAINERS.get(first, ()))]
    return tuple(
        f"{prefix}layers.{layer}.{outer}.{between}{dot}{last}"
        for prefix in _PREFIXES
        for outer in (container, *_CONTAINERS.get(container, ()))
        for between in middles
        for last in (leaf, *_ALIASES.get(leaf, ()))
    )
