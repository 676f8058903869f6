"""Selection of the source of step times for a plan, and of the shapes that it covers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oserve.core import Device, OServeError, Precision, ReplicaShape
from oserve.perf import TokenCosts, token_costs
from oserve.perf.costs import measured_costs
from oserve.perf.device import Link, find_link
from oserve.perf.known_models import find_model
from oserve.perf.memory import kv_bytes_per_token
from oserve.perf.model import ModelFacts
from oserve.perf.profile import Profile, ProfileSource, read_profile, shipped_profile
from oserve.perf.shapes import ShapeChoices, candidate_shapes, refuse_no_fit
from oserve.perf.source import AiConfiguratorSource, RooflineSource
from oserve.perf.table import PerformanceSource

_CHUNKS = (512, 1024, 2048, 4096, 8192)
_SEQS = (128, 256)
# A CPU slot computes a hundredth of a GPU's work, so its steps must be smaller.
_CPU_CHUNKS = (256, 512, 1024, 2048)
_CPU_SEQS = (16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChoice:
    """The inputs to the choice of a source.

    ``network``: the link between nodes, a name in the catalogue or as measured.
    ``perf`` is what a person asked for, if anything: ``roofline``, ``aiconfigurator`` or a profile
    file. ``own_profile`` and ``brief_profile``, a rougher one, are used where they are and fit.
    """

    model: str
    devices: tuple[Device, ...]
    network: str | Link
    perf: str | None = None
    own_profile: Path | None = None
    brief_profile: Path | None = None
    context: int | None = None


def device_counts(devices: Sequence[Device]) -> tuple[dict[str, int], dict[str, int]]:
    """How many devices of each kind there are, and the most of it in one node."""
    total = Counter(device.kind for device in devices)
    nodes = Counter((device.kind, device.node) for device in devices)
    return dict(total), {
        kind: max(count for (own, _), count in nodes.items() if own == kind) for kind in total
    }


def find_source(choice: SourceChoice) -> tuple[ProfileSource | RooflineSource, int]:
    """The source, and the context length (tokens) that requests must fit."""
    model = find_model(choice.model)
    context = choice.context or model.max_model_len
    profiled = _profile(choice, model)
    if profiled is not None:
        return profiled, context
    _, nodes = device_counts(choice.devices)
    if "cpu" in nodes and choice.perf is None:
        raise OServeError(
            f"nothing was measured of {choice.model} on this CPU",
            place="--perf",
            remedy=f"measure it: oserve profile {choice.model}",
        )
    memory = {device.kind: device.memory_bytes for device in choice.devices if device.memory_bytes}
    make = AiConfiguratorSource if choice.perf == "aiconfigurator" else RooflineSource
    source = make(model, node_devices=nodes, network=choice.network, memory_bytes=memory)
    return source, context


def _profile(choice: SourceChoice, model: ModelFacts) -> ProfileSource | None:
    """The requested profile, the machine's own, a brief one, or a shipped one."""
    if choice.perf in {"roofline", "aiconfigurator"}:
        return None
    kinds = {device.kind for device in choice.devices}
    if choice.perf is not None:
        source = _source_of(read_profile(Path(choice.perf)), choice.perf, choice)
        kind = source.profile.device_kind
        if kinds != {kind}:
            raise OServeError(
                f"it was measured on {kind}, the cluster has {', '.join(sorted(kinds))}",
                place=choice.perf,
                remedy="plan for the devices it was measured on",
            )
        return source
    if len(kinds) != 1:
        return None
    for file, words in ((choice.own_profile, ""), (choice.brief_profile, " (measured briefly)")):
        if file is not None and file.is_file():
            profile = read_profile(file)
            if profile.device_kind in kinds and _same(profile.model, model):
                return _source_of(profile, f"{file}{words}", choice)
    shipped = shipped_profile(model, next(iter(kinds)))
    return None if shipped is None else _source_of(shipped[1], shipped[0], choice)


def _source_of(profile: Profile, name: str, choice: SourceChoice) -> ProfileSource:
    """A profile as a source for the devices of the choice."""
    _, nodes = device_counts(choice.devices)
    network = choice.network
    return ProfileSource(
        profile,
        name=name,
        node_devices=nodes.get(profile.device_kind),
        network=network if isinstance(network, Link) else find_link(network),
    )


def _same(one: ModelFacts, other: ModelFacts) -> bool:
    """Whether two models have the same sizes, whatever their names."""
    return replace(one, name="", max_model_len=0) == replace(other, name="", max_model_len=0)


def shapes_for(
    source: ProfileSource | RooflineSource, devices: Sequence[Device], choices: ShapeChoices
) -> tuple[ReplicaShape, ...]:
    """The shapes to consider; empty choices take the defaults. Raises OServeError if none fits."""
    counts, nodes = device_counts(devices)
    if isinstance(source, ProfileSource):
        return _profiled(source, counts, choices)
    filled = replace(
        choices,
        precisions=choices.precisions or (Precision.BF16,),
        max_num_batched_tokens=choices.max_num_batched_tokens or _CHUNKS,
        max_num_seqs=choices.max_num_seqs or _SEQS,
    )
    shapes = candidate_shapes(source.model, counts, filled, node_devices=nodes)
    refuse_no_fit(source, shapes, counts)
    return shapes


def _profiled(
    source: ProfileSource, counts: dict[str, int], choices: ShapeChoices
) -> tuple[ReplicaShape, ...]:
    """The measured shapes of the wanted sizes and precisions."""
    cpu = source.profile.device_kind == "cpu"
    shapes = source.shapes(
        max_num_batched_tokens=choices.max_num_batched_tokens or (_CPU_CHUNKS if cpu else _CHUNKS),
        max_num_seqs=choices.max_num_seqs or (_CPU_SEQS if cpu else _SEQS),
        kv_cache_memory_bytes=choices.kv_cache_memory_bytes,
    )
    wanted = tuple(
        shape
        for shape in shapes
        if shape.device_count <= sum(counts.values())
        and shape.tensor_parallel_size in choices.tensor_parallel_sizes
        and shape.pipeline_parallel_size in choices.pipeline_parallel_sizes
        and (not choices.precisions or shape.precision in choices.precisions)
    )
    if not wanted:
        known = ", ".join(sorted({shape.name.rpartition("-")[0] for shape in shapes}))
        raise OServeError(
            f"none of the shapes that may be used was measured; {known} were",
            place=source.origin,
            remedy="measure more (oserve profile --shape ...), or allow other shapes",
        )
    return wanted


def _kv_bytes(model: ModelFacts | None, shape: ReplicaShape) -> float:
    """KV cache of one token over all devices of a replica, in bytes."""
    if model is None:
        return 0.0
    whole = replace(shape, tensor_parallel_size=1, pipeline_parallel_size=1)
    return kv_bytes_per_token(model, whole)


def costs_from(source: PerformanceSource) -> Callable[[ReplicaShape, str], TokenCosts]:
    """Token costs of a shape: from the source if it covers the shape, else from the prior."""
    known: dict[ReplicaShape, TokenCosts] = {}

    def costs(shape: ReplicaShape, device_kind: str) -> TokenCosts:
        if shape not in known:
            placed = replace(shape, device_kind=device_kind)
            try:
                own = measured_costs(source.step_model(placed), placed)
            except OServeError:
                own = token_costs(shape, device_kind)
            model = getattr(source, "model", None)
            known[shape] = replace(own, kv_bytes_per_token=_kv_bytes(model, shape))
        return known[shape]

    return costs
