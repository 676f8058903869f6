"""Bytes of an answer that cannot move, on their way to the client: passed on as they are.

Where the usage report is not for the client, or it speaks HTTP/1.0, these are whole chunks only.
"""

from typing import TYPE_CHECKING

from oserve.gateway.kept import USAGE, without_usage_event
from oserve.wire import Framing, chunk, dechunk
from oserve.wire.framing import LAST_CHUNK

if TYPE_CHECKING:
    from oserve.gateway.relay import Relay


class Passing:
    """Of one relay and one try."""

    __slots__ = ("_partial", "_relay")

    def __init__(self, relay: "Relay") -> None:
        self._relay = relay
        self._partial = b""

    def __call__(self, data: bytes, framing: Framing | None) -> None:
        """Pass on what has come; ``framing`` has taken it in."""
        relay = self._relay
        if USAGE in data:
            relay.usage = data
        plain = relay.exchange.http_1_0
        if framing is not None and framing.chunked and (relay.hide_usage or plain):
            data = self._whole_chunks(data, framing)
            if relay.hide_usage and USAGE in data:
                data = _less_usage(data)
            if plain:
                data = dechunk(data)
        if data:
            relay.exchange.write(data)

    def _whole_chunks(self, data: bytes, framing: Framing) -> bytes:
        """Hold back a chunk that has not arrived whole."""
        if framing.at_boundary or framing.complete:
            whole, self._partial = self._partial + data, b""
            return whole
        cut = framing.boundary
        if cut == 0:
            self._partial += data
            return b""
        whole, self._partial = self._partial + data[:cut], data[cut:]
        return whole


def _less_usage(data: bytes) -> bytes:
    """Whole chunks less the event that carries usage alone."""
    ends = data.endswith(LAST_CHUNK)
    payload = without_usage_event(dechunk(data))
    rebuilt = chunk(payload) if payload.strip() else b""
    return rebuilt + (LAST_CHUNK if ends else b"")
