"""The size of a checkpoint's weights as they are stored, from its ``quantization_config``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oserve.core import OServeError

# Blocks of 32 values share an 8-bit scale; blocks of 16 an 8-bit one.
_MXFP4_BYTES = 0.5 + 1.0 / 32
_NVFP4_BYTES = 0.5 + 1.0 / 16
_SCALE_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """Bytes per weight of the linear layers, and of the experts where these differ."""

    linear_bytes: float
    expert_bytes: float


def stored_weights(config: Mapping[str, Any], *, place: str) -> StoredWeights | None:
    """How the weights are stored; ``None`` if they are not quantised.

    Embeddings and the LM head are taken as 16 bits. Raises OServeError for an unknown method.
    """
    found = config.get("quantization_config")
    for key in ("text_config", "llm_config"):
        inner = config.get(key)
        if found is None and isinstance(inner, Mapping):
            found = inner.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method = str(found.get("quant_method") or found.get("quant_algo") or "").lower()
    if method == "mxfp4":
        # Of gpt-oss, only the experts are quantised.
        return StoredWeights(linear_bytes=2.0, expert_bytes=_MXFP4_BYTES)
    size = _linear_bytes(method, found)
    if size is None:
        raise OServeError(
            f"the quantisation {method or 'without a method'} is not known",
            place=f"{place}:quantization_config",
            remedy="state the precision (--precision), or profile the model: oserve profile",
        )
    return StoredWeights(linear_bytes=size, expert_bytes=size)


def _linear_bytes(method: str, found: Mapping[str, Any]) -> float | None:
    if method in {"fp8", "fbgemm_fp8", "modelopt"} and "4" not in str(found.get("quant_algo", "")):
        return 1.0
    if method in {"modelopt_fp4", "nvfp4"} or "FP4" in str(found.get("quant_algo", "")):
        return _NVFP4_BYTES
    if method == "bitsandbytes":
        return 1.0 if found.get("load_in_8bit") else 0.5 + 4.0 / 64
    if method in {"gptq", "awq", "auto-round", "gptq_marlin", "awq_marlin"}:
        return _grouped(found.get("bits", 4), found.get("group_size", 128))
    if method == "compressed-tensors":
        groups = found.get("config_groups")
        first: object = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
        weights = first.get("weights") if isinstance(first, Mapping) else None
        if isinstance(weights, Mapping):
            return _grouped(weights.get("num_bits", 8), weights.get("group_size"))
    return None


def _grouped(bits: object, group: object) -> float | None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16:
        return None
    scale = _SCALE_BYTES / group if isinstance(group, int) and group > 0 else 0.0
    return bits / 8 + scale
