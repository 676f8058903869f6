"""Checksums of tensors: CRC-32 on CPU; on GPUs a weighted sum, computed on the device."""

import zlib
from collections.abc import Mapping, Sequence

import torch

from oserve.engines.weights.jobs import Job
from oserve.engines.weights.parts import bytes_of, part_key, part_of, pieces
from oserve.engines.weights.sockets import TransferError
from oserve.switch.rank_order import ShardPart

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


class Checksums(Job):
    """Checksums of ``parts`` of ``tensors``, in their order.

    ``staged``: those of parts that were converted on arrival, by ``part_key``.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        parts: Sequence[ShardPart],
        staged: Mapping[str, int],
    ) -> None:
        super().__init__(name)
        self._tensors = tensors
        self._parts = parts
        self._staged = staged

    def _work(self) -> None:
        # A part that went to several ranks is summed once.
        known = dict(self._staged)
        for part in self._parts:
            if self.stopped.is_set():
                raise TransferError("aborted")
            key = part_key(part)
            if key not in known:
                known[key] = checksum(part_of(self._tensors, part))
            self.sums.append(known[key])
