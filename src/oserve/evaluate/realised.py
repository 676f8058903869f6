"""What a switch brought: requests kept within their limits, against the old plan by simulation.

The same requests, with their recorded times and lengths, are served once by the old plan in the
simulator. The new plan is simulated, too, as if it had been there all along: by how much that
differs from what was kept tells how far the simulator is to be believed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oserve.core import DeploymentPlan, FinishStatus, RequestRecord
from oserve.evaluate.simulator import SimulatedTraffic, traffic_from
from oserve.evaluate.switch_scorer import SwitchScorer
from oserve.gateway.records import records_between
from oserve.perf.corrected import Speeds
from oserve.traces import TraceRequest

_OF_CLIENT = frozenset({FinishStatus.DISCONNECTED, FinishStatus.CLIENT_ERROR})
# Requests from before the switch fill the simulated replicas.
_BEFORE_S = 60.0
_MOST_RECORDS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RealisedCase:
    """A switch at ``start_s``, judged by the requests that arrived until ``end_s`` (Unix times).

    ``old`` and ``new``: the plans before and after it, with routing shares. ``tiers``: their names,
    in the order of the simulator's. ``max_model_len``: in tokens.
    """

    records: Path
    old: DeploymentPlan
    new: DeploymentPlan
    start_s: float
    end_s: float
    speeds: Speeds
    max_model_len: int
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RealisedCounts:
    """Of ``requests``: ``kept`` within limits, and so by the simulator under each plan."""

    requests: int
    kept: int
    by_old: int
    by_new: int


def realised(scorer: SwitchScorer, case: RealisedCase) -> RealisedCounts | None:
    """Judge a switch; ``None`` without requests. Raises OServeError for what cannot be simulated.

    A request counts as kept as its record says, else by the scorer's limits.
    """
    rows = sorted(
        records_between(case.records, case.start_s - _BEFORE_S, case.end_s, most=_MOST_RECORDS),
        key=lambda row: row.arrival_s,
    )
    rows = [row for row in rows if row.status not in _OF_CLIENT and row.prompt_tokens]
    counted = np.array([row.arrival_s >= case.start_s for row in rows], dtype=bool)
    if not counted.any():
        return None
    traffic = _traffic(rows, case.max_model_len, case.tiers)
    slo = scorer.slo
    kept = sum(
        row.kept
        if row.kept is not None
        else row.status is FinishStatus.COMPLETED
        and (slo.ttft_s is None or (row.ttft_s or 0.0) <= slo.ttft_s)
        and (slo.tpot_s is None or (row.tpot_s or 0.0) <= slo.tpot_s)
        for row in rows
        if row.arrival_s >= case.start_s
    )
    by_old, by_new = (
        int((scorer.met(plan, traffic, case.speeds) & counted).sum())
        for plan in (case.old, case.new)
    )
    return RealisedCounts(requests=int(counted.sum()), kept=kept, by_old=by_old, by_new=by_new)


def _traffic(
    rows: Iterable[RequestRecord], max_model_len: int, tiers: Sequence[str]
) -> SimulatedTraffic:
    rows = list(rows)
    requests = [
        TraceRequest(
            arrival_s=row.arrival_s,
            prompt_tokens=row.prompt_tokens,
            output_tokens=max(1, row.output_tokens),
        )
        for row in rows
    ]
    places = {name: place for place, name in enumerate(tiers)}
    tier = np.array([places.get(row.tier, 0) for row in rows], dtype=np.int64) if tiers else None
    return traffic_from(requests, max_model_len=max_model_len, tier=tier)
