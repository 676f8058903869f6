"""What must be known of a model to move its weights: layout, and the formats of its checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oserve.config import Settings
from oserve.core import OServeError, Precision, ReplicaSpec, VllmBackend
from oserve.perf.model import find_model
from oserve.switch.layout import Architecture, Layout, Placed, architecture_of
from oserve.switch.precision import Format, format_of

_FLOATS = {
    "float32": Precision.FP32,
    "bfloat16": Precision.BF16,
    "float16": Precision.FP16,
}
# Of an engine's own arguments, those after which weights are others or lie otherwise.
_DECISIVE = (
    "--model",
    "--revision",
    "--dtype",
    "--quantization",
    "--load-format",
    "--hf-overrides",
    "--enable-expert-parallel",
    "--enable-lora",
    "--speculative-config",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--worker-extension-cls",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovableModel:
    """``formats``: how replicas of each precision hold their weights."""

    architecture: Architecture
    formats: Mapping[Precision, Format]

    def placed(self, spec: ReplicaSpec) -> Placed:
        """A replica's layout. Raises OServeError where it is not known."""
        refused = _refusal(spec)
        held = self.formats.get(spec.shape.precision)
        if held is None:
            refused = f"its {spec.shape.precision} weights are not kept, or not known"
        if refused or held is None:
            raise OServeError(
                f"replica {spec.id}: {refused}", place="switch", remedy="roll out by restarts"
            )
        layout = Layout(
            tensor_parallel_size=spec.shape.tensor_parallel_size,
            pipeline_parallel_size=spec.shape.pipeline_parallel_size,
            held=held,
        )
        return Placed(replica=spec.id, layout=layout, devices=spec.devices)


def movable_model(settings: Settings, *, on_cpu: bool) -> MovableModel:
    """Of the model that is served. Raises OServeError, with the reason, if it cannot be moved.

    On GPUs quantised weights are not kept as loaded.
    """
    if not settings.engines.keep_weights:
        raise OServeError(
            "engines do not keep their weights as loaded",
            place="engines.keep_weights",
            remedy="set it to true",
        )
    facts = find_model(settings.model)
    config = _config(settings.model)
    architectures = config.get("architectures") or [""]
    architecture = architecture_of(facts, str(architectures[0]))
    if facts.experts > 1 and not on_cpu:
        raise OServeError(
            "weights of mixtures are not moved between GPUs, where kernels shuffle them",
            place="model",
            remedy="roll out by restarts",
        )
    formats = {precision: format_of(precision) for precision in _FLOATS.values()}
    variants = settings.engines.variants if on_cpu else {}
    for name, variant in variants.items():
        precision = Precision(name)
        if precision not in formats:
            formats[precision] = _format(precision, _config(variant))
    return MovableModel(architecture=architecture, formats=formats)


def _refusal(spec: ReplicaSpec) -> str:
    if not isinstance(spec.backend, VllmBackend):
        return "it is attached"
    words = {argument.partition("=")[0] for argument in spec.backend.engine_args}
    found = words.intersection(_DECISIVE)
    return f"its own {min(found)} decides how its weights lie" if found else ""


def _config(model: str) -> dict[str, Any]:
    """The model's config.json; empty where it is not in a folder."""
    file = Path(model) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _format(precision: Precision, config: Mapping[str, Any]) -> Format:
    """Of a quantised checkpoint, as far as its config.json tells."""
    plain = _FLOATS.get(str(config.get("torch_dtype") or config.get("dtype")), Precision.BF16)
    held = Format(precision=precision, plain=plain)
    groups = config.get("quantization_config", {}).get("config_groups", {})
    for group in groups.values():
        size = group.get("weights", {}).get("group_size")
        if size:
            return Format(precision=precision, plain=plain, group_size=int(size))
    return held
