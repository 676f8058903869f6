"""What a model has besides its layers: position embeddings, vision and audio towers, adapters."""

from collections.abc import Mapping
from typing import Any

from oserve.perf.config_keys import ConfigKeys
from oserve.perf.layer_types import names_of_layers
from oserve.perf.layers import Cache, CacheKind, LayerKind
from oserve.perf.mixers import head_dim_of, heads_of, hidden_of, kv_heads_of, plain_attention

# Towers whose MLP has three matrices.
_GATED_TOWERS = frozenset({"qwen2_5_vl", "pixtral", "gemma4_vision"})
_GLM_TOWERS = frozenset({"glm4v", "glm4v_vision", "glm4v_moe", "glm4v_moe_vision"})
_TOWERS = ("vision_config", "audio_config", "vit_config")


def outside_parameters(keys: ConfigKeys, layers: int) -> int:
    """Parameters besides layers, token embedding and LM head."""
    found = _positions(keys) + _per_layer_embeddings(keys, layers) + _shared_blocks(keys)
    return found + tower_parameters(keys)


def tower_parameters(keys: ConfigKeys) -> int:
    """Parameters of the encoders of images and sound, with their projectors."""
    parts = ((key, keys.outer.get(key)) for key in _TOWERS)
    return sum(
        _tower(part, key, hidden_of(keys)) for key, part in parts if isinstance(part, Mapping)
    )


def _positions(keys: ConfigKeys) -> int:
    if keys.kind in {"gpt2", "gpt_bigcode"}:
        return keys.count("n_positions", "max_position_embeddings") * hidden_of(keys)
    if keys.kind == "opt":
        narrow = keys.optional("word_embed_proj_dim") or hidden_of(keys)
        hidden, vocab = hidden_of(keys), keys.count("vocab_size")
        return 2 * narrow * hidden - vocab * (hidden - narrow) if narrow != hidden else 0
    return 0


def _per_layer_embeddings(keys: ConfigKeys, layers: int) -> int:
    """Gemma's embeddings for each layer, and its projections and low-rank paths."""
    if keys.kind not in {"gemma3n_text", "gemma4_text"}:
        return 0
    size = keys.natural("hidden_size_per_layer_input")
    hidden = hidden_of(keys)
    found = keys.natural("vocab_size_per_layer_input") * layers * size
    found += hidden * layers * size + layers * 2 * hidden * size
    if keys.kind == "gemma3n_text":
        found += layers * 2 * hidden * keys.natural("laurel_rank")
        found += 6 * hidden * hidden
    return found


def _shared_blocks(keys: ConfigKeys) -> int:
    """Zamba2's transformer blocks, which several layers share, and their adapters."""
    if keys.kind != "zamba2":
        return 0
    hidden, blocks = hidden_of(keys), keys.optional("num_mem_blocks") or 1
    heads, size = heads_of(keys), head_dim_of(keys)
    wide = _shared_width(keys)
    block = 2 * hidden * 3 * heads * size + heads * size * hidden + 3 * hidden * wide
    uses = names_of_layers(keys).count("hybrid")
    rank = keys.natural("adapter_rank")
    adapters = rank * (hidden + 2 * wide)
    if keys.flag("use_shared_attention_adapter"):
        adapters += 3 * rank * (2 * hidden + heads * size)
    return blocks * block + uses * (hidden * hidden + adapters)


def _shared_width(keys: ConfigKeys) -> int:
    return keys.optional("intermediate_size") or 4 * hidden_of(keys)


def beside_layers(keys: ConfigKeys, layers: int) -> tuple[LayerKind, ...]:
    """Attention that stands beside the state space in the same layer."""
    if keys.kind == "falcon_h1":
        mixer = plain_attention(keys)
        return (
            LayerKind(
                count=layers,
                cache=mixer.cache,
                mixer=mixer.parameters,
                attention=mixer.attention,
            ),
        )
    uses = names_of_layers(keys).count("hybrid") if keys.kind == "zamba2" else 0
    if not uses:
        return ()
    values = 2 * kv_heads_of(keys) * head_dim_of(keys)
    return (
        LayerKind(
            count=uses,
            cache=Cache(kind=CacheKind.FULL, values=values, heads=kv_heads_of(keys)),
            attention=heads_of(keys) * head_dim_of(keys),
            dense_width=_shared_width(keys),
        ),
    )


def _tower(part: Mapping[str, Any], key: str, text_hidden: int) -> int:
    """An encoder of images or sound: its layers, patches, and the projector to the text."""
    hidden = _first(part, "embed_dim", "hidden_size", "d_model") or 0
    kind = str(part.get("model_type", ""))
    if kind == "qwen2_5_vl":
        hidden = _first(part, "hidden_size") or hidden
    layers = _first(part, "depth", "num_hidden_layers", "encoder_layers") or 0
    if not hidden or not layers:
        return 0
    ratio = part.get("mlp_ratio")
    wide = _first(part, "intermediate_size", "encoder_ffn_dim") or int(
        hidden * (ratio if isinstance(ratio, int | float) else 4)
    )
    if kind in _GLM_TOWERS:
        # Their MLPs have the width of the text; the merger has the one that is given.
        text, merge = _first(part, "out_hidden_size") or text_hidden, 2
        merger = text * (text + 3 * wide + hidden * merge * merge)
        return layers * (4 * hidden * hidden + 3 * hidden * text) + merger
    matrices = 3 if kind in _GATED_TOWERS else 2
    body = layers * (4 * hidden * hidden + matrices * hidden * wide)
    if key == "audio_config":
        return body + hidden * text_hidden
    patch = part.get("patch_size")
    patch = patch if isinstance(patch, int) else 14
    temporal = part.get("temporal_patch_size")
    temporal = temporal if isinstance(temporal, int) else 1
    image = part.get("image_size")
    positions = (image // patch) ** 2 if isinstance(image, int) else 0
    positions = _first(part, "num_position_embeddings") or positions
    embedding = hidden * (3 * temporal * patch * patch + positions)
    merged_by = _first(part, "spatial_merge_size")
    merged = hidden * merged_by * merged_by if merged_by else hidden
    out = _first(part, "out_hidden_size") or text_hidden
    mergers = 1 + len(part.get("deepstack_visual_indexes") or ())
    projector = merged * merged + merged * out if merged_by else merged * out
    return int(body + embedding + mergers * projector)


def _first(part: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = part.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
