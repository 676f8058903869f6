"""One rank's part of a transfer, in threads of its own, so that serving goes on.

Each pair of ranks has a stream (``parts``), with a thread at both ends that waits for no other
stream, so that no order of parts can deadlock. Then weights that arrived in another form are
converted (``conversion``). ``limit_s`` bounds all of it; ``abort`` ends it at once.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from oserve.engines.rank_commands import MoveShards
from oserve.engines.weights.conversion import Conversions
from oserve.engines.weights.jobs import Job
from oserve.engines.weights.model_types import SharedWeights
from oserve.engines.weights.parts import CopyLimits, part_key, part_of, receive_parts, send_parts
from oserve.engines.weights.sockets import Listener, ShardStream, Throttle, TransferError
from oserve.engines.weights.sums import checksum
from oserve.switch.rank_order import ShardPart, StagedTensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self._deadline_s = time.monotonic() + command.limit_s

    def _release(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()
        self._listener.close()

    def _work(self) -> None:
        order, pace = self._order, self._command.bytes_per_s
        try:
            outgoing, incoming = self._connected()
            sending, receiving = Throttle(pace, self.stopped), Throttle(pace, self.stopped)
            sends = [
                partial(self._send, outgoing[peer], parts, sending)
                for peer, parts in order.sends.items()
            ]
            receives = [
                partial(self._receive, incoming[peer], parts, receiving)
                for peer, parts in order.receives.items()
            ]
            self._side_by_side([*sends, *receives])
            if order.convert:
                self._convert(outgoing, incoming)
        finally:
            self._release()
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

    def _send(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        send_parts(stream, parts, self._tensors, self._memory, throttle, self.sent)

    def _receive(self, stream: ShardStream, parts: Sequence[ShardPart], throttle: Throttle) -> None:
        held = {**self._tensors, **self._staged}
        limits = CopyLimits(throttle=throttle, deadline_s=self._deadline_s, stopped=self.stopped)
        receive_parts(stream, parts, held, self._memory, limits, self.received)
        for part in parts:
            if part.parameter in self._staged:
                self.staged_sums[part_key(part)] = checksum(part_of(held, part))

    def _convert(
        self, outgoing: Mapping[int, ShardStream], incoming: Mapping[int, ShardStream]
    ) -> None:
        conversions = Conversions(
            self._order.convert, self._command.number, self._staged, self._tensors
        )
        unthrottled = Throttle(0.0, self.stopped)
        conversions.carry_out(outgoing, incoming, unthrottled, self._side_by_side)


def _empty(staged: StagedTensor) -> torch.Tensor:
    dtype = _DTYPES.get(staged.dtype)
    if dtype is None:
        raise TransferError(f"weights cannot arrive as {staged.dtype}")
    return torch.empty(staged.shape, dtype=dtype)
