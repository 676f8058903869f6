"""What is kept of a running stream, as the bytes it came in: cheap, bounded, read only if it moves.

Engines are asked for token ids, which clients that did not ask do not see: they are cut out of each
chunk, the usual one (a whole chunk, one event) without looking at anything else in it.
"""

import re

from oserve.gateway.carry import DONE, Carried, events_of
from oserve.gateway.fields import UnmovableError
from oserve.wire import chunk, dechunk

USAGE = b'"usage":{'
_NO_CHOICES = b'"choices":[]'

# In JSON a quote inside a string is escaped, so these match keys only, never generated text.
_IDS = b'"token_ids":['
_IDS_BYTES = len(_IDS)
_ALL_IDS = re.compile(rb'token_ids":\s*\[[\d,\s]*\]')
_TROUBLE = (b'"finish_reason":"abort"', b'data: {"error"')
_EMPTY = ord("]")
# For a list of ids whose digits and commas are so many characters; a shorter one has no room.
_NULLS = {size: b'"token_ids":null' + b" " * (size - 2) for size in range(2, 256)}
_BLOCK_BYTES = 16 * 1024


class Budget:
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


class Kept:
    """The answer of one stream so far. ``shows_ids``: the client asked for token ids itself.

    ``full`` when it grew past a bound: then nothing is kept, and the stream does not move.
    """

    __slots__ = ("_budget", "_bytes", "_chunks", "_granted", "_shows_ids", "full")

    def __init__(self, budget: Budget, *, shows_ids: bool) -> None:
        self._budget = budget
        self._shows_ids = shows_ids
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._granted = 0
        self.full = False

    def pass_chunk(self, data: bytes) -> bytes:
        """Keep one whole chunk and return it as the client gets it; empty: it is a special one."""
        start = data.rfind(_IDS) + _IDS_BYTES
        if start < _IDS_BYTES or data[start] == _EMPTY:
            return b""
        if self._shows_ids:
            self._keep(data)
            return data
        end = data.find(b"]", start)
        null = _NULLS.get(end - start)
        if null is None:
            return b""
        self._bytes += len(data)
        if self._bytes <= self._granted:
            self._chunks.append(data)
        else:
            self._keep_more(data)
        # As long as what it replaces, so that the chunk's framing still holds.
        return data[: start - _IDS_BYTES] + null + data[end + 1 :]

    def pass_many(self, data: bytes, chunks: int) -> bytes:
        """The same for so many whole chunks; empty: there is a special one among them.

        Those are the chunks without token ids: role, prompt, usage, error, end.
        """
        pieces = data.split(_IDS)
        if len(pieces) != chunks + 1:
            return b""
        shown = pieces[:1]
        for piece in pieces[1:]:
            end = piece.find(b"]")
            null = _NULLS.get(end)
            if null is None:
                return b""
            shown += (null, piece[end + 1 :])
        self._keep(data)
        return data if self._shows_ids else b"".join(shown)

    def pass_special(self, data: bytes) -> tuple[bytes, bytes]:
        """Keep whole chunks; returns a payload for the client, and events that tell of trouble.

        From the first of those on nothing is kept or for the client.
        """
        payload, trouble = dechunk(data), b""
        found = [at for at in map(payload.find, _TROUBLE) if at >= 0]
        if found:
            event = payload.rfind(b"\n\n", 0, min(found))
            cut = 0 if event < 0 else event + 2
            payload, trouble = payload[:cut], payload[cut:]
            data = chunk(payload) if payload else b""
        if data:
            self._keep(data)
        return (payload if self._shows_ids else _ALL_IDS.sub(b'token_ids":null', payload)), trouble

    def _keep(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes <= self._granted:
            self._chunks.append(data)
        else:
            self._keep_more(data)

    def _keep_more(self, data: bytes) -> None:
        """Fill another block, if that is granted."""
        more = -(-(self._bytes - self._granted) // _BLOCK_BYTES) * _BLOCK_BYTES
        full = self.full or self._bytes > self._budget.stream_bytes
        if full or not self._budget.take(more):
            self.drop()
            self.full = True
            return
        self._granted += more
        self._chunks.append(data)

    def drop(self) -> None:
        """Forget everything and return the room."""
        self._budget.give(self._granted)
        self._granted = self._bytes = 0
        self._chunks = []

    def read_into(self, carried: Carried) -> None:
        """Tell all events; UnmovableError where they cannot be made sense of."""
        if self.full:
            raise UnmovableError("its answer is longer than may be kept")
        payload = b"".join(map(dechunk, self._chunks))
        for event in events_of(payload):
            carried.follow(event)
        carried.done = payload.endswith(DONE)


def without_usage_event(payload: bytes) -> bytes:
    """Whole events less the one that carries usage alone."""
    if _NO_CHOICES not in payload:
        return payload
    events = payload.split(b"\n\n")
    return b"\n\n".join(e for e in events if not (_NO_CHOICES in e and USAGE in e))
