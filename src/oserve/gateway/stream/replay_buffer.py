"""The replay buffer of a running stream: the JSON of its events, parsed only if it migrates."""

import msgspec

from oserve.gateway.stream.continuation import Continuation, EventObject
from oserve.gateway.stream.continuation_fields import UnmovableError

_BLOCK_BYTES = 16 * 1024
_decoder = msgspec.json.Decoder(EventObject)


class ReplayBudget:
    """The limits of the replay buffers of a gateway process in bytes: in all, and per stream."""

    def __init__(self, total_bytes: int, stream_bytes: int) -> None:
        self.stream_bytes = stream_bytes
        self._left_bytes = total_bytes

    def take(self, size: int) -> bool:
        """Reserve so many bytes; returns whether they are available."""
        if size > self._left_bytes:
            return False
        self._left_bytes -= size
        return True

    def give(self, size: int) -> None:
        """Return reserved bytes."""
        self._left_bytes += size


class ReplayBuffer:
    """The answer of one stream so far: the data of its events. ``done``: ``[DONE]`` came.

    ``full``: it exceeded a bound; then it holds nothing, and the stream cannot migrate.
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
        """Store the data of one event."""
        self._bytes += len(data)
        if self._bytes <= self._granted:
            self._events.append(data)
        else:
            self._keep_more(data)

    def _keep_more(self, data: bytes) -> None:
        """Start another block if the budget allows it."""
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
        """Drop everything and return the reserved bytes."""
        self._budget.give(self._granted)
        self._granted = self._bytes = 0
        self._events = []

    def read_into(self, carried: Continuation) -> None:
        """Decode all events; raises UnmovableError if one is invalid."""
        if self.full:
            raise UnmovableError("its answer exceeds the replay buffer")
        for data in self._events:
            carried.follow(read_event(data))
        carried.done = self.done


def read_event(data: bytes) -> EventObject:
    """Decode an event; raises UnmovableError if it is no JSON object."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise UnmovableError("its events are no JSON objects") from None
