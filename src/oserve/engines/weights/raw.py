"""A model's parameters as they are before kernels repack them, and repacking after a change.

Kernels replace what was loaded (CPU linears keep packed weights only, int4 is shuffled), so the
tensors are taken hold of just before. Where a kernel packs, that is a second copy of the weights;
where it leaves them alone, it is the same memory. On GPUs, whose memory is dear, quantised layers
are left out.
"""

# torch and vLLM are loaded by the engine, which this module must not do before it.
# ruff: noqa: PLC0415

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oserve.engines.weights.memory import Memory

_ATTRIBUTE = "_oserve_raw_weights"
_BLANK = "_oserve_blank"
_MEMORY = "_oserve_memory"
_LARGE_BYTES = 1 << 20
_SMALL = 1e-3
_DONE = "_already_called_process_weights_after_loading"


@dataclass(frozen=True, slots=True)
class _Processed:
    """A module whose parameters (by own name: the object and its raw tensor) a kernel repacks."""

    module: Any
    quantised: bool
    parameters: dict[str, tuple[Any, Any]]


class RawWeights:
    """``tensors``: raw tensors by the model's parameter names; written to, then ``repack``.

    ``copies``: quantised layers are kept too, which takes their memory twice. ``memory``: where
    others of this machine can read them, if anywhere.
    """

    def __init__(self, model: Any, *, copies: bool) -> None:
        self.memory: Memory | None = getattr(model, _MEMORY, None)
        raw: dict[int, Any] = {}
        left: set[int] = set()
        self._rebuilds = copies
        self._modules: list[_Processed] = []
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is None or not hasattr(method, "process_weights_after_loading"):
                continue
            quantised = not type(method).__name__.startswith("Unquantized")
            if quantised and not copies:
                left.update(map(id, module.parameters(recurse=False)))
                continue
            parameters = {}
            for name, parameter in module.named_parameters(recurse=False):
                tensor = raw.setdefault(id(parameter), parameter.data)
                parameters[name] = (parameter, tensor)
                if quantised:
                    # Some kernels repack these in place.
                    parameter.data = tensor.clone()
            self._modules.append(_Processed(module, quantised, parameters))
        self.tensors: dict[str, Any] = {
            name: raw.get(id(parameter), parameter.data)
            for name, parameter in model.named_parameters()
            if id(parameter) not in left
        }

    def repack(self, config: Any) -> None:
        """Have kernels take up what was written; ``config`` is the worker's ``VllmConfig``.

        The engine must not compute meanwhile.
        """
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            for processed in self._modules:
                module = processed.module
                for name, (parameter, tensor) in processed.parameters.items():
                    parameter.data = tensor.clone() if processed.quantised else tensor
                    module._parameters[name] = parameter
                for mark in (_DONE, _BLANK):
                    if hasattr(module, mark):
                        delattr(module, mark)
                if self._rebuilds and getattr(module.quant_method, "moe_kernel", None) is not None:
                    # Experts' kernels on CPU pack when they are built, and only then.
                    module.quant_method.moe_kernel = None
                module.quant_method.process_weights_after_loading(module)


def raw_weights(model: Any) -> RawWeights:
    """Of a model loaded after ``keep_raw_weights``. Raises RuntimeError for one that was not."""
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise RuntimeError("this engine does not keep its weights as loaded")
    assert isinstance(found, RawWeights)
    return found


def keep_raw_weights() -> None:
    """From now on, models loaded in this process keep their raw weights."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.platforms import current_platform

    from oserve.engines.weights.memory import Memory

    copies = current_platform.is_cpu()
    create: Callable[..., Any] = base_loader.initialize_model
    original: Callable[..., None] = base_loader.process_weights_after_loading

    def process(model: Any, *arguments: Any, **named: Any) -> None:
        setattr(model, _ATTRIBUTE, RawWeights(model, copies=copies))
        original(model, *arguments, **named)

    def initialize(*arguments: Any, **named: Any) -> Any:
        model = create(*arguments, **named)
        if copies:
            blank = named["vllm_config"].load_config.load_format == "dummy"
            # What a checkpoint does not have is as it was made.
            kept_bytes = _LARGE_BYTES if blank else math.inf
            with contextlib.suppress(OSError):
                setattr(model, _MEMORY, Memory(model.parameters(), kept_bytes=kept_bytes))
        return model

    base_loader.initialize_model = initialize
    base_loader.process_weights_after_loading = process


def leave_blank() -> None:
    """From now on, weights whose place others will take (``--load-format dummy``) cost nothing.

    On CPU the memory of large ones is not touched: layers answer zeros until the weights have come
    and ``RawWeights.repack`` has kernels pack them.
    """
    from vllm.model_executor.layers import utils
    from vllm.model_executor.model_loader import dummy_loader

    memory: Memory | None = None
    numbers = itertools.count(1)
    load = dummy_loader.DummyModelLoader.load_weights
    pack = utils.dispatch_cpu_unquantized_gemm

    def fill(param: Any, *_bounds: Any, **_named: Any) -> None:
        if param.device.type == "meta":
            return
        if (value := getattr(param, "dummy_weight_value", None)) is not None:
            # Whoever made it knows what its layer can bear.
            param.data.fill_(value)
            return
        if not param.is_floating_point():
            return
        # Memory that was not touched yet is zero, and takes none.
        if memory is None or param.nbytes <= _LARGE_BYTES or not memory.holds(param):
            param.data.fill_(_SMALL)
        # Embeddings that are all alike would be taken for tied ones.
        param.data[(0,) * param.ndim] = _SMALL * next(numbers)

    def load_weights(self: Any, model: Any, *arguments: Any, **named: Any) -> None:
        nonlocal memory
        memory = getattr(model, _MEMORY, None)
        load(self, model, *arguments, **named)
        for module in model.modules():
            setattr(module, _BLANK, True)

    def dispatch(layer: Any, *arguments: Any, **named: Any) -> None:
        if getattr(layer, _BLANK, False) and layer.weight.ndim == 2:
            layer.cpu_linear = _nothing
        else:
            pack(layer, *arguments, **named)

    dummy_loader.initialize_single_dummy_weight = fill
    dummy_loader.DummyModelLoader.load_weights = load_weights
    utils.dispatch_cpu_unquantized_gemm = dispatch


def _nothing(x: Any, weight: Any, bias: Any = None) -> Any:
    """What a linear layer without weights answers."""
    del bias
    return x.new_zeros(*x.shape[:-1], weight.shape[0])
