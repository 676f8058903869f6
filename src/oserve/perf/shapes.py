"""The candidate replica shapes of a model on given kinds of devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.device import find_device
from oserve.perf.layers import Cache, LayerKind
from oserve.perf.memory import MemoryFit
from oserve.perf.model import ModelFacts
from oserve.perf.source import RooflineSource

# vLLM divides the blocks of experts' scales for tensor parallelism, but not finer than this: see
# refine_fp8_moe_block_shape in vllm/model_executor/layers/fused_moe/oracle/fp8.py (0.32).
_FINEST_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChoices:
    """The dimensions that vary.

    Under an SLO, chunk budget and ``max_num_seqs`` affect capacity more than TP does.
    """

    tensor_parallel_sizes: tuple[int, ...] = (1, 2, 4, 8)
    pipeline_parallel_sizes: tuple[int, ...] = (1, 2, 4)
    precisions: tuple[Precision, ...] = (Precision.BF16,)
    max_num_batched_tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    max_num_seqs: tuple[int, ...] = (128, 256)
    kv_cache_memory_bytes: int | None = None


def candidate_shapes(
    model: ModelFacts,
    devices: Mapping[str, int],
    choices: ShapeChoices | None = None,
    *,
    node_devices: Mapping[str, int] | None = None,
) -> tuple[ReplicaShape, ...]:
    """Every shape that the model's sizes allow.

    ``devices``: number of devices by kind; ``node_devices``: the most in one node, which bounds
    tensor parallelism (default: all of them). Heads must divide evenly over ranks, and each stage
    needs a layer.
    """
    choices = choices or ShapeChoices()
    shapes = []
    for kind, count in devices.items():
        within = (node_devices or devices).get(kind, count)
        for tp, pp, precision, chunk, seqs in product(
            choices.tensor_parallel_sizes,
            choices.pipeline_parallel_sizes,
            choices.precisions,
            choices.max_num_batched_tokens,
            choices.max_num_seqs,
        ):
            if tp > within or tp * pp > count or pp > model.layers or not splits(model, tp):
                continue
            shapes.append(
                ReplicaShape(
                    tensor_parallel_size=tp,
                    pipeline_parallel_size=pp,
                    precision=precision,
                    max_num_batched_tokens=chunk,
                    max_num_seqs=seqs,
                    kv_cache_memory_bytes=choices.kv_cache_memory_bytes,
                    device_kind=kind,
                )
            )
    return tuple(shapes)


def splits(model: ModelFacts, tensor_parallel_size: int) -> bool:
    """Whether vLLM can split the model over that many ranks: heads, states, MLPs, blocks."""
    tp = tensor_parallel_size
    kinds = model.layer_kinds
    if any(kind.attention for kind in kinds) and model.heads % tp:
        return False
    return all(_splits_cache(kind.cache, tp) for kind in kinds) and all(
        _splits_mlps(model, kind, tp) for kind in kinds
    )


def _splits_cache(cache: Cache, tp: int) -> bool:
    """Ranks beyond the key-value heads hold copies; a latent is whole on each; states divide."""
    if cache.kind.by_token:
        return cache.heads % tp == 0 or tp % cache.heads == 0
    return not cache.kind.fixed or cache.heads % tp == 0


def _splits_mlps(model: ModelFacts, kind: LayerKind, tp: int) -> bool:
    if kind.dense_width % tp or kind.expert_width % tp:
        return False
    stored = model.stored
    if stored is None or not stored.block:
        return True
    if kind.dense_width // tp % stored.block:
        return False
    held = math.gcd(stored.block, kind.expert_width // tp, model.hidden)
    return held >= (_FINEST_BLOCK if stored.divides_experts else stored.block)


def refuse_no_fit(
    source: RooflineSource, shapes: tuple[ReplicaShape, ...], devices: Mapping[str, int]
) -> None:
    """Raise OServeError unless some shape holds the weights; it says what would fit."""
    if any(source.kv_tokens(shape) > 0 for shape in shapes):
        return
    model = source.model
    had = ", ".join(f"{count} {kind}" for kind, count in devices.items())
    if not shapes:
        raise OServeError(
            f"no shape of {model.name} can be made on {had}",
            place="--cluster",
            remedy=f"its {model.heads} heads must divide evenly over tensor-parallel ranks",
        )

    def closeness(shape: ReplicaShape) -> float:
        fit = source.memory(shape)
        return fit.missing_bytes if fit.missing_bytes > 0 else fit.kv_bytes_per_token

    best = min(shapes, key=closeness)
    fit = source.memory(best)
    raise OServeError(
        f"{model.name} fits no shape on {had}: even {best.name} needs {_gib(fit)} a device",
        place="--cluster",
        remedy=_what_fits(source, best),
    )


def _gib(fit: MemoryFit) -> str:
    def show(size: float) -> str:
        return f"{size / 2**30:.1f} GiB"

    return (
        f"{show(fit.weights_bytes)} for weights and {show(fit.reserve_bytes)} besides, "
        f"of {show(fit.usable_bytes)} usable: {show(fit.missing_bytes)} are missing"
    )


def _what_fits(source: RooflineSource, shape: ReplicaShape) -> str:
    """The smallest change with which the model would fit."""
    model = source.model
    kind = shape.device_kind
    per_device = find_device(kind).memory_bytes
    for precision in (shape.precision, Precision.FP8, Precision.INT4):
        for count in (1, 2, 4, 8, 16, 32, 64):
            tp = min(count, 8)
            if not splits(model, tp) or count // tp > model.layers:
                continue
            wished = ReplicaShape(
                tensor_parallel_size=tp,
                pipeline_parallel_size=count // tp,
                precision=precision,
                max_num_batched_tokens=512,
                max_num_seqs=shape.max_num_seqs,
                device_kind=kind,
            )
            if source.kv_tokens(wished) > model.max_model_len // 4:
                if count > shape.device_count:
                    return (
                        f"use at least {count} {kind} ({per_device / 2**30:.0f} GiB each), "
                        "or fewer bits a weight (--precision fp8, int4)"
                    )
                return f"hold the weights in {precision}: --precision {precision}"
    return "use devices with more memory"
