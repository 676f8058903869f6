"""How a ``quantization_config`` stores each module of a model, in bytes per weight.

Scales and zero points are included. Checkpoints name what they keep in 16 bits, and what they store
otherwise, by whole names, parts of names, wildcards or regular expressions (``re:``): see
``Named``. Follows vllm/model_executor/layers/quantization (0.32).
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oserve.core import OServeError
from oserve.perf.checked import WITHOUT_FACTS
from oserve.perf.modules import HEAD_NAMES, OUTSIDE_NAMES, Module, layer_names

KEPT_BYTES = 2.0
# Blocks of 32 values share an 8-bit scale; blocks of 16 an 8-bit one.
_MXFP4_BYTES = 0.5 + 1.0 / 32
_MXFP8_BYTES = 1.0 + 1.0 / 32
_NVFP4_BYTES = 0.5 + 1.0 / 16
_SCALE_BYTES = 2.0
_FP8_BLOCK_SCALE_BYTES = 4.0
_NF4_BYTES = 0.5 + 4.0 / 64
# Marlin and Triton kernels of gpt-oss: see mxfp4_round_up_hidden_size_and_intermediate_size.
_MXFP4_UNIT = 64
_MODELOPT = {
    "FP8": 1.0,
    "FP8_PER_CHANNEL_PER_TOKEN": 1.0,
    "FP8_PB_WO": 1.0,
    "FP8_BLOCK_SCALES": 1.0,
    "NVFP4": _NVFP4_BYTES,
    "W4A16_NVFP4": _NVFP4_BYTES,
    "MXFP8": _MXFP8_BYTES,
    "MXFP4": _MXFP4_BYTES,
}
_NOT_READ = (
    "vLLM 0.32 does not read checkpoints quantised by bitsandbytes: the plan is for another engine"
)
_MIXED = "MIXED_PRECISION"
_GROUPED = frozenset({"gptq", "awq", "auto-round", "gptq_marlin", "awq_marlin", "inc"})
_WILD = frozenset("*?[")
# What stands before the layers of a language model, unlike those of a tower.
_TEXT = re.compile(r"(?:(?:model|language_model|backbone|transformer|decoder)\.)*(?=layers\.\d)")


class Named:
    """Modules that a list of a configuration names.

    An entry holds for a module of that name, for those inside it, and, without ``layers``, for
    modules of that name in any layer.
    """

    def __init__(self, entries: Iterable[object], *, expressions: bool = False) -> None:
        self._literals: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        for entry in entries:
            text = str(entry)
            if expressions or text.startswith("re:"):
                self._patterns.append(_compiled(text.removeprefix("re:")))
            elif _WILD & set(text):
                for glob in (text, f"{text}.*", f"*.{text}", f"*.{text}.*"):
                    self._patterns.append(re.compile(fnmatch.translate(glob)))
            else:
                self._literals.add(_canonical(text))

    def holds(self, names: Sequence[str]) -> bool:
        """Whether it names a module that has one of these full names."""
        if self._literals and any(
            part in self._literals for name in names for part in _parts(_canonical(name))
        ):
            return True
        return any(pattern.match(name) for pattern in self._patterns for name in names)


class Quantisation:
    """Bytes per weight of each module.

    ``linear`` and ``expert`` are those of modules that no rule names, ``head`` of the LM head and
    ``outside`` of towers. The first rule that holds counts. ``block``, ``divides_experts`` and
    ``expert_unit`` and ``caveat``: see ``StoredWeights``.
    """

    def __init__(
        self,
        *,
        linear: float,
        expert: float | None = None,
        head: float = KEPT_BYTES,
        outside: float | None = None,
        rules: Sequence[tuple[Named, float]] = (),
        block: int = 0,
        divides_experts: bool = False,
        expert_unit: int = 1,
        caveat: str = "",
    ) -> None:
        self._linear = linear
        self._expert = linear if expert is None else expert
        self._head = head
        self._outside = linear if outside is None else outside
        self._rules = tuple(rules)
        self.block = block
        self.divides_experts = divides_experts
        self.expert_unit = expert_unit
        self.caveat = caveat

    def bytes_of(self, layer: int, module: Module) -> float:
        """Bytes per weight of a module of a layer."""
        if not module.linear:
            return KEPT_BYTES
        default = self._expert if ".experts." in module.name else self._linear
        return self._by_rule(layer_names(layer, module.name), default)

    @property
    def head_bytes(self) -> float:
        """Bytes per weight of the LM head."""
        return self._by_rule(HEAD_NAMES, self._head)

    @property
    def outside_bytes(self) -> float:
        """Bytes per weight of the towers' layers."""
        return self._by_rule(OUTSIDE_NAMES, self._outside)

    def _by_rule(self, names: Sequence[str], default: float) -> float:
        return next((size for named, size in self._rules if named.holds(names)), default)


def quantisation_of(config: Mapping[str, Any], *, place: str) -> Quantisation | None:
    """How the weights are stored; ``None`` if they are not quantised.

    Embeddings are taken as 16 bits. Raises OServeError for an unknown method.
    """
    found = _found(config)
    if found is None:
        return None
    algorithm = _algorithm(found)
    method = str(found.get("quant_method") or ("modelopt" if algorithm else "")).lower()
    try:
        made = _made(method, algorithm, found)
    except re.error as error:
        raise OServeError(
            f"it has a regular expression that is none: {error}",
            place=f"{place}:quantization_config",
            remedy="correct it",
        ) from None
    if made is None:
        named = " ".join(one for one in (method, algorithm) if one) or "without a method"
        raise OServeError(
            f"the size of weights quantised by {named} is not known",
            place=f"{place}:quantization_config",
            remedy="plan with the config.json of the unquantised model and --precision fp8, int8 "
            f"or int4, or {WITHOUT_FACTS}",
        )
    return made


def _found(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    places = [config]
    places += [
        inner
        for key in ("text_config", "llm_config", "language_config")
        if isinstance(inner := config.get(key), Mapping)
    ]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, Mapping):
                return found
    return None


def _made(method: str, algorithm: str, found: Mapping[str, Any]) -> Quantisation | None:
    if method == "mxfp4":
        # Of gpt-oss, only the experts are quantised.
        return Quantisation(
            linear=KEPT_BYTES, expert=_MXFP4_BYTES, rules=_kept(found), expert_unit=_MXFP4_UNIT
        )
    if method in {"fp8", "fbgemm_fp8"}:
        scales = _scales(found.get("weight_block_size"))
        return Quantisation(
            linear=1.0 + scales,
            rules=_kept(found),
            block=_block(found.get("weight_block_size")),
            divides_experts=method == "fp8",
        )
    if method in {"modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "nvfp4"}:
        return _by_modelopt(method, algorithm, found)
    if method == "bitsandbytes":
        size = 1.0 if found.get("load_in_8bit") else _NF4_BYTES
        return Quantisation(linear=size, rules=_kept(found), caveat=_NOT_READ)
    if method in _GROUPED:
        return _by_groups(found)
    return _by_compressed_tensors(found) if method == "compressed-tensors" else None


def _kept(found: Mapping[str, Any]) -> list[tuple[Named, float]]:
    """What stays in 16 bits."""
    names = (
        "modules_to_not_convert",
        "ignored_layers",
        "ignore",
        "exclude_modules",
        "llm_int8_skip_modules",
    )
    nested = found.get("quantization")
    places = [found, nested] if isinstance(nested, Mapping) else [found]
    entries = [entry for place in places for name in names for entry in _list(place.get(name))]
    return [(Named(entries), KEPT_BYTES)] if entries else []


def _algorithm(found: Mapping[str, Any]) -> str:
    """ModelOpt's name of the format, which older files nest."""
    nested = found.get("quantization")
    inner = nested.get("quant_algo") if isinstance(nested, Mapping) else None
    return str(found.get("quant_algo") or inner or "").upper()


def _by_modelopt(method: str, algorithm: str, found: Mapping[str, Any]) -> Quantisation | None:
    if algorithm == _MIXED or method == "modelopt_mixed":
        nested = found.get("quantization")
        layers = found.get("quantized_layers")
        if layers is None and isinstance(nested, Mapping):
            layers = nested.get("quantized_layers")
        return _by_layers(layers, found) if isinstance(layers, Mapping) else None
    default = {"modelopt_fp4": "NVFP4", "nvfp4": "NVFP4", "modelopt_mxfp8": "MXFP8"}
    size = _MODELOPT.get(algorithm or default.get(method, ""))
    if size is None:
        return None
    # Also the LM head, unless it is left out by name; towers never are.
    return Quantisation(linear=size, head=size, outside=KEPT_BYTES, rules=_kept(found))


def _by_layers(layers: Mapping[str, Any], found: Mapping[str, Any]) -> Quantisation | None:
    """Formats by module; what is not named stays in 16 bits."""
    own: dict[float, list[str]] = {}
    for name, how in layers.items():
        chosen = str(how.get("quant_algo", "")).upper() if isinstance(how, Mapping) else ""
        size = _MODELOPT.get(chosen)
        if size is None:
            return None
        own.setdefault(size, []).append(name)
    rules = [(Named(names), size) for size, names in own.items()]
    return Quantisation(
        linear=KEPT_BYTES, outside=KEPT_BYTES, rules=[*_kept(found), *rules], head=KEPT_BYTES
    )


def _by_groups(found: Mapping[str, Any]) -> Quantisation | None:
    """GPTQ, AWQ and AutoRound: groups of weights share a scale and a zero point."""
    bits, group = found.get("bits", found.get("w_bit", 4)), found.get("group_size", 128)
    size = _grouped(bits, group, zeros=True)
    if size is None:
        return None
    rules = _kept(found)
    # GPTQModel's rules start with + or -; AutoRound's name modules.
    for key, text in (("dynamic", True), ("extra_config", False)):
        changed = found.get(key)
        for name, how in changed.items() if isinstance(changed, Mapping) else ():
            other = how if isinstance(how, Mapping) else {}
            own = _grouped(other.get("bits", bits), other.get("group_size", group), zeros=True)
            without = name.startswith("-:") or other.get("bits") == 16
            named = Named([re.sub(r"^[+-]:", "", name)], expressions=text)
            rules.append((named, KEPT_BYTES if without or own is None else own))
    head = size if found.get("lm_head") is True else KEPT_BYTES
    return Quantisation(linear=size, head=head, outside=KEPT_BYTES, rules=rules)


def _by_compressed_tensors(found: Mapping[str, Any]) -> Quantisation | None:
    """Groups of targets: classes of modules, or modules by name, which count first."""
    groups = found.get("config_groups")
    linear, rules, block = KEPT_BYTES, _kept(found), 0
    known = False
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        size = _compressed(weights)
        if size is None:
            return None
        known = True
        block = max(block, _block(weights.get("block_structure")))
        targets = [str(one) for one in _list(group.get("targets"))] or ["Linear"]
        named = [one for one in targets if "." in one or one.startswith("re:")]
        classes = [one for one in targets if one not in named]
        if any("linear" in one.lower() or "moe" in one.lower() for one in classes):
            linear = size
        named += [one for one in classes if one == "lm_head"]
        if named:
            rules.append((Named(named), size))
    return Quantisation(linear=linear, rules=rules, block=block) if known else None


def _compressed(weights: Mapping[str, Any]) -> float | None:
    bits, group = weights.get("num_bits", 8), weights.get("group_size")
    if weights.get("type") == "float" and isinstance(group, int) and group > 0:
        # nvfp4 and mxfp4: 8-bit scales.
        return bits / 8 + 1.0 / group if type(bits) is int else None
    zeros = weights.get("symmetric") is False
    size = _grouped(bits, group, zeros=zeros)
    return None if size is None else size + _scales(weights.get("block_structure"))


def _block(sides: object) -> int:
    """The longer side of the blocks that share a scale; 0 without."""
    if not isinstance(sides, list | tuple):
        return 0
    return max((side for side in sides if type(side) is int and side > 0), default=0)


def _scales(sides: object) -> float:
    """Bytes per weight of one scale a block."""
    if not isinstance(sides, list | tuple):
        return 0.0
    area = 1
    for side in sides:
        area *= side if type(side) is int and side > 0 else 1
    return _FP8_BLOCK_SCALE_BYTES / area if area > 1 else 0.0


def _grouped(bits: object, group: object, *, zeros: bool) -> float | None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16:
        return None
    if not isinstance(group, int) or group <= 0:
        return bits / 8
    return bits / 8 + (_SCALE_BYTES + (bits / 8 if zeros else 0.0)) / group


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _canonical(name: str) -> str:
    """The name from ``layers`` of the language model on, or without the outermost ``model``."""
    text = _TEXT.match(name)
    return name[text.end() :] if text else name.removeprefix("model.")


def _parts(name: str) -> Iterable[str]:
    """All runs of components of a dotted name."""
    pieces = name.split(".")
    for start in range(len(pieces)):
        for end in range(start + 1, len(pieces) + 1):
            yield ".".join(pieces[start:end])
