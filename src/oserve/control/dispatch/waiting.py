"""Waiting requests: in order of rank, demoted or shed when late, bounded in number."""

import heapq
from collections.abc import Iterator

from oserve.control.dispatch.overload import (
    DEMOTED_S,
    OverloadPolicy,
    shed_at_s,
    too_late,
)
from oserve.control.dispatch.queue import RankQueue
from oserve.control.dispatch.state import Queued, RequestState
from oserve.control.dispatch.vacating import NEVER_S

# The list of timers is rebuilt once it holds more stale ones than this.
_MOST_STALE = 64


class WaitingRoom:
    """The queue and its timers. Resuming streams are neither demoted nor shed."""

    def __init__(self, overload: OverloadPolicy, max_queued: int) -> None:
        self._overload = overload
        self._max_queued = max_queued
        self._queue = RankQueue()
        self._timers: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, state: RequestState) -> bool:
        return state in self._queue

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._queue)

    @property
    def entries(self) -> tuple[int, int]:
        """Entries in heap and timers, stale ones included."""
        return self._queue.entries, len(self._timers)

    def limit(self, max_queued: int) -> None:
        """Hold at most so many requests from now on; those that wait stay."""
        self._max_queued = max_queued

    @property
    def full(self) -> bool:
        """Whether the queue has reached its bound."""
        return len(self._queue) > self._max_queued

    def push(self, state: RequestState) -> None:
        """Add a request."""
        self._queue.push(state)

    def discard(self, state: RequestState) -> None:
        """Remove a request if it waits here."""
        self._queue.discard(state)

    def head(self) -> RequestState | None:
        """The request to serve next."""
        return self._queue.head()

    def in_order(self) -> list[tuple[float, int]]:
        """Ranks and numbers of the waiting requests, in order of service."""
        return self._queue.in_order()

    def use(self, overload: OverloadPolicy) -> None:
        """Apply another policy from now on; what was demoted stays so."""
        self._overload = overload

    # -- time -----------------------------------------------------------------------------------
    def set_timers(self, state: RequestState) -> None:
        """Set the timers for shedding a request, and for its wait without any replica."""
        if state.give_up_s is not None:
            self._add_timer(state, state.give_up_s)
        if isinstance(state.phase, Queued):
            shed_s = shed_at_s(self._overload, arrival_s=state.arrival_s)
            if shed_s is not None:
                self._add_timer(state, shed_s)

    def _add_timer(self, state: RequestState, at_s: float) -> None:
        if len(self._timers) > 4 * len(self._queue) + _MOST_STALE:
            alive = {item.number for item in self._queue}
            self._timers = [item for item in self._timers if item[1] in alive]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (at_s, state.number))

    @property
    def next_s(self) -> float:
        """The time of the next timer."""
        return self._timers[0][0] if self._timers else NEVER_S

    def due(self, now_s: float) -> list[int]:
        """Numbers of requests whose timers have expired; some may have left the queue."""
        found = []
        while self._timers and self._timers[0][0] <= now_s:
            found.append(heapq.heappop(self._timers)[1])
        return found

    def sheds(self, state: RequestState, now_s: float) -> bool:
        """Whether a waiting request must be shed."""
        if not isinstance(state.phase, Queued):
            return False
        shed_s = shed_at_s(self._overload, arrival_s=state.arrival_s)
        return shed_s is not None and shed_s <= now_s

    @property
    def demotes(self) -> bool:
        """Whether late requests are demoted."""
        return self._overload.ttft_s is not None

    def demote_if_late(
        self, state: RequestState, now_s: float, prefill_s: float, first_token_s: float
    ) -> bool:
        """Demote a request, once, if it can no longer meet its deadline for the first token."""
        if state.demoted or not isinstance(state.phase, Queued):
            return False
        late = too_late(
            self._overload,
            arrival_s=state.arrival_s,
            now_s=now_s,
            prefill_s=prefill_s,
            first_token_s=first_token_s,
        )
        if late:
            state.demoted = True
            state.rank_s = state.arrival_s + DEMOTED_S
            self._queue.push(state)
        return late
