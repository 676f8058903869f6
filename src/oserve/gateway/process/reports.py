"""The latest report of each gateway process, and sums over them: pure, times are passed in."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from msgspec.structs import replace

from oserve.gateway.access.limits import NO_LOAD, TenantLoad
from oserve.gateway.metrics import merged
from oserve.gateway.process.messages import WorkerReport

MetricSums = dict[str, dict[str, list[float]]]

STALE_S = 5.0
"""A process on another node that has not reported for so long counts as cut off."""

# A report that was delayed looks as if it came from a clock that is behind: the offset follows the
# quickest reports at once, and others slowly.
_DRIFT = 0.01
# Clocks of nodes that agree better than this are left alone.
_AGREED_S = 1.0
_PS = 10**12
# Every process gets them ten times a second: microseconds do.
_DIGITS = 6
_MOST_ENDED = 10_000


@dataclass(slots=True)
class _Seen:
    report: WorkerReport
    node: str
    at_s: float
    offset_s: float
    counted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """What is known of one process: its port, its requests, and the age of its last report."""

    port: int
    inflight: int
    queued: int
    age_s: float


class ReportBook:
    """Reports by incarnation: a process that ends slowly may report while its successor runs.

    Of a process beside the server nothing is doubted while it lives. One on another node is left
    out of loads and counts after ``STALE_S`` without a report; its metrics stay in the sums.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        # Those on other nodes that count, by the time of their last report.
        self._fresh: OrderedDict[int, None] = OrderedDict()
        # Whole numbers, so that what is added and taken away leaves nothing: picoseconds, requests.
        self._owed: dict[str, list[int]] = {}
        self._queued = 0
        # By tenant: requests in flight, and waiting.
        self._tenants: dict[str, list[int]] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._past: MetricSums = {}

    def take(self, report: WorkerReport, node: str, now_s: float, unix_s: float) -> int:
        """Enter a report; returns by how many seconds the clock of its node is behind.

        Those of a process that counts as ended are dropped.
        """
        old = self._seen.get(report.incarnation)
        offset_s = 0.0
        if node:
            offset_s = unix_s - report.sent_s
            if old is not None and offset_s > old.offset_s:
                offset_s = old.offset_s + _DRIFT * (offset_s - old.offset_s)
        if report.incarnation not in self._ended:
            if report.metrics is None:
                report = replace(report, metrics={} if old is None else old.report.metrics)
            if old is not None and old.counted:
                self._count(old.report, -1)
            self._seen[report.incarnation] = _Seen(report, node, now_s, offset_s)
            self._count(report, 1)
            if node:
                self._fresh[report.incarnation] = None
                self._fresh.move_to_end(report.incarnation)
        self.expire(now_s)
        return round(offset_s) if abs(offset_s) >= _AGREED_S else 0

    def expire(self, now_s: float) -> None:
        """Leave out what has become stale."""
        while self._fresh:
            oldest = next(iter(self._fresh))
            seen = self._seen[oldest]
            if now_s - seen.at_s <= STALE_S:
                return
            seen.counted = False
            self._count(seen.report, -1)
            del self._fresh[oldest]

    def forget(self, incarnation: int) -> None:
        """A process has ended: drop its outstanding work, keep the rest in the sums."""
        self._ended[incarnation] = None
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        self._fresh.pop(incarnation, None)
        seen = self._seen.pop(incarnation, None)
        if seen is not None:
            if seen.counted:
                self._count(seen.report, -1)
            self._past = merged([self._past, seen.report.metrics or {}])

    def _count(self, report: WorkerReport, sign: int) -> None:
        self._queued += sign * report.queued
        for name, (owed_s, count) in report.outstanding.items():
            entry = self._owed.setdefault(name, [0, 0])
            entry[0] += sign * round(owed_s * _PS)
            entry[1] += sign * count
            if entry == [0, 0]:
                del self._owed[name]
        for name, load in report.tenants.items():
            own = self._tenants.setdefault(name, [0, 0])
            own[0] += sign * load.inflight
            own[1] += sign * load.queued
            if own == [0, 0]:
                del self._tenants[name]

    # -- sums -----------------------------------------------------------------------------------
    def elsewhere(self, incarnation: int) -> tuple[dict[str, tuple[float, int]], int]:
        """What the other processes have: seconds of work and requests by replica; requests queued.

        A replica without either is left out.
        """
        seen = self._seen.get(incarnation)
        mine = seen.report.outstanding if seen is not None and seen.counted else {}
        found: dict[str, tuple[float, int]] = {}
        for name, (owed_ps, count) in self._owed.items():
            own_s, own = mine.get(name, (0.0, 0))
            left = owed_ps - round(own_s * _PS), count - own
            if left != (0, 0):
                found[name] = (round(left[0] / _PS, _DIGITS), left[1])
        queued = self._queued
        if seen is not None and seen.counted:
            queued -= seen.report.queued
        return found, queued

    def tenants_elsewhere(self, incarnation: int) -> dict[str, TenantLoad]:
        """What tenants have in the other processes; those with nothing are left out."""
        seen = self._seen.get(incarnation)
        mine = seen.report.tenants if seen is not None and seen.counted else {}
        found: dict[str, TenantLoad] = {}
        for name, (inflight, queued) in self._tenants.items():
            own = mine.get(name, NO_LOAD)
            left = TenantLoad(inflight - own.inflight, queued - own.queued)
            if left != NO_LOAD:
                found[name] = left
        return found

    def position(self, incarnation: int) -> int:
        """How many of the processes that count came before this one."""
        before = 0
        for key, seen in self._seen.items():
            if key == incarnation:
                break
            before += seen.counted
        return before

    def metrics(self) -> MetricSums:
        """The sum over all processes, those that have ended included."""
        return merged([self._past, *(seen.report.metrics or {} for seen in self._seen.values())])

    @property
    def processes(self) -> int:
        """How many count."""
        return sum(seen.counted for seen in self._seen.values())

    @property
    def open_breakers(self) -> dict[str, tuple[str, float]]:
        """Replicas that some process sends no requests: the reason, and the seconds left."""
        found: dict[str, tuple[str, float]] = {}
        for seen in self._seen.values():
            for name, reason in seen.report.open_breakers.items() if seen.counted else ():
                if name not in found or reason[1] > found[name][1]:
                    found[name] = reason
        return found

    @property
    def counted_until_s(self) -> float:
        """Unix time up to which every process has reported its counts; infinity without processes.

        A process that gets no CPU time reports late what it counted in time.
        """
        return min(
            (
                seen.report.counts.until_s + (seen.offset_s if seen.node else 0.0)
                for seen in self._seen.values()
                if seen.counted
            ),
            default=math.inf,
        )

    def view(self, incarnation: int, now_s: float) -> ProcessView | None:
        """What is known of a process; ``None`` before its first report."""
        seen = self._seen.get(incarnation)
        if seen is None:
            return None
        return ProcessView(
            port=seen.report.port,
            inflight=sum(count for _, count in seen.report.outstanding.values()),
            queued=seen.report.queued,
            age_s=now_s - seen.at_s,
        )
