"""Checksums of tensors: CRC-32 on CPU; on GPUs a weighted sum, computed on the device."""

import zlib
from collections.abc import Iterator

import torch

# Copies of this size before summing reuse the allocator's memory.
_CHECK_BYTES = 512 << 10
_SUM_BYTES = 64 << 20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A prime modulus, and the two multipliers of a polynomial hash.
_PRIME = (1 << 31) - 1
_BASE, _FACTOR = 1_000_003, 48_271


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's values, row by row; ``device_sum`` on a GPU."""
    if tensor.device.type != "cpu":
        return device_sum(tensor)
    total = 0
    for part in pieces(tensor, _CHECK_BYTES):
        total = zlib.crc32(bytes_of(part.contiguous().cpu()), total)
    return total


def device_sum(tensor: torch.Tensor) -> int:
    """A sum of a tensor's values, weighted by position, computed on its device.

    The bits of values are read as integers, modulo a prime: the order of additions does not change
    the sum, and every change of one bit does.
    """
    total = 0
    for piece in pieces(tensor, _SUM_BYTES):
        words = piece.contiguous().view(-1).view(_WORDS[piece.element_size()]).to(torch.int64)
        weights = torch.arange(_FACTOR, _FACTOR + words.numel(), device=words.device)
        total = (total * _BASE + int((words * weights % _PRIME).sum())) % _PRIME
    return total


def pieces(tensor: torch.Tensor, size_bytes: int) -> Iterator[torch.Tensor]:
    """Slices of rows, of at most ``size_bytes`` if one row is no larger."""
    if tensor.nbytes <= size_bytes:
        yield tensor
        return
    rows = max(1, tensor.shape[0] * size_bytes // tensor.nbytes)
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
