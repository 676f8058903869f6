"""One worker's part of a transfer, in threads of its own, so that serving goes on.

First every box goes over the stream of its pair of ranks, or is copied from the memory that the
other end shows over it; each stream has a thread at both ends and waits for nobody else, so that no
order of operations can lock up. Then, if weights are quantised on
the way, the ranks of a layer exchange the largest values of rows that they share, and each
quantises its part. ``deadline_s`` bounds all of it; ``abort`` ends it at once.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from oserve.engines.weights.memory import Memory, mapped
from oserve.engines.weights.sockets import Listener, ShardStream, Throttle, TransferError
from oserve.engines.weights.sums import bytes_of, checksum, pieces

# A parameter's name, and start and stop in each dimension.
Part = tuple[str, Sequence[Sequence[int]]]

_NICE = 5
_COPY_BYTES = 8 << 20
_PACE = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one rank does. Ranks are numbers of the whole transfer.

    ``sends`` and ``receives``: parts by peer, in the order of both. ``staged``: parameters that
    arrive in another shape or type than the engine's, with theirs. ``convert``: of these, how
    (``int8`` or ``cast``), and the ranks (own among them) with which rows are shared.
    """

    name: str
    rank: int
    addresses: Sequence[str]
    limit_s: float
    bytes_per_s: float = 0.0
    sends: Sequence[tuple[int, Sequence[Part]]] = ()
    receives: Sequence[tuple[int, Sequence[Part]]] = ()
    staged: Mapping[str, tuple[Sequence[int], str]] = field(default_factory=dict)
    convert: Sequence[tuple[str, str, Sequence[int]]] = ()


class Job:
    """Something done in a background thread; ``document`` tells how it stands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "running"
        self.reason = ""
        self.stopped = threading.Event()
        self._began_s = time.monotonic()
        self._took_s = 0.0

    def start(self) -> None:
        """In a thread that yields to serving."""
        threading.Thread(target=self._run, name=f"oserve-{self.name}", daemon=True).start()

    def document(self) -> dict[str, Any]:
        """Plain data."""
        took_s = self._took_s or time.monotonic() - self._began_s
        return {"name": self.name, "state": self.state, "reason": self.reason, "seconds": took_s}

    def abort(self) -> None:
        """End it as soon as can be."""
        self.stopped.set()

    def _run(self) -> None:
        _yield_to_serving()
        state = "done"
        try:
            self._work()
        except TransferError as error:
            state, self.reason = "failed", str(error)
        except Exception as error:
            state, self.reason = "failed", f"{type(error).__name__}: {error}"
        if self.stopped.is_set() and state == "failed":
            self.reason = "aborted"
        self._took_s = time.monotonic() - self._began_s
        self.state = state

    def _work(self) -> None:
        raise NotImplementedError


class Transfer(Job):
    """Carries an order out on ``tensors`` (CPU tensors, by parameter name).

    What lies in ``memory`` is not sent: the other side copies it from there.
    """

    def __init__(
        self,
        order: Order,
        tensors: Mapping[str, Any],
        listener: Listener,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(order.name)
        self._memory = memory
        self.staged_sums: dict[str, int] = {}
        self._order = order
        self._tensors = tensors
        self._listener = listener
        self._staged = {
            name: torch.empty(tuple(shape), dtype=_dtype(dtype))
            for name, (shape, dtype) in order.staged.items()
        }
        self._largest: dict[tuple[str, int], Any] = {}
        self._streams: list[ShardStream] = []
        self._lock = threading.Lock()
        self._moved = [0, 0]
        self._deadline_s = time.monotonic() + order.limit_s

    def document(self) -> dict[str, Any]:
        """See ``Job.document``."""
        return {
            **super().document(),
            "sent_bytes": self._moved[0],
            "received_bytes": self._moved[1],
        }

    def abort(self) -> None:
        """See ``Job.abort``."""
        super().abort()
        self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()
        self._listener.close()

    def _work(self) -> None:
        order = self._order
        try:
            callers, called = self._peers()
            outgoing, incoming = self._connected(callers, called)
            throttle = Throttle(order.bytes_per_s, self.stopped)
            taking = Throttle(order.bytes_per_s, self.stopped)
            self._side_by_side(
                [
                    *(
                        (lambda s=outgoing[peer], p=parts: self._send(s, p, throttle))
                        for peer, parts in order.sends
                    ),
                    *(
                        (lambda s=incoming[peer], p=parts: self._receive(s, p, taking))
                        for peer, parts in order.receives
                    ),
                ]
            )
            self._convert(outgoing, incoming)
        finally:
            self._hang_up()
            self._staged.clear()
            self._largest.clear()

    def _peers(self) -> tuple[list[int], list[int]]:
        """Ranks that send to this one, and those it sends to."""
        sharing = {peer for _, _, peers in self._order.convert for peer in peers}
        sharing.discard(self._order.rank)
        callers = sorted({peer for peer, _ in self._order.receives} | sharing)
        called = sorted({peer for peer, _ in self._order.sends} | sharing)
        return callers, called

    def _connected(
        self, callers: Sequence[int], called: Sequence[int]
    ) -> tuple[dict[int, ShardStream], dict[int, ShardStream]]:
        order = self._order
        found: dict[int, ShardStream] = {}

        def call() -> None:
            for peer in called:
                found[peer] = ShardStream.call(
                    order.addresses[peer], order.name, order.rank, self._deadline_s
                )

        incoming: dict[int, ShardStream] = {}

        def accept() -> None:
            incoming.update(self._listener.accept(order.name, callers, self._deadline_s))

        try:
            self._side_by_side([call, accept])
        finally:
            # Whoever was reached has to hear it if another was not.
            with self._lock:
                self._streams = [*found.values(), *incoming.values()]
        if self.stopped.is_set():
            raise TransferError("aborted")
        return found, incoming

    def _side_by_side(self, work: Sequence[Callable[[], None]]) -> None:
        """All at once; the first that fails ends the others."""
        failed: list[Exception] = []

        def guarded(one: Callable[[], None]) -> None:
            _yield_to_serving()
            try:
                one()
            except Exception as error:
                failed.append(error)
                self._hang_up()

        threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _send(self, stream: ShardStream, parts: Sequence[Part], throttle: Throttle) -> None:
        shown = self._show(stream, parts)
        for number, (name, box) in enumerate(parts):
            part = part_of(self._tensors[name], box)
            if name not in shown:
                stream.send(number, bytes_of(part.contiguous()), throttle)
            self._count(0, part.nbytes)

    def _receive(self, stream: ShardStream, parts: Sequence[Part], throttle: Throttle) -> None:
        seen = self._see(stream)
        for number, (name, box) in enumerate(parts):
            place = part_of(self._staged.get(name, self._tensors.get(name)), box)
            if number in seen:
                self._copy(place, seen[number], throttle)
            else:
                whole = place if place.is_contiguous() else torch.empty_like(place)
                stream.receive(number, bytes_of(whole))
                if whole is not place:
                    place.copy_(whole)
            if name in self._staged:
                self.staged_sums[part_key(name, box)] = checksum(place)
            self._count(1, place.nbytes)

    def _show(self, stream: ShardStream, parts: Sequence[Part]) -> Set[str]:
        """Tell the other side what of it it can map, and hand that over; the names."""
        own = {name: self._tensors[name] for name, _ in parts if name in self._tensors}
        places = self._memory.places(own) if self._memory is not None else {}
        boxes = [(number, *part) for number, part in enumerate(parts) if part[0] in places]
        words = json.dumps([places, boxes]).encode()
        stream.give(memoryview(len(words).to_bytes(8, "big") + words))
        if self._memory is not None and places:
            stream.give_descriptor(self._memory.descriptor)
        return places.keys()

    def _see(self, stream: ShardStream) -> Mapping[int, Any]:
        """What the other side shows of it, by number."""
        places, boxes = json.loads(stream.take(int.from_bytes(stream.take(8), "big")))
        if not places:
            return {}
        tensors = mapped(stream.take_descriptor(), places)
        return {number: part_of(tensors[name], box) for number, name, box in boxes}

    def _copy(self, place: Any, part: Any, throttle: Throttle) -> None:
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

    def _count(self, way: int, size: int) -> None:
        with self._lock:
            self._moved[way] += size

    # -- quantising on the way ------------------------------------------------------------------
    def _convert(
        self, outgoing: Mapping[int, ShardStream], incoming: Mapping[int, ShardStream]
    ) -> None:
        order = self._order
        shared = [(name, peers) for name, scheme, peers in order.convert if len(peers) > 1]
        for name, _ in shared:
            self._largest[name, order.rank] = _largest(self._staged[name])
        free = Throttle(0.0, self.stopped)

        def tell(peer: int) -> None:
            for number, name in enumerate(name for name, peers in shared if peer in peers):
                outgoing[peer].send(number, bytes_of(self._largest[name, order.rank]), free)

        def hear(peer: int) -> None:
            for number, name in enumerate(name for name, peers in shared if peer in peers):
                heard = torch.empty_like(self._largest[name, order.rank])
                incoming[peer].receive(number, bytes_of(heard))
                self._largest[name, peer] = heard

        others = {peer for _, peers in shared for peer in peers} - {order.rank}
        self._side_by_side(
            [
                *((lambda p=peer: tell(p)) for peer in sorted(others)),
                *((lambda p=peer: hear(p)) for peer in sorted(others)),
            ]
        )
        for name, scheme, peers in order.convert:
            self._convert_one(name, scheme, peers)

    def _convert_one(self, name: str, scheme: str, peers: Sequence[int]) -> None:
        staged = self._staged.pop(name)
        if scheme == "cast":
            self._tensors[name].copy_(staged)
            return
        if scheme != "int8":
            raise TransferError(f"{name} cannot be made {scheme} on the way")
        largest = _largest(staged)
        for peer in peers:
            largest = torch.maximum(largest, self._largest.get((name, peer), largest))
        scale = largest / _PACE
        scale[scale == 0] = 1.0  # rows of zeros must not divide by zero
        values = torch.clamp(torch.round(staged.float() / scale), -_PACE, _PACE)
        self._tensors[name].copy_(values.to(torch.int8))
        self._tensors[name.removesuffix("weight") + "weight_scale"].copy_(scale)


class Checksums(Job):
    """CRC-32 of parts; ``staged`` are those of parts that were only held on the way."""

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Any],
        parts: Sequence[Part],
        staged: Mapping[str, int],
    ) -> None:
        super().__init__(name)
        self._tensors = tensors
        self._parts = parts
        self._staged = staged
        self._sums: list[int] = []

    def document(self) -> dict[str, Any]:
        """See ``Job.document``."""
        done = self.state == "done"
        return {**super().document(), "sums": self._sums if done else []}

    def _work(self) -> None:
        # What several others were given is summed once.
        known = dict(self._staged)
        for name, box in self._parts:
            if self.stopped.is_set():
                raise TransferError("aborted")
            key = part_key(name, box)
            if key not in known:
                known[key] = checksum(part_of(self._tensors[name], box))
            self._sums.append(known[key])


def part_key(name: str, box: Sequence[Sequence[int]]) -> str:
    """A name for a part."""
    return f"{name}{[list(edge) for edge in box]}"


def part_of(tensor: Any, box: Sequence[Sequence[int]]) -> Any:
    """A view of what is in the box. Raises TransferError if there is no tensor."""
    if tensor is None:
        raise TransferError("a parameter is not known here")
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def _largest(weight: Any) -> Any:
    """Of each row, [rows, 1], in fp32."""
    return weight.abs().amax(dim=1, keepdim=True).float()


def _dtype(name: str) -> Any:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _yield_to_serving() -> None:
    """Lower this thread's priority, so that the engine's own goes first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
