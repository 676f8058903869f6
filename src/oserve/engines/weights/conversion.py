"""Converts weights on arrival: to another float type, or to int8 with a scale for each row.

Ranks that hold parts of the same rows first exchange the rows' largest values, so that each
quantises its part as one rank would quantise the whole row.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch

from oserve.engines.weights.parts import bytes_of
from oserve.engines.weights.sockets import ShardStream, Throttle, TransferError
from oserve.switch.rank_order import ShardConversion

_INT8_STEPS = 127.0

SideBySide = Callable[[Sequence[Callable[[], None]]], None]
"""Does all of it at once; the first error ends the others."""


class Conversions:
    """The conversions of one rank, from ``staged`` to ``tensors``; it empties ``staged``."""

    def __init__(
        self,
        conversions: Sequence[ShardConversion],
        rank: int,
        staged: MutableMapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._conversions = conversions
        self._rank = rank
        self._staged = staged
        self._tensors = tensors
        # By parameter and rank: the largest value of each row, [rows, 1] in fp32.
        self._largest: dict[tuple[str, int], torch.Tensor] = {}

    def carry_out(
        self,
        outgoing: Mapping[int, ShardStream],
        incoming: Mapping[int, ShardStream],
        unthrottled: Throttle,
        side_by_side: SideBySide,
    ) -> None:
        """Exchange what rows need, then convert. Raises TransferError."""
        shared = [one for one in self._conversions if len(one.peers) > 1]
        for one in shared:
            self._largest[one.parameter, self._rank] = _largest(self._staged[one.parameter])

        def send(peer: int) -> None:
            for number, name in enumerate(_shared_with(shared, peer)):
                largest = self._largest[name, self._rank]
                outgoing[peer].send(number, bytes_of(largest), unthrottled)

        def receive(peer: int) -> None:
            for number, name in enumerate(_shared_with(shared, peer)):
                received = torch.empty_like(self._largest[name, self._rank])
                incoming[peer].receive(number, bytes_of(received))
                self._largest[name, peer] = received

        others = sorted({peer for one in shared for peer in one.peers} - {self._rank})
        side_by_side(
            [
                *((lambda p=peer: send(p)) for peer in others),
                *((lambda p=peer: receive(p)) for peer in others),
            ]
        )
        for one in self._conversions:
            self._convert(one)

    def _convert(self, conversion: ShardConversion) -> None:
        name = conversion.parameter
        staged = self._staged.pop(name)
        if conversion.scheme == "cast":
            self._tensors[name].copy_(staged)
            return
        if conversion.scheme != "int8":
            raise TransferError(f"{name} cannot be converted to {conversion.scheme}")
        largest = _largest(staged)
        for peer in conversion.peers:
            largest = torch.maximum(largest, self._largest.get((name, peer), largest))
        scale = largest / _INT8_STEPS
        scale[scale == 0] = 1.0  # rows of zeros must not divide by zero
        values = torch.clamp(torch.round(staged.float() / scale), -_INT8_STEPS, _INT8_STEPS)
        self._tensors[name].copy_(values.to(torch.int8))
        self._tensors[name.removesuffix("weight") + "weight_scale"].copy_(scale)


def _shared_with(shared: Sequence[ShardConversion], peer: int) -> list[str]:
    return [one.parameter for one in shared if peer in one.peers]


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each row, [rows, 1] in fp32."""
    return weight.abs().amax(dim=1, keepdim=True).float()
