"""Which mixer each layer of a configuration has: the patterns by which models mix them."""

from enum import StrEnum

from oserve.core import OServeError
from oserve.perf.checked import WITHOUT_FACTS
from oserve.perf.config_keys import ConfigKeys


class MixerType(StrEnum):
    """A layer's mixer. ``SHARED``: attention that reads an earlier layer's cache."""

    FULL = "full"
    WINDOW = "window"
    CHUNK = "chunk"
    SHARED = "shared"
    LATENT = "latent"
    MAMBA1 = "mamba1"
    MAMBA2 = "mamba2"
    DELTA = "delta"
    CONVOLUTION = "convolution"
    NONE = "none"


_NAMED = {
    "full_attention": MixerType.FULL,
    "attention": MixerType.FULL,
    "sliding_attention": MixerType.WINDOW,
    "chunked_attention": MixerType.CHUNK,
    "conv": MixerType.CONVOLUTION,
    "mlp": MixerType.NONE,
    "moe": MixerType.NONE,
    "hybrid": MixerType.MAMBA2,
}
# The letters of Nemotron-H's pattern: state space, attention, MLP, experts.
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
# Every so many layers one attends to everything, if the configuration does not say.
_PERIODS = {
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "cohere2": 4,
    "cohere2_moe": 4,
    "granite_swa": 4,
    "granitemoe_swa": 4,
    "olmo3": 4,
    "exaone4": 4,
    "exaone_moe": 4,
    "afmoe": 4,
    "gpt_oss": 2,
}
_DELTA_TYPES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
_STATE_TYPES = frozenset({"mamba", "falcon_mamba"})
# These have one window for all layers whenever it is given.
_ALL_WINDOWED = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
_LATENT_KEY = "kv_lora_rank"


def names_of_layers(keys: ConfigKeys) -> tuple[str, ...]:
    """The types of layers as the configuration lists them, in transformers' words; or none."""
    pattern = keys.value("hybrid_override_pattern")
    if isinstance(pattern, str):
        odd = set(pattern) - set(PATTERN)
        if odd:
            raise OServeError(
                f"it has unknown letters: {', '.join(sorted(odd))}",
                place=f"{keys.place}:hybrid_override_pattern",
                remedy="use " + " ".join(PATTERN),
            )
        return tuple(PATTERN[letter] for letter in pattern)
    return tuple(str(name) for name in keys.list("layers_block_type", "layer_types"))


def layer_count(keys: ConfigKeys) -> int:
    """The number of layers; a list of their types counts more than a number."""
    blocks = keys.list("block_configs")
    if blocks or keys.kind == "nemotron-nas":
        if not blocks:
            raise OServeError(
                "the field block_configs is missing, which says how its layers differ",
                place=keys.place,
                remedy="give a complete config.json",
            )
        return len(blocks)
    if keys.kind == "nemotron_h":
        named = names_of_layers(keys)
        if named:
            return len(named)
    return keys.count("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def mixer_types(keys: ConfigKeys, layers: int) -> list[MixerType]:
    """The mixer of each layer."""
    named = names_of_layers(keys)
    if named:
        if len(named) < layers:
            raise OServeError(
                f"it names {len(named)} layers of {layers}",
                place=f"{keys.place}:layer_types",
                remedy="name each layer",
            )
        types = [_by_name(keys, name) for name in named[:layers]]
    else:
        types = [_by_rule(keys, layer, layers) for layer in range(layers)]
    if keys.optional("sliding_window") is None:
        types = [MixerType.FULL if one is MixerType.WINDOW else one for one in types]
    shared = keys.natural("num_kv_shared_layers")
    attending = {MixerType.FULL, MixerType.WINDOW}
    return [
        MixerType.SHARED if layer >= layers - shared and one in attending else one
        for layer, one in enumerate(types)
    ]


def _by_name(keys: ConfigKeys, name: str) -> MixerType:
    if name in {"linear_attention", "mamba"}:
        if keys.kind in _DELTA_TYPES or keys.kind == "kimi_linear":
            return MixerType.DELTA
        return MixerType.MAMBA1 if keys.kind == "jamba" else MixerType.MAMBA2
    found = _NAMED.get(name)
    if found is None:
        raise OServeError(
            f"a layer of type {name!r} is not known",
            place=f"{keys.place}:layer_types",
            remedy=WITHOUT_FACTS,
        )
    if found is MixerType.FULL and keys.optional(_LATENT_KEY, least=0):
        return MixerType.LATENT
    return found


def _by_rule(keys: ConfigKeys, layer: int, layers: int) -> MixerType:  # noqa: PLR0911, PLR0912
    kind = keys.kind
    if kind in _STATE_TYPES:
        return MixerType.MAMBA1
    if kind in {"mamba2", "falcon_h1"}:
        return MixerType.MAMBA2
    if kind == "jamba":
        period, offset = keys.count("attn_layer_period"), keys.natural("attn_layer_offset")
        return MixerType.FULL if layer % period == offset else MixerType.MAMBA1
    if kind == "granitemoehybrid":
        return MixerType.MAMBA2
    if kind == "zamba2":
        return MixerType.MAMBA2
    if kind in _DELTA_TYPES:
        period = keys.optional("full_attention_interval") or 4
        return MixerType.DELTA if (layer + 1) % period else MixerType.FULL
    if kind == "kimi_linear":
        nested = keys.value("linear_attn_config")
        full = nested.get("full_attn_layers", ()) if isinstance(nested, dict) else ()
        return MixerType.LATENT if layer + 1 in full else MixerType.DELTA
    if kind in {"lfm2", "lfm2_moe"}:
        indices = keys.list("full_attn_idxs")
        return MixerType.CONVOLUTION if indices and layer not in indices else MixerType.FULL
    if kind == "llama4_text":
        chunked = keys.list("no_rope_layers")
        turned = bool(chunked[layer]) if layer < len(chunked) else bool((layer + 1) % 4)
        return MixerType.CHUNK if turned else MixerType.FULL
    if kind == "mimo_v2_flash":
        given = keys.list("hybrid_layer_pattern")
        windowed = bool(given[layer]) if layer < len(given) else layer > 0 and (layer + 1) % 6 != 0
        return MixerType.WINDOW if windowed else MixerType.FULL
    if keys.optional(_LATENT_KEY):
        return MixerType.LATENT
    if kind in _ALL_WINDOWED:
        return MixerType.WINDOW
    if kind in _PERIODS:
        return _periodic(keys, layer, layers)
    return _qwen_rule(keys, layer)


def _periodic(keys: ConfigKeys, layer: int, layers: int) -> MixerType:
    period = keys.value("sliding_window_pattern", "global_attn_every_n_layers")
    if isinstance(period, str):
        local = period[layer % len(period)] == "L" and layer + 1 < layers
        return MixerType.WINDOW if local else MixerType.FULL
    period = period if isinstance(period, int) and period > 0 else _PERIODS[keys.kind]
    if keys.kind == "gemma4_text" and layer + 1 == layers:
        return MixerType.FULL
    return MixerType.WINDOW if (layer + 1) % period else MixerType.FULL


def _qwen_rule(keys: ConfigKeys, layer: int) -> MixerType:
    """Qwen's and GLM's windows, which are off unless asked for, in the layers from one on."""
    first = keys.natural("max_window_layers")
    if keys.flag("use_sliding_window") and layer >= first:
        return MixerType.WINDOW
    return MixerType.FULL
