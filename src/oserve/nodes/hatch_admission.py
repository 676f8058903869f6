"""Who is heard at a hatch: pure rules about greetings under way and refusals of late.

Strangers can connect to the port; what they can cost is bounded here. Connections of those who know
the token finish their greeting within milliseconds, so the oldest unfinished one is of a stranger.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

_MAX_PEERS: Final = 1024
_LOG_EVERY_S: Final = 10.0
_WINDOW_S: Final = 1.0


@dataclass(slots=True)
class _Peer:
    """Refusals of one address: in the present window, and since the last line in the log."""

    window_s: float = 0.0
    in_window: int = 0
    logged_s: float = float("-inf")
    unlogged: int = 0


class Admission:
    """Greetings by key, refusals by address. Times in seconds of any one clock."""

    def __init__(self, *, greetings: int, refusals_per_s: int) -> None:
        self._most_greetings = greetings
        self._refusals_per_s = refusals_per_s
        self._greetings: OrderedDict[int, str] = OrderedDict()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self.refused: dict[str, int] = {}

    def heard(self, peer: str, now_s: float) -> bool:
        """Whether a connection of this address is looked at."""
        found = self._peers.get(peer)
        if found is None or now_s - found.window_s >= _WINDOW_S:
            return True
        return found.in_window < self._refusals_per_s

    def begun(self, key: int, peer: str) -> int | None:
        """A greeting begins; the key of the one to be cut off for it, if there are too many.

        That is the oldest of the address that has the most under way.
        """
        self._greetings[key] = peer
        if len(self._greetings) <= self._most_greetings:
            return None
        counts: dict[str, int] = {}
        for address in self._greetings.values():
            counts[address] = counts.get(address, 0) + 1
        most = max(counts.values())
        return next(old for old, address in self._greetings.items() if counts[address] == most)

    def over(self, key: int) -> bool:
        """A greeting is over, however it ended; whether it was under way."""
        return self._greetings.pop(key, None) is not None

    def refuse(self, peer: str, reason: str, now_s: float) -> int | None:
        """Count a refusal. A number: log it, and so many before it that were not logged."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        found = self._peers.setdefault(peer, _Peer())
        self._peers.move_to_end(peer)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)
        if now_s - found.window_s >= _WINDOW_S:
            found.window_s, found.in_window = now_s, 0
        found.in_window += 1
        if now_s - found.logged_s < _LOG_EVERY_S:
            found.unlogged += 1
            return None
        before, found.unlogged, found.logged_s = found.unlogged, 0, now_s
        return before
