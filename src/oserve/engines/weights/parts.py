"""Parts of tensors: views, bytes and slices of them, sent and received over a stream.

The sender shows the memory that holds some of the parts; the receiver copies those by itself, and
only the other parts go through the socket. Between nodes both name such memory to their own hatch,
which reads and writes it.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from oserve.engines.weights.jobs import ByteCounter
from oserve.engines.weights.memory import mapped
from oserve.engines.weights.model_types import SharedWeights, TensorPlace
from oserve.engines.weights.relay_orders import FileRange, range_of
from oserve.engines.weights.sockets import ShardStream, Throttle, TransferError
from oserve.switch.rank_order import ShardPart

_COPY_BYTES = 8 << 20


class ShownMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender's memory holds of the parts.

    ``places``: of parameters in the file. ``parts``: by their numbers in the sender's order.
    ``far``: the sender is on another node and shows nothing.
    """

    places: dict[str, TensorPlace] = {}
    parts: dict[int, ShardPart] = {}
    far: bool = False


_SHOWN_MEMORY_DECODER = msgspec.json.Decoder(ShownMemory)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLimits:
    """Bounds of copying: the rate, the end (on the monotonic clock), and an abort."""

    throttle: Throttle
    deadline_s: float
    stopped: threading.Event


def part_key(part: ShardPart) -> str:
    """A key for a part."""
    return f"{part.parameter}{[list(edge) for edge in part.box]}"


def part_of(tensors: Mapping[str, torch.Tensor], part: ShardPart) -> torch.Tensor:
    """A view of the part's box. Raises TransferError for a parameter that is not in ``tensors``."""
    tensor = tensors.get(part.parameter)
    if tensor is None:
        raise TransferError(f"this rank has no parameter {part.parameter}")
    return tensor[tuple(slice(start, stop) for start, stop in part.box)]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def pieces(tensor: torch.Tensor, size_bytes: int) -> Iterator[torch.Tensor]:
    """Slices of rows, of at most ``size_bytes`` if one row is no larger."""
    if tensor.nbytes <= size_bytes:
        yield tensor
        return
    rows = max(1, tensor.shape[0] * size_bytes // tensor.nbytes)
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def send_parts(
    stream: ShardStream,
    parts: Sequence[ShardPart],
    tensors: Mapping[str, torch.Tensor],
    memory: SharedWeights | None,
    throttle: Throttle,
    sent: ByteCounter,
) -> None:
    """Show the parts that ``memory`` holds, and send the others. Raises TransferError.

    To a rank of another node all are sent, those in ``memory`` by the hatch of this one.
    """
    values = [part_of(tensors, part) for part in parts]
    if stream.far:
        _send_far(stream, values, _ranges(parts, tensors, memory), _file(memory), throttle, sent)
        return
    shown = ShownMemory()
    if memory is not None:
        places = memory.places({part.parameter: tensors[part.parameter] for part in parts})
        held = {n: part for n, part in enumerate(parts) if part.parameter in places}
        shown = ShownMemory(places=places, parts=held)
    stream.give_message(msgspec.json.encode(shown))
    if memory is not None and shown.places:
        stream.give_descriptor(memory.descriptor)
    for number, value in enumerate(values):
        if number not in shown.parts:
            stream.send(number, bytes_of(value.contiguous()), throttle)
        _add(sent, value)


def receive_parts(
    stream: ShardStream,
    parts: Sequence[ShardPart],
    held: Mapping[str, torch.Tensor],
    memory: SharedWeights | None,
    limits: CopyLimits,
    received: ByteCounter,
) -> None:
    """Receive parts of ``held``, or copy them from the sender's memory. Raises TransferError.

    From another node, the hatch of this one writes those that lie in ``memory``.
    """
    targets = [part_of(held, part) for part in parts]
    shown = _shown(stream)
    if shown is None:
        _receive_far(stream, targets, _ranges(parts, held, memory), _file(memory), received)
        return
    for number, (part, target) in enumerate(zip(parts, targets, strict=True)):
        if number in shown:
            _copy(part, shown[number], target, limits)
        else:
            _receive(stream, number, target)
        _add(received, target)


def _add(counter: ByteCounter, value: torch.Tensor) -> None:
    with counter.lock:
        counter.total += value.nbytes


def _receive(stream: ShardStream, number: int, target: torch.Tensor) -> None:
    whole = target if target.is_contiguous() else torch.empty_like(target)
    stream.receive(number, bytes_of(whole))
    if whole is not target:
        target.copy_(whole)


# -- from node to node ----------------------------------------------------------------------------
def _file(memory: SharedWeights | None) -> int:
    return -1 if memory is None else memory.descriptor


def _ranges(
    parts: Sequence[ShardPart], tensors: Mapping[str, torch.Tensor], memory: SharedWeights | None
) -> list[FileRange | None]:
    """Where each part lies in ``memory``; ``None`` for those that do not, or in no order."""
    if memory is None:
        return [None] * len(parts)
    places = memory.places({part.parameter: tensors[part.parameter] for part in parts})
    found: list[FileRange | None] = []
    for part in parts:
        place = places.get(part.parameter)
        if place is None:
            found.append(None)
        else:
            item_bytes = tensors[part.parameter].element_size()
            found.append(range_of(place.offset, place.shape, item_bytes, part.box))
    return found


def _send_far(
    stream: ShardStream,
    values: Sequence[torch.Tensor],
    ranges: Sequence[FileRange | None],
    descriptor: int,
    throttle: Throttle,
    sent: ByteCounter,
) -> None:
    stream.give_message(msgspec.json.encode(ShownMemory(far=True)))
    stream.take(1)  # the other side has told its hatch where the parts belong
    for number, (value, place) in enumerate(zip(values, ranges, strict=True)):
        if place is None:
            stream.send(number, bytes_of(value.contiguous()), throttle)
        else:
            stream.order_send(number, descriptor, place, throttle)
        _add(sent, value)
    # Behind the last part; then the hatch has read all of this rank's memory that it was told to.
    stream.give_head(len(values), 0)
    stream.take(1)


def _receive_far(
    stream: ShardStream,
    targets: Sequence[torch.Tensor],
    ranges: Sequence[FileRange | None],
    descriptor: int,
    received: ByteCounter,
) -> None:
    if any(ranges):
        stream.order_take(
            descriptor,
            [one or target.nbytes for one, target in zip(ranges, targets, strict=True)],
        )
    stream.give(memoryview(b"\1"))
    for number, (target, place) in enumerate(zip(targets, ranges, strict=True)):
        if place is None:
            _receive(stream, number, target)
        else:
            stream.take_head(number, place.size)
        # The next head comes when the bytes before it are in place.
        if number and ranges[number - 1] is not None:
            _add(received, targets[number - 1])
        if place is None:
            _add(received, target)
    stream.take_head(len(targets), 0)
    if ranges and ranges[-1] is not None:
        _add(received, targets[-1])
    stream.give(memoryview(b"\1"))


def _shown(stream: ShardStream) -> Mapping[int, torch.Tensor] | None:
    """Views of the parts in the memory that the sender shows, by number; ``None`` if it is far."""
    try:
        shown = _SHOWN_MEMORY_DECODER.decode(stream.take_message())
    except msgspec.DecodeError as error:
        raise TransferError(f"cannot read what the sender shows: {error}") from None
    if shown.far:
        return None
    if not shown.places:
        return {}
    tensors = mapped(stream.take_descriptor(), shown.places)
    return {number: part_of(tensors, part) for number, part in shown.parts.items()}


def _copy(part: ShardPart, source: torch.Tensor, target: torch.Tensor, limits: CopyLimits) -> None:
    if (target.shape, target.dtype) != (source.shape, source.dtype):
        raise TransferError(
            f"{part.parameter}: {list(source.shape)} {source.dtype} came, "
            f"not {list(target.shape)} {target.dtype}"
        )
    size = min(_COPY_BYTES, limits.throttle.chunk_bytes)
    for to, of in zip(pieces(target, size), pieces(source, size), strict=True):
        if limits.stopped.is_set():
            raise TransferError("aborted")
        if time.monotonic() >= limits.deadline_s:
            raise TransferError("not all was copied within the deadline")
        if limits.throttle.limits:
            limits.throttle.wait(of.nbytes)
        to.copy_(of)
