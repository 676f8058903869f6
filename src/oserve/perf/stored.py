"""The size of a checkpoint's weights as they are stored, from its ``quantization_config``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oserve.core import OServeError
from oserve.perf.checked import WITHOUT_FACTS

# Blocks of 32 values share an 8-bit scale; blocks of 16 an 8-bit one.
_MXFP4_BYTES = 0.5 + 1.0 / 32
_MXFP8_BYTES = 1.0 + 1.0 / 32
_NVFP4_BYTES = 0.5 + 1.0 / 16
_SCALE_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """Bytes per weight of the linear layers, and of the experts where these differ.

    ``block``: square blocks of weights share a scale, so no rank may hold a part of one; 0 without.
    ``divides_experts``: vLLM makes the experts' blocks smaller where tensor parallelism needs it.
    """

    linear_bytes: float
    expert_bytes: float
    block: int = 0
    divides_experts: bool = False


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
    algorithm = _algorithm(found)
    method = str(found.get("quant_method") or ("modelopt" if algorithm else "")).lower()
    if method == "mxfp4":
        # Of gpt-oss, only the experts are quantised.
        return StoredWeights(linear_bytes=2.0, expert_bytes=_MXFP4_BYTES)
    size = _linear_bytes(method, algorithm, found)
    if size is None:
        named = " ".join(one for one in (method, algorithm) if one) or "without a method"
        raise OServeError(
            f"the size of weights quantised by {named} is not known",
            place=f"{place}:quantization_config",
            remedy="plan with the config.json of the unquantised model and --precision fp8, int8 "
            f"or int4, or {WITHOUT_FACTS}",
        )
    return StoredWeights(
        linear_bytes=size,
        expert_bytes=size,
        block=_block(found),
        divides_experts=method == "fp8",
    )


def _algorithm(found: Mapping[str, Any]) -> str:
    """ModelOpt's name of the format, which older files nest."""
    nested = found.get("quantization")
    inner = nested.get("quant_algo") if isinstance(nested, Mapping) else None
    return str(found.get("quant_algo") or inner or "").upper()


def _linear_bytes(method: str, algorithm: str, found: Mapping[str, Any]) -> float | None:
    if method in {"fp8", "fbgemm_fp8"}:
        return 1.0
    if method in {"modelopt", "modelopt_fp4", "nvfp4"}:
        return _modelopt_bytes(method, algorithm)
    if method == "bitsandbytes":
        return 1.0 if found.get("load_in_8bit") else 0.5 + 4.0 / 64
    if method in {"gptq", "awq", "auto-round", "gptq_marlin", "awq_marlin"}:
        return _grouped(found.get("bits", 4), found.get("group_size", 128))
    if method == "compressed-tensors":
        weights = _first_weights(found)
        return _grouped(weights.get("num_bits", 8), weights.get("group_size")) if weights else None
    return None


def _modelopt_bytes(method: str, algorithm: str) -> float | None:
    if algorithm == "NVFP4" or (method != "modelopt" and not algorithm):
        return _NVFP4_BYTES
    if algorithm.startswith("FP8"):
        return 1.0
    return _MXFP8_BYTES if algorithm == "MXFP8" else None


def _first_weights(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the first group of compressed-tensors stores its weights."""
    groups = found.get("config_groups")
    first: object = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _block(found: Mapping[str, Any]) -> int:
    """The longer side of the blocks that share a scale; 0 without."""
    sides = found.get("weight_block_size") or _first_weights(found).get("block_structure")
    if not isinstance(sides, list | tuple):
        return 0
    return max((side for side in sides if type(side) is int and side > 0), default=0)


def _grouped(bits: object, group: object) -> float | None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16:
        return None
    scale = _SCALE_BYTES / group if isinstance(group, int) and group > 0 else 0.0
    return bits / 8 + scale
