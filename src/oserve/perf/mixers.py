"""The attention, state space and convolution layers of a configuration.

``mixer_of(keys, layer)`` gives parameters and cache of one layer's mixer, norms and biases left
out, as they are negligible. Sources: vllm/model_executor/models (0.32) and transformers (5.19).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oserve.core import OServeError
from oserve.perf.checked import WITHOUT_FACTS
from oserve.perf.config_keys import ConfigKeys
from oserve.perf.layer_types import MixerType, mixer_types
from oserve.perf.layers import Cache, CacheKind
from oserve.perf.modules import Module, parameters_of

# vLLM compresses these models' keys and values; MiniCPM3 has the same keys, but caches heads.
_LATENT = """
deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe_lite glm_moe_dsa kimi_linear mistral4
axk1
"""
LATENT_TYPES = frozenset(_LATENT.split())
# Query heads come with a gate of the same size.
_GATED_ATTENTION = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
# A sparse model's index: keys in 8 bits and one 32-bit scale per token.
_INDEX_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """Modules and cache of one layer's mixer; ``attention``: query heads x head size.

    ``latent_attention``: see ``LayerKind``. ``held``: weights that vLLM copies in 16 bits, as it
    does latent attention's projections.
    """

    modules: tuple[Module, ...] = ()
    cache: Cache = Cache(kind=CacheKind.NONE)  # noqa: RUF009 - frozen
    attention: int = 0
    latent_attention: int = 0
    held: Module | None = None

    @property
    def parameters(self) -> int:
        """Parameters of all modules."""
        return parameters_of(self.modules)


def heads_of(keys: ConfigKeys) -> int:
    """The query heads of a full-attention layer."""
    return keys.count("num_attention_heads", "n_head", "n_heads", "num_heads")


def hidden_of(keys: ConfigKeys) -> int:
    """The width of the residual stream."""
    return keys.count("hidden_size", "n_embd", "d_model")


def kv_heads_of(keys: ConfigKeys) -> int:
    """The key-value heads of a full-attention layer."""
    if keys.kind == "falcon":
        if keys.flag("new_decoder_architecture"):
            return keys.optional("num_kv_heads", "n_head_kv") or heads_of(keys)
        return 1 if keys.flag("multi_query") else heads_of(keys)
    if keys.kind == "gpt_bigcode":
        return 1 if keys.flag("multi_query") else heads_of(keys)
    if keys.kind == "chatglm":
        grouped = keys.flag("multi_query_attention")
        return keys.count("multi_query_group_num") if grouped else heads_of(keys)
    nested = keys.value("attn_config")
    if isinstance(nested, dict) and nested.get("kv_n_heads"):
        return int(nested["kv_n_heads"])
    found = keys.optional("num_key_value_heads", "num_kv_heads", "num_attention_groups")
    return found or heads_of(keys)


def head_dim_of(keys: ConfigKeys) -> int:
    """The size of a head of a full-attention layer."""
    found = keys.optional("head_dim", "attention_head_dim", "kv_channels")
    if keys.kind == "zamba2" and found is None:
        return 2 * hidden_of(keys) // heads_of(keys)
    return found or hidden_of(keys) // heads_of(keys)


def mixers(keys: ConfigKeys, layers: int) -> list[Mixer]:
    """The mixer of each layer; several share one object."""
    blocks = keys.list("block_configs")
    if blocks:
        return [_block(keys, block) for block in blocks]
    return [_MAKERS[kind](keys, kind) for kind in mixer_types(keys, layers)]


def part_of_block(block: Any, part: str) -> Mapping[str, Any] | None:
    """The ``attention`` or ``ffn`` of one of Nemotron-NAS's blocks; ``None`` if it has none."""
    found = block.get(part) if isinstance(block, Mapping) else None
    if not isinstance(found, Mapping) or found.get("no_op"):
        return None
    return found


def _block(keys: ConfigKeys, block: Any) -> Mixer:
    """Attention of the width of all others, with a number of key-value heads of its own."""
    own = part_of_block(block, "attention")
    if own is None:
        return Mixer()
    shared = own.get("n_heads_in_group")
    if own.get("replace_with_linear") or not isinstance(shared, int) or shared < 1:
        raise OServeError(
            "attention without n_heads_in_group is not known",
            place=f"{keys.place}:block_configs",
            remedy=WITHOUT_FACTS,
        )
    hidden, heads, size = hidden_of(keys), heads_of(keys), head_dim_of(keys)
    kv_heads = max(1, heads // shared)
    return Mixer(
        modules=(
            Module(name="self_attn.q_proj", parameters=hidden * heads * size, shards=heads),
            Module(name="self_attn.o_proj", parameters=hidden * heads * size, shards=heads),
            Module(name="self_attn.k_proj", parameters=hidden * kv_heads * size, shards=kv_heads),
            Module(name="self_attn.v_proj", parameters=hidden * kv_heads * size, shards=kv_heads),
        ),
        attention=heads * size,
        cache=Cache(kind=CacheKind.FULL, values=2 * kv_heads * size, heads=kv_heads),
    )


def _attention(keys: ConfigKeys, kind: MixerType) -> Mixer:
    """Grouped-query attention over everything, a window or chunks."""
    windowed = kind is MixerType.WINDOW
    heads, kv_heads, size = heads_of(keys), kv_heads_of(keys), head_dim_of(keys)
    value_size = keys.optional("v_head_dim") or size if keys.kind == "mimo_v2_flash" else size
    if windowed:
        heads = keys.optional("swa_num_attention_heads", "num_sliding_attention_heads") or heads
        kv_heads = keys.optional("swa_num_key_value_heads") or kv_heads
        size = keys.optional("swa_head_dim") or size
        value_size = keys.optional("swa_v_head_dim") or value_size
        other = keys.value("attention_other_setting")
        if isinstance(other, dict):
            heads = int(other.get("num_attention_heads", heads))
            kv_heads = int(other.get("num_attention_groups", kv_heads))
    copies = 2
    if keys.kind == "gemma4_text" and kind is MixerType.FULL:
        size = value_size = keys.optional("global_head_dim") or size
        if keys.flag("attention_k_eq_v"):
            kv_heads = keys.optional("num_global_key_value_heads") or kv_heads
            copies = 1
    hidden = hidden_of(keys)
    gate = heads * size if keys.kind in _GATED_ATTENTION or keys.kind == "afmoe" else 0
    modules = [
        Module(name="self_attn.q_proj", parameters=hidden * (heads * size + gate), shards=heads),
        Module(name="self_attn.o_proj", parameters=hidden * heads * value_size, shards=heads),
    ]
    reads = kind is MixerType.SHARED and keys.kind == "gemma4_text"
    for name, each in (("k_proj", size), ("v_proj", (copies - 1) * value_size)):
        if not reads:
            own = hidden * kv_heads * each
            modules.append(Module(name=f"self_attn.{name}", parameters=own, shards=kv_heads))
    cached = {
        MixerType.WINDOW: CacheKind.WINDOW,
        MixerType.CHUNK: CacheKind.CHUNK,
        MixerType.SHARED: CacheKind.SHARED,
    }.get(kind, CacheKind.FULL)
    window = 0
    if windowed:
        window = keys.count("sliding_window")
    elif kind is MixerType.CHUNK:
        window = keys.count("attention_chunk_size")
    return Mixer(
        modules=tuple(modules),
        attention=heads * size,
        cache=Cache(
            kind=cached,
            values=kv_heads * (size + value_size) if cached.by_token else 0,
            heads=kv_heads if cached.by_token else 1,
            window=window,
        ),
    )


def _latent(keys: ConfigKeys, _: MixerType) -> Mixer:
    """DeepSeek's attention over a compressed latent."""
    hidden, heads = hidden_of(keys), heads_of(keys)
    plain, rotary = keys.count("qk_nope_head_dim"), keys.natural("qk_rope_head_dim")
    latent = keys.count("kv_lora_rank")
    value = keys.optional("v_head_dim") or plain
    low = keys.optional("q_lora_rank")
    query = heads * (plain + rotary)
    modules = [
        Module(name="self_attn.q_proj", parameters=hidden * query, shards=heads),
    ]
    if low:
        modules = [
            Module(name="self_attn.q_a_proj", parameters=hidden * low, shards=1),
            Module(name="self_attn.q_b_proj", parameters=low * query, shards=heads),
        ]
    raised = latent * heads * (plain + value)
    compressed = hidden * (latent + rotary)
    modules += [
        Module(name="self_attn.kv_a_proj_with_mqa", parameters=compressed, shards=1),
        Module(name="self_attn.kv_b_proj", parameters=raised, shards=heads),
        Module(name="self_attn.o_proj", parameters=heads * value * hidden, shards=heads),
    ]
    extra = 0
    if keys.optional("index_topk") and keys.optional("index_head_dim"):
        size, index_heads = keys.count("index_head_dim"), keys.count("index_n_heads")
        own = (low or hidden) * index_heads * size + hidden * (size + index_heads)
        modules.append(Module(name="self_attn.indexer.wq_b", parameters=own, shards=1))
        extra = size + _INDEX_SCALE_BYTES
    kept = Cache(
        kind=CacheKind.LATENT,
        values=latent + rotary,
        extra_bytes=extra,
        sparse_tokens=keys.natural("index_topk") if extra else 0,
    )
    # Scores over the latent and its rotary part, sums over the latent.
    absorbed = heads * (2 * latent + rotary) // 2
    held: Module | None = Module(name="self_attn.kv_b_proj", parameters=raised, shards=heads)
    if keys.kind not in LATENT_TYPES:
        each = plain + rotary
        kept = Cache(kind=CacheKind.FULL, values=2 * heads * each, heads=heads)
        held, absorbed = None, 0
    return Mixer(
        modules=tuple(modules), attention=query, latent_attention=absorbed, cache=kept, held=held
    )


def _mamba1(keys: ConfigKeys, _: MixerType) -> Mixer:
    hidden = hidden_of(keys)
    inner = keys.optional("intermediate_size") if keys.kind in {"mamba", "falcon_mamba"} else None
    inner = inner or hidden * (keys.optional("mamba_expand", "expand") or 2)
    state = keys.count("mamba_d_state", "state_size")
    kernel = keys.count("mamba_d_conv", "conv_kernel")
    rank = keys.value("mamba_dt_rank", "time_step_rank")
    rank = rank if isinstance(rank, int) else -(-hidden // 16)
    small = inner * kernel + inner * state
    return Mixer(
        modules=(
            Module(name="mamba.in_proj", parameters=hidden * 2 * inner),
            Module(name="mamba.x_proj", parameters=inner * (rank + 2 * state)),
            Module(name="mamba.dt_proj", parameters=rank * inner),
            Module(name="mamba.out_proj", parameters=inner * hidden),
            Module(name="mamba.conv1d", parameters=small, linear=False),
        ),
        cache=Cache(
            kind=CacheKind.STATE,
            heads=inner,
            state_values=inner * (kernel - 1) + inner * state,
        ),
    )


def _mamba2_sizes(keys: ConfigKeys) -> tuple[int, int, int, int, int]:
    """Inner size, heads, groups, state size and kernel."""
    hidden = hidden_of(keys)
    heads = keys.optional("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "num_heads")
    expand = keys.optional("mamba_expand", "expand") or 2
    size = keys.value("mamba_head_dim", "mamba_d_head", "head_dim")
    inner = keys.optional("mamba_d_ssm") or expand * hidden
    if heads is None:
        heads = inner // (size if isinstance(size, int) else 64)
    if keys.kind == "nemotron_h" and isinstance(size, int):
        inner = heads * size
    groups = keys.optional("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    state = keys.count("mamba_d_state", "ssm_state_size", "state_size")
    return inner, heads, groups, state, keys.count("mamba_d_conv", "conv_kernel")


def _mamba2(keys: ConfigKeys, _: MixerType) -> Mixer:
    hidden = hidden_of(keys)
    inner, heads, groups, state, kernel = _mamba2_sizes(keys)
    wide = inner + 2 * groups * state
    held = inner * state
    float32 = str(keys.value("mamba_ssm_cache_dtype")) == "float32"
    return Mixer(
        modules=(
            Module(name="mamba.in_proj", parameters=hidden * (inner + wide + heads)),
            Module(name="mamba.out_proj", parameters=inner * hidden),
            Module(name="mamba.conv1d", parameters=wide * kernel, linear=False),
        ),
        cache=Cache(
            kind=CacheKind.STATE,
            # Each rank has whole groups, or all ranks the same one.
            heads=heads if groups == 1 else math.gcd(heads, groups),
            state_values=wide * (kernel - 1) + (0 if float32 else held),
            state_wide_bytes=4 * held if float32 else 0,
        ),
    )


def _delta(keys: ConfigKeys, _: MixerType) -> Mixer:
    """Gated delta networks: linear attention with a matrix for each head."""
    hidden = hidden_of(keys)
    if keys.kind == "kimi_linear":
        return _kimi_delta(keys)
    k_heads, v_heads = keys.count("linear_num_key_heads"), keys.count("linear_num_value_heads")
    k_size, v_size = keys.count("linear_key_head_dim"), keys.count("linear_value_head_dim")
    kernel = keys.count("linear_conv_kernel_dim")
    wide = 2 * k_heads * k_size + v_heads * v_size
    held = v_heads * v_size * k_size
    chosen = keys.value("mamba_ssm_dtype", "mamba_ssm_cache_dtype")
    return Mixer(
        modules=(
            Module(name="linear_attn.in_proj_qkvz", parameters=hidden * (wide + v_heads * v_size)),
            Module(name="linear_attn.in_proj_ba", parameters=hidden * 2 * v_heads),
            Module(name="linear_attn.out_proj", parameters=v_heads * v_size * hidden),
            Module(name="linear_attn.conv1d", parameters=wide * kernel, linear=False),
        ),
        cache=Cache(
            kind=CacheKind.STATE,
            heads=math.gcd(k_heads, v_heads),
            state_values=wide * (kernel - 1) + (0 if chosen == "float32" else held),
            state_wide_bytes=4 * held if chosen == "float32" else 0,
        ),
    )


def _kimi_delta(keys: ConfigKeys) -> Mixer:
    hidden = hidden_of(keys)
    nested = keys.value("linear_attn_config")
    nested = nested if isinstance(nested, dict) else {}
    heads = int(nested.get("num_heads") or keys.optional("linear_num_heads") or 32)
    size = int(nested.get("head_dim") or keys.optional("linear_head_dim") or 128)
    kernel = int(nested.get("short_conv_kernel_size") or 4)
    inner = heads * size
    low = 2 * (hidden * size + size * inner)
    return Mixer(
        modules=(
            Module(name="self_attn.q_proj", parameters=hidden * 3 * inner),
            Module(name="self_attn.f_a_proj", parameters=low + hidden * heads),
            Module(name="self_attn.o_proj", parameters=inner * hidden),
            Module(name="self_attn.q_conv1d", parameters=3 * inner * kernel, linear=False),
        ),
        cache=Cache(
            kind=CacheKind.STATE,
            heads=heads,
            state_values=3 * inner * (kernel - 1),
            state_wide_bytes=4 * heads * size * size,
        ),
    )


def _convolution(keys: ConfigKeys, _: MixerType) -> Mixer:
    """LFM2's gated short convolution."""
    hidden = hidden_of(keys)
    kernel = keys.optional("conv_L_cache") or 3
    return Mixer(
        modules=(
            Module(name="conv.in_proj", parameters=3 * hidden * hidden),
            Module(name="conv.out_proj", parameters=hidden * hidden),
            Module(name="conv.conv", parameters=hidden * kernel, linear=False),
        ),
        cache=Cache(kind=CacheKind.CONVOLUTION, heads=hidden, state_values=hidden * (kernel - 1)),
    )


def plain_attention(keys: ConfigKeys) -> Mixer:
    """Attention over everything, as a layer beside others has it."""
    return _attention(keys, MixerType.FULL)


def _nothing(keys: ConfigKeys, kind: MixerType) -> Mixer:
    return Mixer()


_MAKERS: dict[MixerType, Callable[[ConfigKeys, MixerType], Mixer]] = {
    MixerType.FULL: _attention,
    MixerType.WINDOW: _attention,
    MixerType.CHUNK: _attention,
    MixerType.SHARED: _attention,
    MixerType.LATENT: _latent,
    MixerType.MAMBA1: _mamba1,
    MixerType.MAMBA2: _mamba2,
    MixerType.DELTA: _delta,
    MixerType.CONVOLUTION: _convolution,
    MixerType.NONE: _nothing,
}
