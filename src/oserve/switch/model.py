"""What moving the weights of a model requires: its layout, and the formats of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import OServeError, Precision, ReplicaSpec, VllmBackend
from oserve.switch.layout import Architecture, Layout, ShardPlacement
from oserve.switch.precision import WeightFormat

# Engine arguments that change weights or their layout.
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
    formats: Mapping[Precision, WeightFormat]

    def placed(self, spec: ReplicaSpec) -> ShardPlacement:
        """Return a replica's layout. Raises OServeError if it is not known."""
        refused = _refusal(spec)
        held = self.formats.get(spec.shape.precision)
        if refused or held is None:
            unknown = f"its {spec.shape.precision} weights are not kept, or not known"
            raise OServeError(
                f"replica {spec.id}: {refused or unknown}",
                place="switch",
                remedy="roll out by restarts",
            )
        layout = Layout(
            tensor_parallel_size=spec.shape.tensor_parallel_size,
            pipeline_parallel_size=spec.shape.pipeline_parallel_size,
            held=held,
        )
        return ShardPlacement(replica=spec.id, layout=layout, devices=spec.devices)


def _refusal(spec: ReplicaSpec) -> str:
    """Return why the layout of a replica is not known; empty if it is."""
    if not isinstance(spec.backend, VllmBackend):
        return "it is attached"
    words = {argument.partition("=")[0] for argument in spec.backend.engine_args}
    found = words.intersection(_DECISIVE)
    return f"its own {min(found)} decides the layout of its weights" if found else ""
