"""Dummy weights (``--load-format dummy``), which a transfer will replace, take no memory.

On CPU the memory of large ones is not touched: layers return zeros until the weights have arrived
and ``RawWeights.repack`` has kernels pack them.
"""

import itertools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from oserve.engines.patches.kept_weights import weights_are_kept
from oserve.engines.patches.patch import Patch, PatchTarget
from oserve.engines.weights.model_types import (
    LinearInput,
    LinearLayer,
    LinearWeight,
    ModelParameter,
    SharedWeights,
    WeightModule,
)
from oserve.engines.weights.raw import LARGE_BYTES, is_blank, mark_blank, memory_of

_SMALL = 1e-3

P = ParamSpec("P")


class _Blank:
    """The state that the three replacements share: the memory of the model that is being loaded."""

    def __init__(self) -> None:
        self._memory: SharedWeights | None = None
        self._numbers = itertools.count(1)

    def filling(self, _original: object) -> Callable[..., None]:
        def fill(param: ModelParameter, *_bounds: object, **_named: object) -> None:
            if param.device.type == "meta":
                return
            if (value := getattr(param, "dummy_weight_value", None)) is not None:
                # The layer that made it asks for this value.
                param.data.fill_(value)
                return
            if not param.is_floating_point():
                return
            memory = self._memory
            # A file's pages read as zero, and take no memory, until they are written.
            if memory is None or param.nbytes <= LARGE_BYTES or not memory.holds(param):
                param.data.fill_(_SMALL)
            # vLLM would take embeddings with equal values for tied ones.
            param.data[(0,) * param.ndim] = _SMALL * next(self._numbers)

        return fill

    def loading(
        self, original: Callable[Concatenate[object, WeightModule, P], None]
    ) -> Callable[Concatenate[object, WeightModule, P], None]:
        def load_weights(
            loader: object, model: WeightModule, /, *arguments: P.args, **named: P.kwargs
        ) -> None:
            self._memory = memory_of(model)
            original(loader, model, *arguments, **named)
            mark_blank(model)

        return load_weights

    @staticmethod
    def packing(
        original: Callable[Concatenate[LinearLayer, P], None],
    ) -> Callable[Concatenate[LinearLayer, P], None]:
        def dispatch(layer: LinearLayer, /, *arguments: P.args, **named: P.kwargs) -> None:
            if is_blank(layer) and layer.weight.ndim == 2:
                layer.cpu_linear = _nothing
            else:
                original(layer, *arguments, **named)

        return dispatch


def _nothing(x: LinearInput, weight: LinearWeight, bias: object = None) -> LinearInput:
    """The output of a linear layer without weights: zeros."""
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
        "An engine that will receive its weights starts with dummy ones: vLLM fills all their "
        "memory with random numbers and packs it. That takes time and, beside the engines that "
        "serve, memory that may not be free. The patch leaves the memory of large parameters "
        "untouched and unpacked until the weights have arrived."
    ),
    without="new engines of a switch start more slowly, and take more memory meanwhile",
    upstream=(
        "dummy weights are meant to resemble real ones, for measurements; there are reports of "
        "their cost ([#54712](https://github.com/vllm-project/vllm/issues/54712))"
    ),
)
