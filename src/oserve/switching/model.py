"""Reads from a checkpoint's folder what must be known of a model to move its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oserve.core import OServeError, Precision
from oserve.perf.model import find_model
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
    engines keep their weights as loaded. ``variants``: folders of quantised checkpoints by
    precision; on GPUs these are not kept as loaded, so they are left out.
    """
    if not keep_weights:
        raise OServeError(
            "engines do not keep their weights as loaded",
            place="engines.keep_weights",
            remedy="set it to true",
        )
    facts = find_model(name)
    config = _config(name)
    architectures = config.get("architectures") or [""]
    architecture = architecture_of(facts, str(architectures[0]))
    if facts.experts > 1 and not on_cpu:
        raise OServeError(
            "weights of mixtures are not moved between GPUs, where kernels shuffle them",
            place="model",
            remedy="roll out by restarts",
        )
    formats = {precision: format_of(precision) for precision in _FLOATS.values()}
    for wanted, variant in (variants if on_cpu else {}).items():
        precision = Precision(wanted)
        if precision not in formats:
            formats[precision] = _format(precision, _config(variant))
    return MovableModel(architecture=architecture, formats=formats)


def _config(model: str) -> dict[str, Any]:
    """The model's config.json; empty where it is not in a folder."""
    file = Path(model) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _format(precision: Precision, config: Mapping[str, Any]) -> WeightFormat:
    """Of a quantised checkpoint, as far as its config.json tells."""
    plain = _FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")), Precision.BF16)
    held = WeightFormat(precision=precision, plain=plain)
    groups = config.get("quantization_config", {}).get("config_groups", {})
    for group in groups.values():
        size = group.get("weights", {}).get("group_size")
        if size:
            return WeightFormat(precision=precision, plain=plain, group_size=int(size))
    return held
