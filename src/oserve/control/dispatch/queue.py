"""Requests that wait for a replica, in order of rank."""

import heapq
from collections.abc import Iterator

from oserve.control.dispatch.state import RequestState

# Entries of requests that left, beyond which the heap is made anew.
_MOST_STALE = 64


class RankQueue:
    """A heap by rank, then by number of arrival. Entries of requests that left fall out late."""

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
        """Entries held, of requests that left as well."""
        return len(self._heap)

    def push(self, state: RequestState) -> None:
        """Let a request wait; also after its rank has changed."""
        self._waiting[state.number] = state
        if len(self._heap) > 2 * len(self._waiting) + _MOST_STALE:
            self._heap = [(item.rank_s, item.number) for item in self._waiting.values()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (state.rank_s, state.number))

    def discard(self, state: RequestState) -> None:
        """Let a request go, if it waits."""
        self._waiting.pop(state.number, None)

    def in_order(self) -> list[tuple[float, int]]:
        """Ranks and numbers of all that wait, in the order in which they are served."""
        return sorted((item.rank_s, item.number) for item in self._waiting.values())

    def head(self) -> RequestState | None:
        """The request to be served next."""
        while self._heap:
            rank_s, number = self._heap[0]
            state = self._waiting.get(number)
            if state is not None and state.rank_s == rank_s:
                return state
            heapq.heappop(self._heap)
        return None
