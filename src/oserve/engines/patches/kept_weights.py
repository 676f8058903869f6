"""Parameters are kept as loaded, in memory that other engines can map."""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, cast

from oserve.engines.arguments import KEEP_WEIGHTS
from oserve.engines.patches.patch import Patch, PatchTarget
from oserve.engines.patches.platforms import on_cpu
from oserve.engines.weights.model_types import WeightModule
from oserve.engines.weights.raw import LARGE_BYTES, keep_raw

P = ParamSpec("P")


class _LoadConfig(Protocol):
    load_format: str


class _EngineConfig(Protocol):
    load_config: _LoadConfig


def weights_are_kept() -> bool:
    """Whether this engine was started so that its weights can move."""
    return os.environ.get(KEEP_WEIGHTS) == "1"


def _in_memory_files(create: Callable[P, WeightModule]) -> Callable[P, WeightModule]:
    copies = on_cpu()

    def initialize(*arguments: P.args, **named: P.kwargs) -> WeightModule:
        model = create(*arguments, **named)
        if copies:
            # It loads torch, which the engine has done by now.
            from oserve.engines.weights.memory import keep_memory  # noqa: PLC0415

            config = cast(_EngineConfig, named["vllm_config"])
            blank = config.load_config.load_format == "dummy"
            # Parameters that a checkpoint lacks keep the values that they were made with.
            kept_bytes = LARGE_BYTES if blank else math.inf
            with contextlib.suppress(OSError):
                keep_memory(model, kept_bytes=kept_bytes)
        return model

    return initialize


def _keeping_raw(
    original: Callable[Concatenate[WeightModule, P], None],
) -> Callable[Concatenate[WeightModule, P], None]:
    copies = on_cpu()

    def process(model: WeightModule, /, *arguments: P.args, **named: P.kwargs) -> None:
        keep_raw(model, copies=copies)
        original(model, *arguments, **named)

    return process


KEPT_WEIGHTS = Patch(
    name="kept-weights",
    stage="worker",
    made_for="vLLM 0.32.0",
    wanted=weights_are_kept,
    targets=(
        PatchTarget(
            place="vllm.model_executor.model_loader.base_loader:initialize_model",
            source="vllm.model_executor.model_loader.utils:initialize_model",
            digest="a9d3f8a8220d5ac5",
            replace=_in_memory_files,
        ),
        PatchTarget(
            place="vllm.model_executor.model_loader.base_loader:process_weights_after_loading",
            source="vllm.model_executor.model_loader.utils:process_weights_after_loading",
            digest="758e83038852a4ec",
            replace=_keeping_raw,
        ),
    ),
    reason=(
        "After loading, kernels replace weights by packed ones, which cannot be unpacked; on CPU "
        "linear layers keep nothing else. The patch keeps references to all parameters just "
        "before, and on CPU moves them to memory that other engines can map. A switch transfers "
        "these parameters."
    ),
    without=(
        "weights cannot move, and switches that would move them are rolled back: with "
        "engines.keep_weights: false OServe rolls plans out by restarts"
    ),
    upstream=(
        "work on weights from outside is aimed at training "
        "([#54477](https://github.com/vllm-project/vllm/issues/54477), open, on reloading in "
        "place); vLLM has no interface that gives out weights as loaded. A load format of "
        "OServe's own (`register_model_loader`) could do the same without a patch, for that "
        "format only"
    ),
)
