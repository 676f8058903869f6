"""The context of a model by its configuration, as vLLM derives ``max_model_len``."""

from collections.abc import Mapping
from typing import Any

from oserve.core import OServeError
from oserve.perf.config_keys import ConfigKeys

# The smallest of those that are given counts.
_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# What vLLM assumes without any.
_UNKNOWN = 2048
# With these, max_position_embeddings is the scaled length already, or is not scaled.
_UNSCALED_TYPES = "su longrope llama3 yarn deepseek_yarn deepseek_llama_scaling default mrope"
_UNSCALED = frozenset(_UNSCALED_TYPES.split())


def max_model_len(keys: ConfigKeys) -> int:
    """The longest request in tokens that vLLM allows by default."""
    lengths = [found for key in _KEYS if (found := _length(keys, key)) is not None]
    length = keys.optional("model_max_length") or min(lengths, default=_UNKNOWN)
    rope = _rope(keys)
    types = [str(one.get("rope_type") or one.get("type") or "default") for one in rope]
    if "longrope" in types or "su" in types:
        original = keys.optional("original_max_position_embeddings")
        inner = next((one.get("original_max_position_embeddings") for one in rope), None)
        return original or (inner if isinstance(inner, int) else length)
    factor = 1.0
    if "gemma3" not in str(keys.outer.get("model_type")):
        for kind, one in zip(types, rope, strict=True):
            given = one.get("factor")
            if kind not in _UNSCALED and isinstance(given, int | float):
                factor = float(given)
    return int(length * factor)


def _length(keys: ConfigKeys, key: str) -> int | None:
    value = keys.value(key)
    if isinstance(value, float) and value == int(value):
        return int(value)
    return keys.optional(key)


def _rope(keys: ConfigKeys) -> list[Mapping[str, Any]]:
    """The rotary settings: one, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        value = keys.value(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise OServeError(
                f"{name} is {value!r}, not an object",
                place=f"{keys.place}:{name}",
                remedy="correct it",
            )
        nested = [one for one in value.values() if isinstance(one, Mapping)]
        return nested or [value]
    return []
