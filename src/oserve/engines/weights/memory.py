"""Weights in memory that other engines of the machine can map and copy from, as handles on GPUs.

A file without a name holds an engine's parameters. Whoever is handed its descriptor maps it and
takes what it needs: one copy, by the one who takes, while the owner goes on serving undisturbed,
and nothing breaks off if the owner ends meanwhile.
"""

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_ALIGN_BYTES = 64


class Memory:
    """Where ``parameters`` (those that are contiguous, on CPU) lie from now on.

    The values of those of more than ``kept_bytes`` are lost: they are zero, and take no memory
    until they are written. Raises OSError where the kernel has no such files.
    """

    def __init__(self, parameters: Iterable[Any], *, kept_bytes: float = math.inf) -> None:
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

    def holds(self, tensor: Any) -> bool:
        """Whether this tensor, whole, lies here."""
        return tensor.device.type == "cpu" and tensor.data_ptr() in self._offsets

    def places(self, tensors: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Offset, shape and type of those of ``tensors`` that lie here, as plain data."""
        return {
            name: [
                self._offsets[tensor.data_ptr()],
                list(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
            ]
            for name, tensor in tensors.items()
            if self.holds(tensor) and tensor.is_contiguous()
        }


def mapped(descriptor: int, places: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Tensors of another's memory, to be read; they keep it mapped. Closes ``descriptor``."""
    try:
        # A private mapping: what is written by mistake stays here.
        view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    return {
        name: _tensor(view, offset, shape, getattr(torch, dtype))
        for name, (offset, shape, dtype) in places.items()
    }


def _can_move(parameter: Any) -> bool:
    return bool(parameter.device.type == "cpu" and parameter.numel() and parameter.is_contiguous())


def _tensor(memory: mmap.mmap, offset: int, shape: Iterable[int], dtype: Any) -> Any:
    shape = tuple(shape)
    flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset)
    return flat.view(shape)
