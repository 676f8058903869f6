"""One rank's part of a transfer, in threads of its own, so that serving goes on.

Every part goes over the stream of its pair of ranks, or is copied from the memory that the sender
shows over it. Each stream has a thread at both ends and waits for no other stream, so that no order
of parts can deadlock. Then weights that arrived in another form are converted (``conversion``).
``limit_s`` bounds all of it; ``abort`` ends it at once.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set

import msgspec
import torch

from oserve.engines.rank_commands import JobReport, MoveShards
from oserve.engines.weights.conversion import Conversions
from oserve.engines.weights.jobs import Job, part_key, part_of, yield_to_serving
from oserve.engines.weights.memory import mapped
from oserve.engines.weights.model_types import SharedWeights, TensorPlace
from oserve.engines.weights.sockets import Listener, ShardStream, Throttle, TransferError
from oserve.engines.weights.sums import bytes_of, checksum, pieces
from oserve.switch.rank_order import ShardPart, StagedTensor

_COPY_BYTES = 8 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ShownMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender's memory holds of the parts, which the receiver copies by itself.

    ``places``: of parameters in the file. ``parts``: by their numbers in the sender's order.
    """

    places: dict[str, TensorPlace] = {}
    parts: dict[int, ShardPart] = {}


class Transfer(Job):
    """Carries a command out on ``tensors`` (CPU tensors, by parameter name).

    Parts that lie in ``memory`` are not sent: the receiver copies them from there.
    """

    def __init__(
        self,
        command: MoveShards,
        tensors: Mapping[str, torch.Tensor],
        listener: Listener,
        memory: SharedWeights | None = None,
    ) -> None:
        super().__init__(command.name)
        self._memory = memory
        self.staged_sums: dict[str, int] = {}
        self._command = command
        self._order = command.order
        self._tensors = tensors
        self._listener = listener
        self._staged = {name: _empty(staged) for name, staged in self._order.staged.items()}
        self._streams: list[ShardStream] = []
        self._lock = threading.Lock()
        self._sent_bytes = 0
        self._received_bytes = 0
        self._deadline_s = time.monotonic() + command.limit_s

    def report(self) -> JobReport:
        """The state now, with the bytes so far."""
        before = super().report()
        return JobReport(
            name=before.name,
            state=before.state,
            reason=before.reason,
            seconds=before.seconds,
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
        )

    def abort(self) -> None:
        """End it as soon as possible."""
        super().abort()
        self._close_streams()

    def _close_streams(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()
        self._listener.close()

    def _work(self) -> None:
        order, pace = self._order, self._command.bytes_per_s
        try:
            outgoing, incoming = self._connected()
            sending = Throttle(pace, self.stopped)
            receiving = Throttle(pace, self.stopped)
            self._side_by_side(
                [
                    *(
                        (lambda s=outgoing[peer], p=parts: self._send(s, p, sending))
                        for peer, parts in order.sends.items()
                    ),
                    *(
                        (lambda s=incoming[peer], p=parts: self._receive(s, p, receiving))
                        for peer, parts in order.receives.items()
                    ),
                ]
            )
            conversions = Conversions(
                order.convert, self._command.number, self._staged, self._tensors
            )
            unthrottled = Throttle(0.0, self.stopped)
            conversions.carry_out(outgoing, incoming, unthrottled, self._side_by_side)
        finally:
            self._close_streams()
            self._staged.clear()

    def _peers(self) -> tuple[list[int], list[int]]:
        """Ranks that call this one, and ranks that it calls."""
        sharing = {peer for one in self._order.convert for peer in one.peers}
        sharing.discard(self._command.number)
        callers = sorted(set(self._order.receives) | sharing)
        called = sorted(set(self._order.sends) | sharing)
        return callers, called

    def _connected(self) -> tuple[dict[int, ShardStream], dict[int, ShardStream]]:
        """Streams to the ranks that this one calls, and from those that call it."""
        command = self._command
        callers, called = self._peers()
        outgoing: dict[int, ShardStream] = {}
        incoming: dict[int, ShardStream] = {}

        def call() -> None:
            for peer in called:
                outgoing[peer] = ShardStream.call(
                    command.addresses[peer], command.name, command.number, self._deadline_s
                )

        def accept() -> None:
            incoming.update(self._listener.accept(command.name, callers, self._deadline_s))

        try:
            self._side_by_side([call, accept])
        finally:
            # If one rank cannot be reached, closing these tells the others.
            with self._lock:
                self._streams = [*outgoing.values(), *incoming.values()]
        if self.stopped.is_set():
            raise TransferError("aborted")
        return outgoing, incoming

    def _side_by_side(self, work: Sequence[Callable[[], None]]) -> None:
        """Do all of it at once, each in a thread; the first error ends the others."""
        failed: list[Exception] = []

        def guarded(one: Callable[[], None]) -> None:
            yield_to_serving()
            try:
                one()
            except Exception as error:  # raised again below, in the thread that waits for all
                failed.append(error)
                self._close_streams()

        threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _send(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        shown = self._show(stream, parts)
        for number, part in enumerate(parts):
            values = part_of(self._tensors, part)
            if part.parameter not in shown:
                stream.send(number, bytes_of(values.contiguous()), throttle)
            with self._lock:
                self._sent_bytes += values.nbytes

    def _receive(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        shown = self._see(stream)
        for number, part in enumerate(parts):
            staged = part.parameter in self._staged
            place = part_of(self._staged if staged else self._tensors, part)
            if number in shown:
                self._copy(place, shown[number], throttle)
            else:
                whole = place if place.is_contiguous() else torch.empty_like(place)
                stream.receive(number, bytes_of(whole))
                if whole is not place:
                    place.copy_(whole)
            if staged:
                self.staged_sums[part_key(part)] = checksum(place)
            with self._lock:
                self._received_bytes += place.nbytes

    def _show(self, stream: ShardStream, parts: Sequence[ShardPart]) -> Set[str]:
        """Hand over the memory that holds some of the parts; returns those parameters' names."""
        if self._memory is None:
            shown = ShownMemory()
        else:
            own = {one.parameter: self._tensors[one.parameter] for one in self._known(parts)}
            places = self._memory.places(own)
            shown = ShownMemory(
                places=places,
                parts={n: part for n, part in enumerate(parts) if part.parameter in places},
            )
        stream.give_message(msgspec.json.encode(shown))
        if self._memory is not None and shown.places:
            stream.give_descriptor(self._memory.descriptor)
        return shown.places.keys()

    def _known(self, parts: Sequence[ShardPart]) -> list[ShardPart]:
        return [part for part in parts if part.parameter in self._tensors]

    def _see(self, stream: ShardStream) -> Mapping[int, torch.Tensor]:
        """Views of the parts in the memory that the sender shows, by number."""
        try:
            shown = msgspec.json.decode(stream.take_message(), type=ShownMemory)
        except msgspec.DecodeError as error:
            raise TransferError(f"cannot read what the sender shows: {error}") from None
        if not shown.places:
            return {}
        tensors = mapped(stream.take_descriptor(), shown.places)
        return {number: part_of(tensors, part) for number, part in shown.parts.items()}

    def _copy(self, place: torch.Tensor, part: torch.Tensor, throttle: Throttle) -> None:
        if (place.shape, place.dtype) != (part.shape, part.dtype):
            raise TransferError(f"{list(part.shape)} {part.dtype} came, not {list(place.shape)}")
        size = min(_COPY_BYTES, throttle.chunk_bytes)
        for to, of in zip(pieces(place, size), pieces(part, size), strict=True):
            if self.stopped.is_set():
                raise TransferError("aborted")
            if time.monotonic() >= self._deadline_s:
                raise TransferError("not all was copied within the deadline")
            throttle.wait(of.nbytes)
            to.copy_(of)


def _empty(staged: StagedTensor) -> torch.Tensor:
    dtype = _DTYPES.get(staged.dtype)
    if dtype is None:
        raise TransferError(f"weights cannot arrive as {staged.dtype}")
    return torch.empty(staged.shape, dtype=dtype)
