"""Which simulated requests met their limits, and whether enough of each tier did."""

import numpy as np
from numpy.typing import NDArray

from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.traces import Slo

Mask = NDArray[np.bool_]

ATTAINMENT = 0.95
"""Share of all requests that must meet their SLOs for a rate to count as served."""


def met(results: FleetResults, slo: Slo) -> Mask:
    """Which requests completed within the SLO, each within that of its tier."""
    if not slo.tiers or results.tier is None:
        return _met(results, slo)
    good: Mask = np.zeros(len(results.arrival_s), dtype=bool)
    for number, own in enumerate(slo.tiers):
        good |= (results.tier == number) & _met(results, own)
    return good


def _met(results: FleetResults, slo: Slo) -> Mask:
    good: Mask = results.status == Status.COMPLETED
    with np.errstate(invalid="ignore"):
        if slo.ttft_s is not None:
            good &= results.first_token_s - results.arrival_s <= slo.ttft_s
        if slo.e2e_s is not None:
            good &= results.finish_s - results.arrival_s <= slo.e2e_s
        if slo.tpot_s is not None:
            gaps = np.maximum(1, results.made_tokens - 1)
            tpot = (results.finish_s - results.first_token_s) / gaps
            good &= (results.made_tokens <= 1) | (tpot <= slo.tpot_s)
    return good


def attainment(results: FleetResults, slo: Slo) -> float:
    """The share of requests that met the SLO, in the tier where it is least; 1 without requests."""
    return min(tier_attainment(results, slo), default=1.0)


def tier_attainment(results: FleetResults, slo: Slo) -> list[float]:
    """The share of requests that met the SLO, for each tier with requests; or of all."""
    good = met(results, slo)
    return [float(good[mine].mean()) for mine, _ in _parts(results, slo) if mine.any()]


def surely_failed(results: FleetResults, slo: Slo) -> bool:
    """Whether so many requests have missed the SLO that the attainment is out of reach."""
    ended = np.isfinite(results.finish_s)
    waits = ~ended & ~np.isfinite(results.first_token_s)
    waited_s = results.now_s - results.arrival_s
    good = met(results, slo)
    for mine, own in _parts(results, slo):
        bad = int(np.sum(mine & ended & ~good))
        if own.ttft_s is not None:
            bad += int(np.sum(mine & waits & (waited_s > own.ttft_s)))
        if bad > (1.0 - ATTAINMENT) * int(mine.sum()):
            return True
    return False


def _parts(results: FleetResults, slo: Slo) -> list[tuple[Mask, Slo]]:
    """The requests of each tier and its limits; all of them without tiers."""
    if not slo.tiers or results.tier is None:
        return [(np.ones(len(results.arrival_s), dtype=bool), slo)]
    return [(results.tier == number, own) for number, own in enumerate(slo.tiers)]
