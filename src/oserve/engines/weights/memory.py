"""Weights in memory that other engines of the machine can map and copy from.

An unnamed file holds an engine's parameters. A process that receives its descriptor maps the file
and copies what it needs. That is one copy, made by the receiver, while the owner keeps serving; the
mapping stays valid if the owner ends. On GPUs handles do the same (``cuda``).
"""

import math
import mmap
import os
from collections.abc import Iterable, Mapping

import torch

from oserve.engines.weights.model_types import TensorPlace, WeightModule
from oserve.engines.weights.raw import attach_memory

_ALIGN_BYTES = 64


class WeightMemory:
    """Moves ``parameters`` (those that are contiguous and on CPU) into a file that can be mapped.

    Parameters of more than ``kept_bytes`` lose their values: they read as zero, and take no memory
    until they are written. Raises OSError where the kernel has no such files.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, kept_bytes: float = math.inf
    ) -> None:
        own = {id(one): one for one in parameters if _can_move(one)}.values()
        offsets, size = [], 0
        for parameter in own:
            offsets.append(size)
            size += -(-parameter.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.descriptor = os.memfd_create("oserve-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, max(1, size))
        self._map = mmap.mmap(self.descriptor, max(1, size))
        self._offsets: dict[int, int] = {}
        for parameter, offset in zip(own, offsets, strict=True):
            place = _tensor(self._map, offset, parameter.shape, parameter.dtype)
            if parameter.nbytes <= kept_bytes:
                place.copy_(parameter.data)
            parameter.data = place
            self._offsets[parameter.data_ptr()] = offset

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this whole tensor lies in the file."""
        return tensor.device.type == "cpu" and tensor.data_ptr() in self._offsets

    def places(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorPlace]:
        """Where those of ``tensors`` lie that the file holds."""
        return {
            name: TensorPlace(
                self._offsets[tensor.data_ptr()],
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
            )
            for name, tensor in tensors.items()
            if self.holds(tensor) and tensor.is_contiguous()
        }


def keep_memory(model: WeightModule, *, kept_bytes: float) -> None:
    """Move a new model's parameters where other engines can map them; see ``WeightMemory``.

    Raises OSError where there is no such memory.
    """
    attach_memory(model, WeightMemory(model.parameters(), kept_bytes=kept_bytes))


def mapped(descriptor: int, places: Mapping[str, TensorPlace]) -> dict[str, torch.Tensor]:
    """Tensors in another process's file, to be read; they keep it mapped. Closes ``descriptor``."""
    try:
        # A private mapping: a write by mistake does not reach the owner.
        view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    return {
        name: _tensor(view, place.offset, place.shape, getattr(torch, place.dtype))
        for name, place in places.items()
    }


def _can_move(parameter: torch.nn.Parameter) -> bool:
    return bool(parameter.device.type == "cpu" and parameter.numel() and parameter.is_contiguous())


def _tensor(
    memory: mmap.mmap, offset: int, shape: Iterable[int], dtype: torch.dtype
) -> torch.Tensor:
    shape = tuple(shape)
    flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset)
    return flat.view(shape)
