"""Which source of step times a plan goes by, and the shapes it can tell about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oserve.app.planning import device_counts
from oserve.core import Device, Precision, ReplicaShape
from oserve.perf.model import find_model
from oserve.perf.shapes import ShapeChoices, candidate_shapes, refuse_no_fit
from oserve.perf.source import AiConfiguratorSource, RooflineSource
from oserve.perf.table import PerformanceSource

_CHUNKS = (512, 1024, 2048, 4096, 8192)
_SEQS = (128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """What is known when a source is chosen; ``perf`` is what a person asked for, if anything."""

    model: str
    devices: tuple[Device, ...]
    network: str
    perf: str | None = None
    context: int | None = None


def find_source(choice: SourceChoice) -> tuple[PerformanceSource, int]:
    """The source, and the context in tokens that requests must fit."""
    model = find_model(choice.model)
    _, nodes = device_counts(choice.devices)
    memory = {device.kind: device.memory_bytes for device in choice.devices if device.memory_bytes}
    make = AiConfiguratorSource if choice.perf == "aiconfigurator" else RooflineSource
    source = make(model, node_devices=nodes, network=choice.network, memory_bytes=memory)
    return source, choice.context or model.max_model_len


def shapes_for(
    source: PerformanceSource, devices: Sequence[Device], choices: ShapeChoices
) -> tuple[ReplicaShape, ...]:
    """The shapes to consider; choices left empty take the defaults. Refuses what fits nowhere."""
    counts, nodes = device_counts(devices)
    filled = replace(
        choices,
        precisions=choices.precisions or (Precision.BF16,),
        max_num_batched_tokens=choices.max_num_batched_tokens or _CHUNKS,
        max_num_seqs=choices.max_num_seqs or _SEQS,
    )
    assert isinstance(source, RooflineSource)
    shapes = candidate_shapes(source.model, counts, filled, node_devices=nodes)
    refuse_no_fit(source, shapes, counts)
    return shapes
