"""Waiting requests: in order of rank, demoted or shed when late, bounded in number."""

import heapq
from collections.abc import Callable, Iterator

from oserve.control.dispatch.fair import FairQueue
from oserve.control.dispatch.overload import (
    DEMOTED_S,
    OverloadPolicy,
    shed_at_s,
    too_late,
)
from oserve.control.dispatch.state import Queued, RequestState
from oserve.control.dispatch.tiers import with_ttft
from oserve.control.dispatch.vacating import NEVER_S
from oserve.core.tier import least

# The list of timers is rebuilt once it holds more stale ones than this.
_MOST_STALE = 64


class WaitingRoom:
    """The queue and its timers. Resuming streams are neither demoted nor shed."""

    def __init__(
        self,
        overload: OverloadPolicy,
        max_queued: int,
        saved_s: Callable[[RequestState], float] | None = None,
    ) -> None:
        self._overload = overload
        self._by_tier = False
        self._max_queued = max_queued
        self.fair = self._queue = FairQueue(saved_s)
        # By tenant, over all tiers: its waiting requests.
        self.owned: dict[str, int] = {}
        self._timers: list[tuple[float, int]] = []
        # By urgency: the waiting requests that were not demoted, and their prompt tokens.
        self._backlog: dict[float, list[int]] = {}

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
        if state not in self._queue:
            self._own(state, 1)
            if not state.demoted:
                self._count(state, 1)
        self._queue.push(state)

    def discard(self, state: RequestState) -> None:
        """Remove a request if it waits here."""
        if state in self._queue:
            self._own(state, -1)
            if not state.demoted:
                self._count(state, -1)
        self._queue.discard(state)

    def _own(self, state: RequestState, change: int) -> None:
        if state.owner:
            left = self.owned.get(state.owner, 0) + change
            if left:
                self.owned[state.owner] = left
            else:
                del self.owned[state.owner]

    def _count(self, state: RequestState, change: int) -> None:
        backlog = self._backlog.setdefault(state.urgency_s, [0, 0])
        backlog[0] += change
        backlog[1] += change * state.prompt_tokens
        if not backlog[0]:
            del self._backlog[state.urgency_s]

    def ahead_of(self, state: RequestState) -> tuple[int, int]:
        """Waiting requests of tiers at least as urgent, and their prompt tokens."""
        found = [own for urgency_s, own in self._backlog.items() if urgency_s <= state.urgency_s]
        return sum(own[0] for own in found), sum(own[1] for own in found)

    def head(self) -> RequestState | None:
        """The request to serve next."""
        return self._queue.head()

    def passing(self, skip: Callable[[RequestState], bool]) -> Iterator[RequestState]:
        """All waiting requests in order of service, while some of them are sent."""
        return self._queue.passing(skip)

    def crowded_out(self, state: RequestState) -> RequestState:
        """The request to refuse for a full queue (see ``FairQueue.crowded_out``)."""
        return self._queue.crowded_out(state)

    def use(self, overload: OverloadPolicy, *, by_tier: bool = False) -> None:
        """Apply another policy from now on; what was demoted stays so.

        ``by_tier``: there are tiers, each with a time to first token of its own.
        """
        self._overload, self._by_tier = overload, by_tier

    def _policy(self, state: RequestState) -> OverloadPolicy:
        """The policy for one request: with a tier, its own time to first token."""
        if state.promise is None:
            return self._overload
        return with_ttft(self._overload, state.due_s)

    # -- time -----------------------------------------------------------------------------------
    def set_timers(self, state: RequestState) -> None:
        """Set the timers for shedding a request, and for its wait without any replica."""
        if state.give_up_s is not None:
            self._add_timer(state, state.give_up_s)
        if isinstance(state.phase, Queued):
            shed_s = self._shed_at_s(state)
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
        shed_s = self._shed_at_s(state)
        return shed_s is not None and shed_s <= now_s

    def _shed_at_s(self, state: RequestState) -> float | None:
        due_s = state.due_s if state.refused_late else None
        return least(
            (
                shed_at_s(self._overload, arrival_s=state.arrival_s),
                None if due_s is None else state.arrival_s + due_s,
            )
        )

    @property
    def demotes(self) -> bool:
        """Whether late requests are demoted, or refused."""
        return self._by_tier or self._overload.ttft_s is not None

    def is_late(
        self, state: RequestState, now_s: float, prefill_s: float, first_token_s: float
    ) -> bool:
        """Whether a request that is not demoted can no longer meet its deadline."""
        if state.demoted or not isinstance(state.phase, Queued):
            return False
        return too_late(
            self._policy(state),
            arrival_s=state.arrival_s,
            now_s=now_s,
            prefill_s=prefill_s,
            first_token_s=first_token_s,
        )

    def demote(self, state: RequestState) -> None:
        """Serve a waiting request after all others from now on."""
        self._count(state, -1)
        state.demoted = True
        state.rank_s = state.arrival_s + DEMOTED_S
        self._queue.push(state)
