"""How long a connection has been silent, as far as its observer can tell. Pure."""

from typing import Final

PING_S: Final = 1.0
"""Seconds between two pings of a server."""

# A look that comes later than this many intervals counts as this many: the observer was held up.
_LATE = 1.5


class LineWatch:
    """Looked at every ``PING_S`` or so; a connection is lost after ``limit_s`` of silence."""

    def __init__(self, now_s: float, limit_s: float) -> None:
        self._looked_s = now_s
        self._limit_s = limit_s
        self.silent_s = 0.0

    def heard(self) -> None:
        """A message has come."""
        self.silent_s = 0.0

    def is_lost(self, now_s: float) -> bool:
        """Look at it: whether it has been silent for too long."""
        self.silent_s += min(max(0.0, now_s - self._looked_s), _LATE * PING_S)
        self._looked_s = now_s
        return self.silent_s >= self._limit_s
