"""A model's parameters as they are before kernels repack them, and repacking after a change.

Kernels replace what was loaded (CPU linears keep packed weights only, int4 is shuffled), so the
tensors are taken hold of just before. Where a kernel packs, that is a second copy of the weights;
where it leaves them alone, it is the same memory. On GPUs, whose memory is dear, quantised layers
are left out.
"""

# torch and vLLM are loaded by the engine, which this module must not do before it.
# ruff: noqa: PLC0415

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "_oserve_raw_weights"
_DONE = "_already_called_process_weights_after_loading"


@dataclass(frozen=True, slots=True)
class _Processed:
    """A module whose parameters (by own name: the object and its raw tensor) a kernel repacks."""

    module: Any
    quantised: bool
    parameters: dict[str, tuple[Any, Any]]


class RawWeights:
    """``tensors``: raw tensors by the model's parameter names; written to, then ``repack``.

    ``copies``: quantised layers are kept too, which takes their memory twice.
    """

    def __init__(self, model: Any, *, copies: bool) -> None:
        raw: dict[int, Any] = {}
        left: set[int] = set()
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
                # Quantised layers are repacked in place by some kernels.
                tensor = parameter.data.clone() if quantised else parameter.data
                parameters[name] = (parameter, raw.setdefault(id(parameter), tensor))
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
                if hasattr(module, _DONE):
                    delattr(module, _DONE)
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

    copies = current_platform.is_cpu()
    original: Callable[..., None] = base_loader.process_weights_after_loading

    def process(model: Any, *arguments: Any, **named: Any) -> None:
        setattr(model, _ATTRIBUTE, RawWeights(model, copies=copies))
        original(model, *arguments, **named)

    base_loader.process_weights_after_loading = process
