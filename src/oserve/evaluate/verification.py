"""Plans verified by simulation: the load that a deployment carries while the SLO holds.

``oserve plan --verify`` chooses by it. The planner gets the scorer as a function and does not know
the simulator. A trace is simulated as it is; rates become Poisson arrivals, anew for each seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.dispatch.order import OrderPolicy
from oserve.core import WorkloadType
from oserve.evaluate.attainment import attainment, met
from oserve.evaluate.simulator import (
    Ints,
    Levers,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
    largest_scale,
)
from oserve.evaluate.tiers import tier_slo
from oserve.perf.capacity import LatencyLimits
from oserve.plan.demand import Demand
from oserve.plan.deploy import place_deployment
from oserve.plan.planning import PlanRequest, PlanResult, deployment_plan, predict
from oserve.plan.search import DeploymentCandidate
from oserve.plan.verify import MIN_GAIN, Verified, verify
from oserve.traces import Slo

SEEDS = (0, 1)
# Requests of a synthetic trace; they tell an attainment of 95 % to about 1 %.
_REQUESTS = 2000
_TOLERANCE = 0.02
_EVALUATIONS = 12
# With tiers the linear model says less, so neighbours of the best are simulated, too.
_CLIMB = 8

SERVED_AS = Levers(order=OrderPolicy())
"""How ``oserve serve`` serves a plan: soft pools with overflow, ordered by prompt length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCapacity:
    """``capacity_scale``: the largest multiple of the demand at which the SLO still holds.

    ``attainment`` and ``goodput_rps`` are those at the demand itself. All are means over traces.
    """

    capacity_scale: float
    attainment: float
    goodput_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCheck:
    """The traffic of a verification: one trace, or one for each seed; ``words`` describe it."""

    traffics: tuple[SimulatedTraffic, ...]
    slo: Slo
    words: str
    margin: float = MIN_GAIN


def common_slo(limits: Mapping[str, LatencyLimits]) -> Slo:
    """The tightest of the limits: a simulation has one SLO for all types."""

    def tightest(values: Sequence[float | None]) -> float | None:
        given = [value for value in values if value is not None]
        return min(given) if given else None

    return Slo(
        ttft_s=tightest([item.ttft_s for item in limits.values()]),
        tpot_s=tightest([item.tpot_s for item in limits.values()]),
    )


def slo_of(request: PlanRequest) -> Slo:
    """The limits of a plan request: of each tier, or the tightest without tiers."""
    return tier_slo(request.tiers) if request.tiers else common_slo(request.limits)


def served_as(request: PlanRequest) -> Levers:
    """How ``oserve serve`` serves the plans of a request."""
    return replace(SERVED_AS, tiers=request.tiers)


def poisson_traffic(
    types: Sequence[WorkloadType], *, seed: int, tiers: Sequence[str] = ()
) -> SimulatedTraffic:
    """Poisson arrivals of types with fixed lengths, 2,000 of them; rates in requests/s."""
    draw = np.random.default_rng(seed)
    rates = np.array([kind.arrival_rate_rps for kind in types])
    gaps = draw.exponential(1.0 / rates.sum(), _REQUESTS)
    kinds = draw.choice(len(types), _REQUESTS, p=rates / rates.sum())

    def lengths(values: Sequence[float]) -> Ints:
        whole: Ints = np.maximum(1, np.rint(np.array(values))).astype(np.int64)
        return whole[kinds]

    tier = None
    if tiers:
        tier = np.array([tiers.index(kind.tier) for kind in types], dtype=np.int64)[kinds]
    return SimulatedTraffic(
        tier=tier,
        arrival_s=np.cumsum(gaps),
        prompt_tokens=lengths([kind.prompt_tokens for kind in types]),
        output_tokens=lengths([kind.output_tokens for kind in types]),
    )


def check_for(
    demand: Demand,
    slo: Slo,
    *,
    trace: SimulatedTraffic | None = None,
    rate_scale: float = 1.0,
    seeds: Sequence[int] = SEEDS,
    margin: float = MIN_GAIN,
) -> PlanCheck:
    """The demand's own trace, ``rate_scale`` times as fast, or Poisson traces of its types."""
    if trace is not None:
        return PlanCheck(
            traffics=(trace.faster(rate_scale),),
            slo=slo,
            words=f"the trace, {len(trace):,} requests",
            margin=margin,
        )
    traffics = tuple(poisson_traffic(demand.types, seed=seed, tiers=demand.tiers) for seed in seeds)
    return PlanCheck(
        traffics=traffics,
        slo=slo,
        words=f"{len(traffics)} Poisson traces of {_REQUESTS:,} requests",
        margin=margin,
    )


def simulate_serving(
    simulator: Simulator, serving: SimulatedServing, check: PlanCheck, *, start: float = 1.0
) -> SimulatedCapacity:
    """Capacity, attainment and goodput; the search for the capacity begins at ``start``."""
    scales, shares, goods = [], [], []
    for traffic in check.traffics:
        scales.append(
            largest_scale(
                lambda scale, played=traffic: simulator.holds(  # type: ignore[misc]
                    serving, played.faster(scale), check.slo
                ),
                start=start,
                tolerance=_TOLERANCE,
                evaluations=_EVALUATIONS,
            )
        )
        results = simulator.run(serving, traffic)
        shares.append(attainment(results, check.slo))
        goods.append(float(met(results, check.slo).sum()) / max(traffic.duration_s, 1e-9))
    return SimulatedCapacity(
        capacity_scale=_mean(scales), attainment=_mean(shares), goodput_rps=_mean(goods)
    )


def serving_of(
    found: PlanResult, deployment: DeploymentCandidate, levers: Levers | None = None
) -> SimulatedServing:
    """A deployment of a plan result as it would be served."""
    placed = place_deployment(found.problem, deployment)
    plan = deployment_plan(found.request, placed)
    return SimulatedServing(plan=plan, levers=levers or served_as(found.request))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedAnswer:
    """A plan result whose plan was chosen by simulation, on the traffic of ``check``."""

    answer: PlanResult
    verified: Verified
    check: PlanCheck


def verified_answer(
    found: PlanResult, check: PlanCheck, *, simulator: Simulator | None = None
) -> VerifiedAnswer:
    """Score the candidates and homogeneous deployments of a plan result again, and choose."""
    known = simulator or Simulator(found.request.source)

    def score(deployment: DeploymentCandidate) -> float:
        start = deployment.score.scale if math.isfinite(deployment.score.scale) else 1.0
        serving = serving_of(found, deployment)
        return simulate_serving(known, serving, check, start=max(start, 1e-3)).capacity_scale

    verified = verify(
        found.problem,
        found.planned,
        score,
        min_gain=check.margin,
        more=_CLIMB if found.request.tiers else 0,
    )
    best = verified.chosen.deployment
    placed = place_deployment(found.problem, best)
    base = verified.best_homogeneous.deployment
    changed = replace(
        found,
        planned=replace(found.planned, best=best),
        placed=placed,
        plan=deployment_plan(found.request, placed),
        predicted=predict(found.request, found.problem, best),
        baseline=base,
        baseline_predicted=predict(found.request, found.problem, base),
    )
    return VerifiedAnswer(answer=changed, verified=verified, check=check)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
