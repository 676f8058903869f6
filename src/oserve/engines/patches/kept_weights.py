"""Parameters are kept as loaded, in memory that other engines can map."""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

from oserve.engines.arguments import KEEP_WEIGHTS
from oserve.engines.patches.patch import Patch, PatchTarget
from oserve.engines.patches.platforms import on_cpu
from oserve.engines.weights.raw import LARGE_BYTES, keep_memory, keep_raw


def weights_are_kept() -> bool:
    """Whether this engine was started so that its weights can be moved."""
    return os.environ.get(KEEP_WEIGHTS) == "1"


def _in_memory_files(create: Callable[..., Any]) -> Callable[..., Any]:
    copies = on_cpu()

    def initialize(*arguments: Any, **named: Any) -> Any:
        model = create(*arguments, **named)
        if copies:
            blank = named["vllm_config"].load_config.load_format == "dummy"
            # What a checkpoint does not have is as it was made.
            kept_bytes = LARGE_BYTES if blank else math.inf
            with contextlib.suppress(OSError):
                keep_memory(model, kept_bytes=kept_bytes)
        return model

    return initialize


def _keeping_raw(original: Callable[..., Any]) -> Callable[..., Any]:
    copies = on_cpu()

    def process(model: Any, *arguments: Any, **named: Any) -> None:
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
        "After loading, kernels replace weights by packed ones, from which no way leads back; on "
        "CPU nothing else is left of linear layers. The patch takes hold of all parameters just "
        "before, and on CPU has them lie in memory that other engines can map: this is what is "
        "moved in a switch."
    ),
    without=(
        "weights cannot be moved, and switches that would are taken back: with "
        "engines.keep_weights: false plans are rolled out by restarts"
    ),
    upstream=(
        "weights that come from outside are worked on for training "
        "([#54477](https://github.com/vllm-project/vllm/issues/54477), open, on reloading in "
        "place); nothing there gives out weights as loaded. A load format of our own "
        "(`register_model_loader`) could do the same without a patch, for that format only"
    ),
)
