"""The waiting requests of each tenant in a tier, and which tenant goes next."""

import heapq

from oserve.control.dispatch.charge import FlowKey, ServiceCounter
from oserve.control.dispatch.queue import RankQueue

# Heaps are rebuilt once they hold more stale entries than this.
_MOST_STALE = 64
# Of the tenants within the debt for locality, so many are compared.
_MOST_COMPARED = 8


class TenantFlow(ServiceCounter):
    """The requests of one tenant in one tier, with its counter. Late ones were demoted."""

    __slots__ = ("late", "tier", "waiting")

    def __init__(self, key: FlowKey, weight: float, tier: "TierFlows") -> None:
        super().__init__(key, weight)
        self.tier = tier
        self.waiting = RankQueue()
        self.late = RankQueue()

    def queue(self, *, late: bool) -> RankQueue:
        """The requests that were demoted, or the others."""
        return self.late if late else self.waiting

    def __len__(self) -> int:
        return len(self.waiting) + len(self.late)


class FlowHeap:
    """The flows of a tier with requests of one kind, by counter; stale entries are dropped late."""

    __slots__ = ("_entries", "_late", "_most", "_order")

    def __init__(self, *, late: bool) -> None:
        self._entries: list[tuple[float, int, int, TenantFlow]] = []
        self._most = _MOST_STALE
        self._late = late
        self._order = 0

    def push(self, flow: TenantFlow) -> None:
        """Add a flow that waits, or one whose counter went down."""
        self._order += 1
        # Of equal counters the tenant that began to wait last goes first: it had nothing since.
        heapq.heappush(self._entries, (flow.level_s, -flow.woken, self._order, flow))
        if len(self._entries) > self._most:
            flows = {
                flow: order for *_, order, flow in self._entries if flow.queue(late=self._late)
            }
            self._entries = [
                (flow.level_s, -flow.woken, order, flow) for flow, order in flows.items()
            ]
            heapq.heapify(self._entries)
            self._most = 2 * len(flows) + _MOST_STALE

    def lowest(self) -> TenantFlow | None:
        """The flow that goes next."""
        entries = self._entries
        while entries:
            level_s, _, _, flow = entries[0]
            if flow.queue(late=self._late):
                if level_s == flow.level_s:
                    return flow
                heapq.heappop(entries)
                if level_s < flow.level_s:
                    self.push(flow)
            else:
                heapq.heappop(entries)
        return None

    def lowest_within(self, debt_s: float) -> list[TenantFlow]:
        """The lowest flow, and a few others within a debt of it."""
        found: list[TenantFlow] = []
        while len(found) < _MOST_COMPARED:
            flow = self.lowest()
            if flow is None or (found and flow.level_s > found[0].level_s + debt_s):
                break
            if flow not in found:
                found.append(flow)
            heapq.heappop(self._entries)
        for flow in found:
            self.push(flow)
        return found

    @property
    def entries(self) -> int:
        """Entries, stale ones included."""
        return len(self._entries)


class TierFlows:
    """The flows of one tier that wait, and the one that waited last."""

    __slots__ = ("heaps", "last")

    def __init__(self) -> None:
        self.heaps = (FlowHeap(late=False), FlowHeap(late=True))
        self.last: TenantFlow | None = None

    def floor_s(self) -> float:
        """The counter that a tenant which comes now has at least."""
        usual, late = self.heaps[0].lowest(), self.heaps[1].lowest()
        if usual is not None and late is not None:
            return min(usual.level_s, late.level_s)
        found = usual or late or self.last
        return 0.0 if found is None else found.level_s
