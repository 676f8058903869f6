"""The waiting requests of one tenant in one tier."""

from oserve.control.dispatch.charge import FlowKey, ServiceCounter
from oserve.control.dispatch.queue import RankQueue


class TenantFlow(ServiceCounter):
    """The requests of one tenant in one tier, with its counter. Late ones were demoted."""

    __slots__ = ("late", "waiting")

    def __init__(self, key: FlowKey, weight: float) -> None:
        super().__init__(key, weight)
        self.waiting = RankQueue()
        self.late = RankQueue()

    def queue(self, *, late: bool) -> RankQueue:
        """The requests that were demoted, or the others."""
        return self.late if late else self.waiting

    def __len__(self) -> int:
        return len(self.waiting) + len(self.late)
