"""Points of the page's charts, made of request records: pure, times are passed in.

A point tells arrivals, forecast, and the requests that ended within the last minute: percentiles of
the few requests of one interval would only flicker.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from oserve.core import FinishStatus, RequestRecord
from oserve.look.sections import MOST_LINKS, MOST_TYPES

POINT_S = 10.0
"""Seconds between two points."""

WINDOW_S = 60.0
"""Percentiles and attainment are of the requests that ended within so long."""

MOST_POINTS = 360
"""An hour."""

MOST_RECORDS = 20_000
MOST_TENANTS = 8
OTHERS = "(others)"

# They say nothing of a server.
_OF_CLIENT = frozenset({FinishStatus.DISCONNECTED, FinishStatus.CLIENT_ERROR})


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLimits:
    """Limits in seconds of requests without a tier; ``None``: none."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def ms(self) -> tuple[float | None, float | None]:
        """The same in milliseconds."""
        return (
            None if self.ttft_s is None else round(self.ttft_s * 1e3, 3),
            None if self.tpot_s is None else round(self.tpot_s * 1e3, 3),
        )

    def keeps(self, record: RequestRecord) -> bool:
        """Whether a request was served within them."""
        return (
            record.status is FinishStatus.COMPLETED
            and (self.ttft_s is None or (record.ttft_s or 0.0) <= self.ttft_s)
            and (self.tpot_s is None or (record.tpot_s or 0.0) <= self.tpot_s)
        )


class TypePoint(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One type at one time: requests ended and kept in the window, and P50 and P99 in seconds.

    ``rps``: arrivals; without a controller, ended requests. ``expected_rps``, ``low_rps`` and
    ``high_rps``: the forecast at that time. ``None``: unknown.
    """

    ended: int
    kept: int
    rps: float | None
    expected_rps: float | None
    low_rps: float | None
    high_rps: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None


class PagePoint(msgspec.Struct, frozen=True, kw_only=True):
    """All charts at one time, Unix seconds. ``demoted``, ``shed``: requests of the interval."""

    at_s: float
    types: dict[str, TypePoint]
    queued: int = 0
    demoted: int = 0
    shed: int = 0
    power_w: float | None = None
    joules_per_token: float | None = None
    load: float | None = None


class TenantUsed(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one tenant got in the window: requests, and prompt and output tokens."""

    name: str
    requests: int
    tokens: int


class PageRecent(msgspec.Struct, frozen=True, kw_only=True):
    """What the window tells beside the charts.

    ``flow``: (type, replica, requests), the largest, by places in ``types`` and ``replicas``.
    ``by_tier``: requests ended and kept.
    ``failed``: requests that ended by a fault or were refused.
    """

    at_s: float
    requests: int
    failed: int
    types: list[str]
    replicas: list[str]
    flow: list[tuple[int, int, int]]
    tenants: list[TenantUsed]
    by_tier: dict[str, tuple[int, int]]


class RecordWindow:
    """The records of the last minute, at most ``MOST_RECORDS``."""

    def __init__(self, limits: PageLimits) -> None:
        self._limits = limits
        self._held: deque[tuple[float, RequestRecord, bool]] = deque(maxlen=MOST_RECORDS)

    def add(self, records: Iterable[RequestRecord]) -> None:
        """Enter records, in the order in which their requests ended."""
        for record in records:
            if record.status not in _OF_CLIENT:
                kept = record.kept if record.kept is not None else self._limits.keeps(record)
                self._held.append((record.arrival_s + record.e2e_s, record, kept))

    def _within(self, now_s: float) -> list[tuple[float, RequestRecord, bool]]:
        while self._held and self._held[0][0] <= now_s - WINDOW_S:
            self._held.popleft()
        return [item for item in self._held if now_s - WINDOW_S < item[0] <= now_s]

    def types(self, now_s: float, forecast: Mapping[str, Sequence[float]]) -> dict[str, TypePoint]:
        """By type, the most requested first. ``forecast``: now, expected, low and high (rps)."""
        groups: dict[str, list[tuple[RequestRecord, bool]]] = {name: [] for name in forecast}
        for _, record, kept in self._within(now_s):
            groups.setdefault(record.workload_type, []).append((record, kept))
        largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:MOST_TYPES]
        return {name: _type_point(found, forecast.get(name)) for name, found in largest}

    def recent(self, now_s: float) -> PageRecent:
        """Flow, tenants and tiers."""
        flow: Counter[tuple[str, str]] = Counter()
        requests: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        tiers: dict[str, list[int]] = {}
        found = self._within(now_s)
        for _, record, kept in found:
            if record.replica:
                flow[record.workload_type, record.replica] += 1
            if record.tenant:
                requests[record.tenant] += 1
                tokens[record.tenant] += record.prompt_tokens + record.output_tokens
            entry = tiers.setdefault(record.tier, [0, 0])
            entry[0] += 1
            entry[1] += kept
        links = flow.most_common(MOST_LINKS)
        types = sorted({kind for (kind, _), _ in links})
        replicas = sorted({replica for (_, replica), _ in links})
        return PageRecent(
            at_s=round(now_s, 1),
            requests=len(found),
            failed=sum(item.status is not FinishStatus.COMPLETED for _, item, _ in found),
            types=types,
            replicas=replicas,
            flow=[(types.index(kind), replicas.index(replica), n) for (kind, replica), n in links],
            tenants=_tenants(requests, tokens),
            by_tier={
                name: (ended, kept) for name, (ended, kept) in list(tiers.items())[:MOST_TYPES]
            },
        )


def _tenants(requests: Counter[str], tokens: Counter[str]) -> list[TenantUsed]:
    names = [name for name, _ in tokens.most_common()]
    shown = names if len(names) <= MOST_TENANTS else names[: MOST_TENANTS - 1]
    found = [TenantUsed(name=name, requests=requests[name], tokens=tokens[name]) for name in shown]
    if len(names) > len(shown):
        rest = names[len(shown) :]
        found.append(
            TenantUsed(
                name=OTHERS,
                requests=sum(requests[name] for name in rest),
                tokens=sum(tokens[name] for name in rest),
            )
        )
    return found


def _type_point(
    found: Sequence[tuple[RequestRecord, bool]], forecast: Sequence[float] | None
) -> TypePoint:
    served = [record for record, _ in found if record.status is FinishStatus.COMPLETED]
    ttft = sorted(item.ttft_s for item in served if item.ttft_s is not None)
    tpot = sorted(item.tpot_s for item in served if item.tpot_s is not None)
    e2e = sorted(item.e2e_s for item in served)
    now, expected, low, high = (
        [None if rate < 0 else round(rate, 2) for rate in forecast] if forecast else [None] * 4
    )
    return TypePoint(
        ended=len(found),
        kept=sum(kept for _, kept in found),
        rps=round(len(found) / WINDOW_S, 2) if now is None else now,
        expected_rps=expected,
        low_rps=low,
        high_rps=high,
        ttft_p50_s=_percentile(ttft, 0.5),
        ttft_p99_s=_percentile(ttft, 0.99),
        tpot_p50_s=_percentile(tpot, 0.5),
        tpot_p99_s=_percentile(tpot, 0.99),
        e2e_p50_s=_percentile(e2e, 0.5),
        e2e_p99_s=_percentile(e2e, 0.99),
    )


def _percentile(values: Sequence[float], part: float) -> float | None:
    """The nearest rank, to three digits."""
    if not values:
        return None
    rank = min(len(values) - 1, max(0, -(-len(values) * part // 1) - 1))
    return float(f"{values[int(rank)]:.3g}")


class PointHistory:
    """The points of the last hour, oldest first; a gap in time stays a gap."""

    def __init__(self, points: Iterable[PagePoint] = ()) -> None:
        self.points: deque[PagePoint] = deque(points, maxlen=MOST_POINTS)

    def add(self, point: PagePoint) -> None:
        """Add a point and forget those older than an hour before it."""
        while self.points and self.points[-1].at_s >= point.at_s:
            self.points.pop()
        self.points.append(point)
        while self.points[0].at_s <= point.at_s - POINT_S * MOST_POINTS:
            self.points.popleft()
