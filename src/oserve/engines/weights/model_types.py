"""What moving weights uses of torch's and vLLM's objects, as protocols.

Modules that patch vLLM are imported where neither package is installed, so they cannot name its
classes. The members are those of torch 2.13 and vLLM 0.32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, Self


class TensorPlace(NamedTuple):
    """Where a tensor lies in a file: offset in bytes, shape, and type (as ``bfloat16``)."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class WeightTensor(Protocol):
    """A ``torch.Tensor``."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> object: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def is_cuda(self) -> bool: ...

    def clone(self) -> Self: ...

    def fill_(self, value: float) -> Self: ...

    def __setitem__(self, index: tuple[int, ...], value: float) -> None: ...


class TensorDevice(Protocol):
    """A ``torch.device``; ``type`` as ``cpu``."""

    type: str


class ModelParameter(Protocol):
    """A ``torch.nn.Parameter``; ``data`` is the tensor without gradients."""

    data: WeightTensor

    @property
    def device(self) -> TensorDevice: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def ndim(self) -> int: ...

    def is_floating_point(self) -> bool: ...


class LinearInput(Protocol):
    """A ``torch.Tensor`` that a layer computes with."""

    @property
    def shape(self) -> Sequence[int]: ...

    def new_zeros(self, *shape: int) -> Self: ...


class LinearLayer(Protocol):
    """A vLLM linear layer on CPU; ``cpu_linear`` computes it: input, weight, bias."""

    weight: "LinearWeight"
    cpu_linear: Callable[..., LinearInput]


class LinearWeight(Protocol):
    """The weight of a linear layer, [outputs, inputs]."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def ndim(self) -> int: ...


class QuantMethod(Protocol):
    """How a vLLM layer stores its weights. ``moe_kernel`` exists in layers of experts only."""

    moe_kernel: object | None

    def process_weights_after_loading(self, layer: "WeightModule") -> None: ...


class WeightModule(Protocol):
    """A ``torch.nn.Module``; only layers with weights have a ``quant_method``."""

    quant_method: QuantMethod
    _parameters: dict[str, ModelParameter]

    def modules(self) -> Iterator["WeightModule"]: ...

    def parameters(self, recurse: bool = True) -> Iterator[ModelParameter]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, ModelParameter]]: ...


class ModelConfig(Protocol):
    """vLLM's; ``dtype`` is a ``torch.dtype``."""

    dtype: object


class VllmConfig(Protocol):
    """A ``vllm.config.VllmConfig``."""

    model_config: ModelConfig


class ModelRunner(Protocol):
    """Runs the model of a vLLM worker."""

    def get_model(self) -> WeightModule: ...


class SharedWeights(Protocol):
    """Memory that other engines of the machine can map; see ``memory.WeightMemory``."""

    descriptor: int

    def holds(self, tensor: WeightTensor | ModelParameter) -> bool: ...

    def places(self, tensors: Mapping[str, WeightTensor]) -> dict[str, TensorPlace]: ...
