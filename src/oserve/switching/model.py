"""Reads the facts of a model that weight transfers need from its checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from oserve.core import OServeError, Precision
from oserve.perf.known_models import find_model
from oserve.switch.layout import architecture_of
from oserve.switch.model import MovableModel
from oserve.switch.precision import WeightFormat, format_of

_FLOATS = {
    "float32": Precision.FP32,
    "bfloat16": Precision.BF16,
    "float16": Precision.FP16,
}


def movable_model(
    name: str, *, keep_weights: bool, variants: Mapping[str, str], on_cpu: bool
) -> MovableModel:
    """Return the facts of a served model. Raises OServeError if its weights cannot be moved.

    ``name``: the checkpoint's folder, or a name that ``perf.model`` knows. ``keep_weights``:
    engines hold raw weights. ``variants``: folders of quantised checkpoints by precision; they are
    left out on GPUs, whose kernels repack them.
    """
    if not keep_weights:
        raise OServeError(
            "engines do not keep raw weights",
            place="engines.keep_weights",
            remedy="set it to true",
        )
    facts = find_model(name)
    config = _config(name)
    architecture = architecture_of(facts, (config.architectures or [""])[0])
    if facts.experts > 1 and not on_cpu:
        raise OServeError(
            "weights of mixtures do not move between GPUs, whose kernels repack them",
            place="model",
            remedy="roll out by restarts",
        )
    formats = {precision: format_of(precision) for precision in _FLOATS.values()}
    for wanted, variant in (variants if on_cpu else {}).items():
        precision = Precision(wanted)
        if precision not in formats:
            formats[precision] = _format(precision, _config(variant))
    return MovableModel(architecture=architecture, formats=formats)


class _QuantisedWeights(msgspec.Struct):
    group_size: int | None = None


class _ConfigGroup(msgspec.Struct):
    weights: _QuantisedWeights | None = None


class _QuantisationConfig(msgspec.Struct):
    """The quantisation config of compressed-tensors."""

    config_groups: dict[str, _ConfigGroup] = {}


class _ModelConfig(msgspec.Struct):
    """The fields of a Hugging Face config.json that weight transfers need."""

    architectures: list[str] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: _QuantisationConfig | None = None


_MODEL_CONFIG_DECODER = msgspec.json.Decoder(_ModelConfig)


def _config(model: str) -> _ModelConfig:
    """Return the model's config.json; an empty one if it is missing or unreadable."""
    try:
        return _MODEL_CONFIG_DECODER.decode((Path(model) / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return _ModelConfig()


def _format(precision: Precision, config: _ModelConfig) -> WeightFormat:
    """Return the format of a quantised checkpoint, as far as its config.json describes it."""
    plain = _FLOATS.get(config.torch_dtype or config.dtype or "", Precision.BF16)
    quantised = config.quantization_config or _QuantisationConfig()
    sizes = [
        group.weights.group_size
        for group in quantised.config_groups.values()
        if group.weights is not None and group.weights.group_size
    ]
    if not sizes:
        return WeightFormat(precision=precision, plain=plain)
    return WeightFormat(precision=precision, plain=plain, group_size=sizes[0])
