"""The order in which waiting requests of all tenants are tried while only some find room."""

import heapq
from collections.abc import Callable, Iterable

from oserve.control.dispatch.flows import TenantFlow
from oserve.control.dispatch.state import RequestState


class PassingOrder:
    """The order in which requests of one tier and kind are tried, while some are sent."""

    __slots__ = ("_heap", "_left", "late")

    def __init__(self, late: bool, flows: Iterable[TenantFlow]) -> None:
        self.late = late
        # By flow: its requests, the next one last; sorted when its turn comes.
        self._left: dict[TenantFlow, list[tuple[float, int, RequestState]] | None] = {}
        self._heap: list[tuple[float, int, TenantFlow]] = []
        for flow in flows:
            first = flow.queue(late=late).head()
            if first is not None:
                self._left[flow] = None
                heapq.heappush(self._heap, (flow.level_s, -flow.woken, flow))

    def _lowest(self) -> TenantFlow | None:
        while self._heap:
            level_s, woken, flow = self._heap[0]
            left = self._left[flow]
            if left is None or left:
                if level_s == flow.level_s:
                    return flow
                heapq.heapreplace(self._heap, (flow.level_s, woken, flow))
            else:
                heapq.heappop(self._heap)
        return None

    def head(self) -> RequestState | None:
        """The next one."""
        flow = self._lowest()
        if flow is None:
            return None
        left = self._left[flow]
        return flow.queue(late=self.late).head() if left is None else left[-1][2]

    def take(self) -> RequestState:
        """Remove the next one, which there must be."""
        flow = self._lowest()
        if flow is None:
            raise LookupError("there is no next request")
        left = self._left[flow]
        if left is None:
            queue = flow.queue(late=self.late)
            left = sorted(((item.rank_s, item.number, item) for item in queue), reverse=True)
            self._left[flow] = left
        return left.pop()[2]

    def drop(self) -> None:
        """Try nothing more of the tenant whose turn it is."""
        flow = self._lowest()
        if flow is not None:
            self._left[flow] = []

    def add(self, flow: TenantFlow, state: RequestState) -> None:
        """Add a request that was demoted meanwhile."""
        if flow not in self._left:
            self._left[flow] = []
        left = self._left[flow]
        # Not sorted yet, it will be found in the queue.
        if left is not None:
            if not left:
                heapq.heappush(self._heap, (flow.level_s, -flow.woken, flow))
            left.append((state.rank_s, state.number, state))
            left.sort(reverse=True)


class FreeSlots:
    """Who goes on once a tenant has left a slot free that is not for it.

    Nothing more of that tenant is tried. Others of its tier pass it if they begin to wait now.
    Those that wait longer wait for their turn: between tenants that wait all the time only their
    counters decide. ``woke``: whether a request's tenant begins to wait now.
    """

    __slots__ = ("_done", "_left", "_woke")

    def __init__(self, woke: Callable[[RequestState], bool]) -> None:
        self._woke = woke
        self._done: set[tuple[str, bool, str]] = set()
        self._left: set[tuple[str, bool]] = set()

    def skips(self, state: RequestState) -> bool:
        """Whether nothing more of a request's tenant is tried."""
        if not self._left:
            return False
        if (*_group(state), state.tenant) in self._done:
            return True
        return self.passes(state) and not self._woke(state)

    def passes(self, state: RequestState) -> bool:
        """Whether a request would take a slot that another tenant has left free."""
        return _group(state) in self._left

    def leave(self, state: RequestState) -> None:
        """A request leaves a slot free."""
        self._done.add((*_group(state), state.tenant))
        self._left.add(_group(state))


def _group(state: RequestState) -> tuple[str, bool]:
    return "" if state.tier is None else state.tier.name, state.demoted
