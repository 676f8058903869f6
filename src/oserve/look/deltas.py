"""What changed on the page since the last event, within a budget of bytes: pure.

Each tick brings ``BYTES_PER_TICK``. Changed sections go in the order of their names below until
that is used up; a section that is longer than what is left makes a debt, which later ticks pay
before anything else is sent. So no viewer gets more than that on average, however much changes.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

BYTES_PER_TICK: Final = 10_000
ORDER: Final = (
    "now",
    "switches",
    "names",
    "devices",
    "nodes",
    "replicas",
    "loads",
    "types",
    "point",
    "recent",
    "decisions",
    "planned",
    "tiers",
    "ladder",
    "hidden",
    "slo",
    "replay",
)

Sections = Mapping[str, msgspec.Raw]
_DECODER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def sections_of(document: bytes) -> dict[str, msgspec.Raw]:
    """The sections of an encoded state, by name. Raises msgspec.DecodeError."""
    return _DECODER.decode(document)


def event(fields: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


class DeltaBudget:
    """Chooses the sections of the next event."""

    def __init__(self, bytes_per_tick: int = BYTES_PER_TICK) -> None:
        self._per_tick = bytes_per_tick
        self._left = 0
        self._bytes: dict[str, bytes] = {}

    def shown(self, sections: Sections) -> None:
        """Somebody has got all of these, also what the others have not: send that to all.

        Else a section that changes back before its turn would stay wrong for that viewer.
        """
        for name, raw in sections.items():
            if self._bytes.get(name) != bytes(raw):
                self._bytes.pop(name, None)

    def next(self, sections: Sections) -> dict[str, msgspec.Raw]:
        """Changed sections that this tick has room for."""
        self._left = min(self._left + self._per_tick, self._per_tick)
        chosen: dict[str, msgspec.Raw] = {}
        for name in ORDER:
            raw = sections.get(name)
            if raw is None or self._left <= 0:
                continue
            text = bytes(raw)
            if self._bytes.get(name) == text:
                continue
            chosen[name] = raw
            self._bytes[name] = text
            self._left -= len(text) + len(name) + 4
        return chosen
