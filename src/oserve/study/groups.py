"""Results by service tier and by tenant."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oserve.core import Tier
from oserve.sim.results import FleetResults, Mask
from oserve.sim.types import Status
from oserve.traces import Slo

# A tenant is backlogged if more of its requests than this waited so long at the gateway.
_BACKLOGGED, _WAITED_S = 0.5, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRow:
    """One tier of a run; times are quantiles of completed requests, NaN without any."""

    tier: str
    requests: int
    attainment: float
    p50_ttft_s: float
    p99_ttft_s: float
    p50_tpot_s: float
    p99_tpot_s: float
    p50_e2e_s: float
    p99_e2e_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """One tenant of a run. ``device_s``: device-seconds that fair shares charged it."""

    tenant: str
    requests: int
    p50_ttft_s: float
    p99_ttft_s: float
    device_s: float
    backlogged: bool


def tier_rows(results: FleetResults, tiers: Sequence[Tier]) -> tuple[TierRow, ...]:
    """A row for each tier."""
    if results.tier is None:
        return ()
    found = []
    for number, tier in enumerate(tiers):
        mine = results.tier == number
        slo = Slo(ttft_s=tier.ttft_s, tpot_s=tier.tpot_s, e2e_s=tier.e2e_s)
        summary = results.summary(slo, mine)
        found.append(
            TierRow(
                tier=tier.name,
                requests=int(mine.sum()),
                attainment=summary.slo_attainment,
                p50_ttft_s=summary.ttft_s.p50,
                p99_ttft_s=summary.ttft_s.p99,
                p50_tpot_s=summary.tpot_s.p50,
                p99_tpot_s=summary.tpot_s.p99,
                p50_e2e_s=summary.e2e_s.p50,
                p99_e2e_s=summary.e2e_s.p99,
            )
        )
    return tuple(found)


def tenant_rows(results: FleetResults, tenants: Sequence[str]) -> tuple[TenantRow, ...]:
    """A row for each tenant."""
    if results.tenant is None:
        return ()
    done = results.status == Status.COMPLETED
    waited = ~(results.dispatch_s - results.arrival_s <= _WAITED_S)
    found = []
    for number, name in enumerate(tenants):
        mine = results.tenant == number
        p50_s, p99_s = _first_token_s(results, mine & done)
        found.append(
            TenantRow(
                tenant=name,
                requests=int(mine.sum()),
                p50_ttft_s=p50_s,
                p99_ttft_s=p99_s,
                device_s=float(results.charged_s[number]) if len(results.charged_s) else 0.0,
                backlogged=bool(mine.any()) and float(waited[mine].mean()) > _BACKLOGGED,
            )
        )
    return tuple(found)


def jain_index(rows: Sequence[TenantRow]) -> float | None:
    """Jain's index of the device-seconds of backlogged tenants; ``None`` with fewer than two."""
    values = [row.device_s for row in rows if row.backlogged]
    if len(values) < 2 or not any(values):
        return None
    return math.fsum(values) ** 2 / (len(values) * math.fsum(value * value for value in values))


def _first_token_s(results: FleetResults, mask: Mask) -> tuple[float, float]:
    if not mask.any():
        return math.nan, math.nan
    values = np.quantile((results.first_token_s - results.arrival_s)[mask], [0.5, 0.99])
    return float(values[0]), float(values[1])
