"""What is kept of a running stream: the JSON of its events, bounded, read only if it moves."""

import msgspec

from oserve.gateway.stream.continuation import Continuation, EventObject
from oserve.gateway.stream.continuation_fields import UnmovableError

_BLOCK_BYTES = 16 * 1024
_decoder = msgspec.json.Decoder(EventObject)


class ReplayBudget:
    """Bytes that streams of one gateway process may keep in all, and each of them."""

    def __init__(self, total_bytes: int, stream_bytes: int) -> None:
        self.stream_bytes = stream_bytes
        self._left_bytes = total_bytes

    def take(self, size: int) -> bool:
        """Reserve so many bytes, if there are."""
        if size > self._left_bytes:
            return False
        self._left_bytes -= size
        return True

    def give(self, size: int) -> None:
        """Return what was reserved."""
        self._left_bytes += size


class ReplayBuffer:
    """The answer of one stream so far: the data of its events, less ``[DONE]``, which is ``done``.

    ``full`` when it grew past a bound: then nothing is kept, and the stream does not move.
    """

    __slots__ = ("_budget", "_bytes", "_events", "_granted", "done", "full")

    def __init__(self, budget: ReplayBudget) -> None:
        self._budget = budget
        self._events: list[bytes] = []
        self._bytes = 0
        self._granted = 0
        self.full = False
        self.done = False

    def keep(self, data: bytes) -> None:
        """Keep the data of one event."""
        self._bytes += len(data)
        if self._bytes <= self._granted:
            self._events.append(data)
        else:
            self._keep_more(data)

    def _keep_more(self, data: bytes) -> None:
        """Fill another block, if that is granted."""
        most = self._budget.stream_bytes
        more = -(-(self._bytes - self._granted) // _BLOCK_BYTES) * _BLOCK_BYTES
        more = min(more, most - self._granted)
        full = self.full or self._bytes > most
        if full or not self._budget.take(more):
            self.drop()
            self.full = True
            return
        self._granted += more
        self._events.append(data)

    def drop(self) -> None:
        """Forget everything and return the room."""
        self._budget.give(self._granted)
        self._granted = self._bytes = 0
        self._events = []

    def read_into(self, carried: Continuation) -> None:
        """Tell all events; UnmovableError where they cannot be made sense of."""
        if self.full:
            raise UnmovableError("its answer is longer than may be kept")
        for data in self._events:
            carried.follow(read_event(data))
        carried.done = self.done


def read_event(data: bytes) -> EventObject:
    """The JSON of an event; UnmovableError if it is none."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise UnmovableError("its events are no JSON objects") from None
