"""Weights whose place others will take (``--load-format dummy``) cost nothing.

On CPU the memory of large ones is not touched: layers answer zeros until the weights have come and
``RawWeights.repack`` has kernels pack them.
"""

import itertools
from collections.abc import Callable
from typing import Any

from oserve.engines.patches.kept_weights import weights_are_kept
from oserve.engines.patches.patch import Patch, PatchTarget
from oserve.engines.weights.raw import LARGE_BYTES, is_blank, mark_blank, memory_of

_SMALL = 1e-3


class _Blank:
    """What the three replacements share: where the model that is being filled lies."""

    def __init__(self) -> None:
        self._memory: Any = None
        self._numbers = itertools.count(1)

    def filling(self, _original: Callable[..., Any]) -> Callable[..., Any]:
        def fill(param: Any, *_bounds: Any, **_named: Any) -> None:
            if param.device.type == "meta":
                return
            if (value := getattr(param, "dummy_weight_value", None)) is not None:
                # Whoever made it knows what its layer can bear.
                param.data.fill_(value)
                return
            if not param.is_floating_point():
                return
            memory = self._memory
            # Memory that was not touched yet is zero, and takes none.
            if memory is None or param.nbytes <= LARGE_BYTES or not memory.holds(param):
                param.data.fill_(_SMALL)
            # Embeddings that are all alike would be taken for tied ones.
            param.data[(0,) * param.ndim] = _SMALL * next(self._numbers)

        return fill

    def loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_weights(loader: Any, model: Any, *arguments: Any, **named: Any) -> None:
            self._memory = memory_of(model)
            original(loader, model, *arguments, **named)
            mark_blank(model)

        return load_weights

    @staticmethod
    def packing(original: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch(layer: Any, *arguments: Any, **named: Any) -> None:
            if is_blank(layer) and layer.weight.ndim == 2:
                layer.cpu_linear = _nothing
            else:
                original(layer, *arguments, **named)

        return dispatch


def _nothing(x: Any, weight: Any, bias: Any = None) -> Any:
    """What a linear layer without weights answers."""
    del bias
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


_blank = _Blank()

BLANK_WEIGHTS = Patch(
    name="blank-weights",
    stage="worker",
    made_for="vLLM 0.32.0",
    wanted=weights_are_kept,
    targets=(
        PatchTarget(
            place="vllm.model_executor.model_loader.dummy_loader:initialize_single_dummy_weight",
            source="vllm.model_executor.model_loader.weight_utils:initialize_single_dummy_weight",
            digest="4dc114b67f8f0bbe",
            replace=_blank.filling,
        ),
        PatchTarget(
            place="vllm.model_executor.model_loader.dummy_loader:DummyModelLoader.load_weights",
            digest="bb8cc815ab9e20dd",
            replace=_blank.loading,
        ),
        PatchTarget(
            place="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
            digest="dcdb7fa721cfafe1",
            replace=_blank.packing,
        ),
    ),
    reason=(
        "An engine that will be given its weights starts with dummy ones: vLLM fills all their "
        "memory with random numbers and packs it, which takes time and, beside the engines that "
        "serve, memory that may not be there. The patch leaves the memory of large parameters "
        "untouched and unpacked until weights have come."
    ),
    without="new engines of a switch take longer to come up, and more memory while they do",
    upstream=(
        "dummy weights are meant to be like real ones, for measurements; reports are about their "
        "cost ([#54712](https://github.com/vllm-project/vllm/issues/54712))"
    ),
)
