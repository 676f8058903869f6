"""A model's parameters before kernels repack them, and repacking after they have changed.

Kernels replace the loaded tensors (CPU linear layers keep packed weights only, int4 is shuffled),
so this module keeps references to them just before. Where a kernel packs, they are a second copy of
the weights; where it does not, they are the same memory. On GPUs, where memory is scarce, quantised
layers are left out.
"""

# The engine loads torch and vLLM; this module must not load them first.
# ruff: noqa: PLC0415

from dataclasses import dataclass

from oserve.engines.weights.model_types import (
    ModelParameter,
    SharedWeights,
    VllmConfig,
    WeightModule,
    WeightTensor,
)

_ATTRIBUTE = "_oserve_raw_weights"
_BLANK = "_oserve_blank"
_MEMORY = "_oserve_memory"
LARGE_BYTES = 1 << 20
"""Larger dummy parameters are not filled: they read as zero and take no memory."""
_DONE = "_already_called_process_weights_after_loading"


@dataclass(frozen=True, slots=True)
class _Processed:
    """A module that a kernel repacks; ``parameters``: each object and its raw tensor, by name."""

    module: WeightModule
    quantised: bool
    parameters: dict[str, tuple[ModelParameter, WeightTensor]]


class RawWeights:
    """``tensors``: raw tensors by the model's parameter names. Write to them, then ``repack``.

    ``copies``: keep quantised layers too, which takes their memory twice. ``memory``: where other
    engines of the machine can map the tensors; ``None`` if they cannot.
    """

    def __init__(self, model: WeightModule, *, copies: bool) -> None:
        self.memory = memory_of(model)
        raw: dict[int, WeightTensor] = {}
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
        self.tensors: dict[str, WeightTensor] = {
            name: raw.get(id(parameter), parameter.data)
            for name, parameter in model.named_parameters()
            if id(parameter) not in left
        }

    def repack(self, config: VllmConfig) -> None:
        """Have kernels repack what was written. The engine must not compute meanwhile."""
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            for processed in self._modules:
                module = processed.module
                for name, (parameter, tensor) in processed.parameters.items():
                    parameter.data = tensor.clone() if processed.quantised else tensor
                    module._parameters[name] = parameter  # noqa: SLF001
                for mark in (_DONE, _BLANK):
                    if hasattr(module, mark):
                        delattr(module, mark)
                if self._rebuilds and getattr(module.quant_method, "moe_kernel", None) is not None:
                    # On CPU the kernels of experts pack only when they are built.
                    module.quant_method.moe_kernel = None
                module.quant_method.process_weights_after_loading(module)


def raw_weights(model: WeightModule) -> RawWeights:
    """Those of a model that keeps them (patch ``kept-weights``). Raises RuntimeError otherwise."""
    found: RawWeights | None = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise RuntimeError("this engine does not keep its weights as loaded")
    return found


def keep_raw(model: WeightModule, *, copies: bool) -> None:
    """Keep a model's parameters, just before kernels repack them; see ``RawWeights``."""
    setattr(model, _ATTRIBUTE, RawWeights(model, copies=copies))


def attach_memory(model: WeightModule, memory: SharedWeights) -> None:
    """Note where a new model's parameters lie; see ``memory.keep_memory``."""
    setattr(model, _MEMORY, memory)


def memory_of(model: WeightModule) -> SharedWeights | None:
    """Where other engines can map a model's parameters; ``None`` if they cannot."""
    found: SharedWeights | None = getattr(model, _MEMORY, None)
    return found


def mark_blank(model: WeightModule) -> None:
    """Mark all modules of a model as waiting for their weights."""
    for module in model.modules():
        setattr(module, _BLANK, True)


def is_blank(module: object) -> bool:
    """Whether a module waits for its weights; ``repack`` ends that."""
    return getattr(module, _BLANK, False) is True
