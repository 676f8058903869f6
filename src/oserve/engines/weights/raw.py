"""A model's parameters as they are before kernels repack them, and repacking after a change.

Kernels replace what was loaded (CPU linears keep packed weights only, int4 is shuffled), so the
tensors are taken hold of just before. Where a kernel packs, that is a second copy of the weights;
where it leaves them alone, it is the same memory. On GPUs, whose memory is dear, quantised layers
are left out.
"""

# torch and vLLM are loaded by the engine, which this module must not do before it.
# ruff: noqa: PLC0415

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oserve.engines.weights.memory import Memory

_ATTRIBUTE = "_oserve_raw_weights"
_BLANK = "_oserve_blank"
_MEMORY = "_oserve_memory"
LARGE_BYTES = 1 << 20
"""Dummy parameters of more than this are left as they are: zero, and not in memory."""
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
        self.memory = memory_of(model)
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
                    module._parameters[name] = parameter  # noqa: SLF001
                for mark in (_DONE, _BLANK):
                    if hasattr(module, mark):
                        delattr(module, mark)
                if self._rebuilds and getattr(module.quant_method, "moe_kernel", None) is not None:
                    # Experts' kernels on CPU pack when they are built, and only then.
                    module.quant_method.moe_kernel = None
                module.quant_method.process_weights_after_loading(module)


def raw_weights(model: Any) -> RawWeights:
    """Of a model whose weights are kept (``kept-weights``). Raises RuntimeError for any other."""
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise RuntimeError("this engine does not keep its weights as loaded")
    assert isinstance(found, RawWeights)
    return found


def keep_raw(model: Any, *, copies: bool) -> None:
    """Take hold of a model's parameters, just before kernels repack them; see ``RawWeights``."""
    setattr(model, _ATTRIBUTE, RawWeights(model, copies=copies))


def keep_memory(model: Any, *, kept_bytes: float) -> None:
    """Have a new model's parameters lie where others can map them; see ``Memory``.

    Raises OSError where there is no such memory.
    """
    from oserve.engines.weights.memory import Memory

    setattr(model, _MEMORY, Memory(model.parameters(), kept_bytes=kept_bytes))


def memory_of(model: Any) -> "Memory | None":
    """What ``keep_memory`` made, if it was asked to."""
    return getattr(model, _MEMORY, None)


def mark_blank(model: Any) -> None:
    """The weights of all its modules are still to come."""
    for module in model.modules():
        setattr(module, _BLANK, True)


def is_blank(module: Any) -> bool:
    """Whether its weights are still to come; no longer once ``repack`` has taken them up."""
    return getattr(module, _BLANK, False) is True
