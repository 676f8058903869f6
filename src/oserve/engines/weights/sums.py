"""Checksums of tensors: CRC-32 on CPU, a weighted sum, computed where they lie, on GPUs."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch

# Copying this much before summing it takes no new memory each time.
_CHECK_BYTES = 512 << 10
_SUM_BYTES = 64 << 20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A prime and two numbers without meaning, as such sums need them.
_PRIME = (1 << 31) - 1
_BASE, _FACTOR = 1_000_003, 48_271


def checksum(tensor: Any) -> int:
    """CRC-32 of a tensor's values, row after row; on a GPU see ``device_sum``."""
    if tensor.device.type != "cpu":
        return device_sum(tensor)
    total = 0
    for part in pieces(tensor, _CHECK_BYTES):
        total = zlib.crc32(bytes_of(part.contiguous().cpu()), total)
    return total


def device_sum(tensor: Any) -> int:
    """A sum of a tensor's values, weighted by place, computed where it lies.

    Values are taken as the whole numbers of their bits, modulo a prime: no order of adding changes
    it, and no change of one bit leaves it as it was.
    """
    total = 0
    for piece in pieces(tensor, _SUM_BYTES):
        words = piece.contiguous().view(-1).view(_WORDS[piece.element_size()]).to(torch.int64)
        weights = torch.arange(_FACTOR, _FACTOR + words.numel(), device=words.device)
        total = (total * _BASE + int((words * weights % _PRIME).sum())) % _PRIME
    return total


def pieces(tensor: Any, size_bytes: int) -> Iterator[Any]:
    """Some rows at a time."""
    if tensor.nbytes <= size_bytes:
        yield tensor
        return
    rows = max(1, tensor.shape[0] * size_bytes // tensor.nbytes)
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def bytes_of(tensor: Any) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
