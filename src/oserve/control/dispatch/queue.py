"""Requests that wait for a replica, in order of rank."""

import heapq
from collections.abc import Iterator

from oserve.control.dispatch.state import RequestState

# The heap is rebuilt once it holds more stale entries than this.
_MOST_STALE = 64


class RankQueue:
    """A heap by rank, then by arrival number, with lazy deletion of stale entries."""

    __slots__ = ("_heap", "_waiting")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._waiting: dict[int, RequestState] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, state: RequestState) -> bool:
        return state.number in self._waiting

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._waiting.values())

    @property
    def entries(self) -> int:
        """Entries in the heap, stale ones included."""
        return len(self._heap)

    def push(self, state: RequestState) -> None:
        """Add a request, or move it after a change of its rank."""
        self._waiting[state.number] = state
        if len(self._heap) > 2 * len(self._waiting) + _MOST_STALE:
            self._heap = [(item.rank_s, item.number) for item in self._waiting.values()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (state.rank_s, state.number))

    def discard(self, state: RequestState) -> None:
        """Remove a request if it waits here."""
        self._waiting.pop(state.number, None)

    def in_order(self) -> list[tuple[float, int]]:
        """Ranks and numbers of the waiting requests, in order of service."""
        return sorted((item.rank_s, item.number) for item in self._waiting.values())

    def head(self) -> RequestState | None:
        """The request to serve next."""
        while self._heap:
            rank_s, number = self._heap[0]
            state = self._waiting.get(number)
            if state is not None and state.rank_s == rank_s:
                return state
            heapq.heappop(self._heap)
        return None
