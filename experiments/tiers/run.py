"""Capacity while every service tier holds its limits, at best over deployments of four kinds.

A request is tight (20 ms a token, 16 bits), normal (50 ms a token, 16 or 8 bits) or bulk (whole
within 60 s, any precision), by chance and whatever its lengths. All deployments are routed and
ordered by tier, and each kind takes the best of its candidates in hindsight, by simulation of the
same requests.

python experiments/tiers/run.py --trace azure2023-mix-dev.csv.gz
"""

import json
import math
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path

import numpy as np

from oserve.config import load_cluster
from oserve.control.dispatch.order import OrderPolicy
from oserve.core import DeploymentPlan, Device, LengthClass, PlannedType, Precision, Tier
from oserve.evaluate.simulator import (
    Levers,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
    largest_scale,
    traffic_from,
)
from oserve.evaluate.tiers import tier_slo
from oserve.evaluate.verification import common_slo, serving_of
from oserve.perf import ShapePerformance
from oserve.perf.capacity import LatencyLimits
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.perf.table import performance_table
from oserve.plan.place import place_replicas
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan
from oserve.plan.search import DeploymentCandidate
from oserve.plan.tiers import demand_by_tier, tier_indices, tier_limits
from oserve.plan.verify import climb
from oserve.traces import TraceRequest, read_trace, synthesise

TIGHT = Tier(name="tight", ttft_s=1.0, tpot_s=0.02, precisions=(Precision.BF16,))
NORMAL = Tier(name="normal", ttft_s=2.0, tpot_s=0.05, precisions=(Precision.BF16, Precision.FP8))
BULK = Tier(name="bulk", e2e_s=60.0)
MIXES = {2: ((TIGHT, 0.5), (BULK, 0.5)), 3: ((TIGHT, 0.3), (NORMAL, 0.3), (BULK, 0.4))}
_BITS = (Precision.BF16, Precision.FP8, Precision.INT4)
_TOLERANCE, _EVALUATIONS = 0.02, 9
_INFLIGHT = (None, 8.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One model, cluster and set of tiers, with its traffic."""

    tiers: tuple[Tier, ...]
    devices: tuple[Device, ...]
    request: PlanRequest
    traffic: SimulatedTraffic
    simulator: Simulator
    most: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best deployment of one kind: a multiple of the trace's rate, and its replicas."""

    scale: float
    words: str
    tried: int
    at: int | None = None


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help="request trace; a seeded synthetic mix without one")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--models", default="llama-2-70b,opt-66b")
    parser.add_argument("--clusters", default="2x8xH100,4x8xH100")
    parser.add_argument("--tiers", default="2,3")
    parser.add_argument("--candidates", type=int, default=8, help="simulated of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for model in asked.models.split(","):
        for cluster in asked.clusters.split(","):
            for number in (int(text) for text in asked.tiers.split(",")):
                case = _case(model, cluster, number, _requests(asked.trace, asked.requests), asked)
                row = {"model": model, "cluster": cluster, "tiers": number, **_row(case)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                if asked.out is not None:
                    asked.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _requests(trace: str | None, count: int) -> list[TraceRequest]:
    made = read_trace(trace) if trace else synthesise(rate_rps=8.0, duration_s=3600.0, seed=0)
    return list(islice(made, count))


def _case(
    model: str, cluster: str, number: int, requests: list[TraceRequest], asked: object
) -> Case:
    seed, most = int(asked.seed), int(asked.candidates)  # type: ignore[attr-defined]
    tiers = tuple(tier for tier, _ in MIXES[number])
    parts = [part for _, part in MIXES[number]]
    drawn = np.random.default_rng(seed).choice(len(tiers), len(requests), p=parts)
    tiered = [
        replace(item, tier=tiers[place].name) for item, place in zip(requests, drawn, strict=True)
    ]
    spec = load_cluster(cluster)
    source, context = find_source(
        SourceChoice(model=model, devices=spec.devices, network=spec.network)
    )
    demand = demand_by_tier(tiered, tiers, tiers[0].name, source="trace", max_model_len=context)
    choices = ShapeChoices(
        pipeline_parallel_sizes=(1, 2),
        precisions=_BITS,
        max_num_batched_tokens=(512, 2048),
        max_num_seqs=(16, 32, 64, 256),
    )
    places = tier_indices(tiered, tiers, tiers[0].name, source="trace")
    traffic = traffic_from(tiered, max_model_len=context, tier=places)
    longest = int((traffic.prompt_tokens + traffic.output_tokens).max())
    shapes = tuple(
        shape
        for shape in shapes_for(source, spec.devices, choices)
        if source.kv_tokens(shape) >= longest
    )
    return Case(
        tiers=tiers,
        devices=spec.devices,
        request=PlanRequest(
            model=model,
            devices=spec.devices,
            demand=demand,
            source=source,
            shapes=shapes,
            limits=tier_limits(demand, tiers, LatencyLimits()),
            tiers=tiers,
            time_limit_s=30.0,
            candidates=most,
        ),
        traffic=traffic,
        simulator=Simulator(source),
        most=most,
    )


def _row(case: Case) -> dict[str, object]:
    kinds: dict[str, Callable[[Case], Found]] = {
        "homogeneous": _homogeneous,
        "pools": _pools,
        "one SLO": _one_slo,
        "oserve": _oserve,
    }
    found = {name: kind(case) for name, kind in kinds.items()}
    ours = found["oserve"].scale
    return {
        "capacity_rps": {
            name: round(item.scale * case.traffic.rate_rps, 2) for name, item in found.items()
        },
        "over": {
            name: round(ours / item.scale, 3) if item.scale else None
            for name, item in found.items()
        },
        "deployments": {name: item.words for name, item in found.items()},
        "simulated": {name: item.tried for name, item in found.items()},
    }


# -- the four kinds ---------------------------------------------------------------------------
def _homogeneous(case: Case) -> Found:
    """One shape everywhere, in a precision that every tier allows, whatever else it has."""
    everything = [kind.name for kind in case.request.demand.types]
    ranked = _ranked(case, everything, len(case.devices))
    return _best(case, [_shared(case, [(item, everything)]) for item in ranked[: case.most]])


def _pools(case: Case) -> Found:
    """Two pools of one shape each, every split of tiers and devices."""
    names = [tier.name for tier in case.tiers]
    found: list[tuple[float, list[tuple[_Pool, list[str]]]]] = []
    whole = len(case.devices)
    for cut in range(1, len(names)):
        groups = [_types(case, names[:cut]), _types(case, names[cut:])]
        for size in range(2, whole, 2):
            first, second = (
                _ranked(case, group, n)[:2]
                for group, n in zip(groups, (size, whole - size), strict=True)
            )
            found += [
                (min(one.scale, other.scale), [(one, groups[0]), (other, groups[1])])
                for one, other in product(first, second)
            ]
    found.sort(key=lambda item: -item[0])
    return _best(case, [_shared(case, pools) for _, pools in found[: case.most]])


def _one_slo(case: Case) -> Found:
    """OServe with the tightest limits and the fewest precisions for all."""
    limits = common_slo(case.request.limits)
    common = LatencyLimits(ttft_s=limits.ttft_s, tpot_s=limits.tpot_s, precisions=(Precision.BF16,))
    request = replace(
        case.request,
        limits={kind.name: common for kind in case.request.demand.types},
        tiers=(),
    )
    return _best(case, _of_plan(case, compute_plan(request))[: case.most])


def _oserve(case: Case) -> Found:
    """OServe's plan for the tiers, its planner's alternatives, and neighbours of the best."""
    found = compute_plan(replace(case.request, candidates=case.most - 1 - case.most // 4))
    deployments = [found.planned.best, *found.planned.candidates]
    plans = [serving_of(found, item).plan for item in deployments]
    first = _best(case, plans)
    if not first.tried or first.at is None:
        return first
    best = first.scale

    def score(item: DeploymentCandidate) -> float:
        nonlocal best
        scale = _capacity(case, serving_of(found, item).plan, None, max(best, 0.05))
        best = max(best, scale)
        return scale

    known = {item.counts for item in deployments}
    start = deployments[first.at]
    more = climb(found.problem, start, best, score, known=known, most=case.most - len(plans))
    further = max(more, key=lambda item: item.scale, default=None)
    tried = first.tried + len(more)
    if further is None or further.scale <= first.scale:
        return replace(first, tried=tried)
    words = _words(serving_of(found, further.deployment).plan, None)
    return Found(scale=further.scale, words=words, tried=tried)


# -- candidates -------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Replicas of one shape, and the multiple of the demand that the linear model gives them."""

    row: ShapePerformance
    count: int
    scale: float


def _types(case: Case, tiers: Sequence[str]) -> list[str]:
    return [kind.name for kind in case.request.demand.types if kind.tier in tiers]


def _ranked(case: Case, types: Sequence[str], devices: int) -> list[_Pool]:
    """One shape on so many devices for these types, best first in the linear model.

    All types count within the tightest limit of TPOT among them, since they share batches.
    """
    own = [kind for kind in case.request.demand.types if kind.name in types]
    found = []
    for row in _table(case, tuple(types)):
        count = devices // row.shape.device_count
        busy = math.fsum(
            kind.arrival_rate_rps / capacity if capacity > 0 else math.inf
            for kind, capacity in zip(own, row.capacity_rps, strict=True)
        )
        if count and math.isfinite(busy):
            found.append(_Pool(row=row, count=count, scale=count / busy))
    return sorted(found, key=lambda item: -item.scale)


@cache
def _table(case: Case, types: tuple[str, ...]) -> tuple[ShapePerformance, ...]:
    request = case.request
    tightest = common_slo({name: request.limits[name] for name in types}).tpot_s
    return performance_table(
        request.source,
        request.shapes,
        [kind for kind in request.demand.types if kind.name in types],
        limits={name: replace(request.limits[name], tpot_s=tightest) for name in types},
        longest_tokens=request.demand.longest_tokens,
    )


def _shared(case: Case, pools: Sequence[tuple[_Pool, list[str]]]) -> DeploymentPlan:
    """Pools on the devices; the types of each share all its replicas evenly."""
    # In the order of size, so that no replica spans more nodes than it must.
    ordered = sorted(pools, key=lambda item: -item[0].row.shape.device_count)
    placed = place_replicas([(pool.row.shape, pool.count) for pool, _ in ordered], case.devices)
    shares: dict[str, dict[str, float]] = {}
    left = list(placed.replicas)
    for pool, types in ordered:
        own = [spec for spec in left if spec.shape == pool.row.shape][: pool.count]
        left = [spec for spec in left if spec not in own]
        for name in types:
            shares[name] = {spec.id: 1.0 / len(own) for spec in own}
    demand = case.request.demand
    return DeploymentPlan(
        id="pools",
        replicas=placed.replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1.0 / len(placed.replicas) for spec in placed.replicas}},
        planned_types=tuple(
            PlannedType(
                name=kind.name,
                prompt_tokens=kind.prompt_tokens,
                output_tokens=kind.output_tokens,
                shares=shares[kind.name],
                tier=kind.tier,
            )
            for kind in demand.types
        ),
    )


def _of_plan(case: Case, found: PlanResult) -> list[DeploymentPlan]:
    deployments: list[DeploymentCandidate] = [found.planned.best, *found.planned.candidates]
    return [serving_of(found, item).plan for item in deployments]


# -- scores -----------------------------------------------------------------------------------
def _best(case: Case, plans: Sequence[DeploymentPlan]) -> Found:
    best, words, tried, at = 0.0, "none", 0, None
    for place, plan in enumerate(plans):
        for inflight in _INFLIGHT if plan is plans[0] else _INFLIGHT[:1]:
            tried += 1
            scale = _capacity(case, plan, inflight, max(best, 0.05))
            if scale > best:
                best, words, at = scale, _words(plan, inflight), place
    return Found(scale=best, words=words, tried=tried, at=at)


def _capacity(case: Case, plan: DeploymentPlan, inflight: float | None, start: float) -> float:
    serving = SimulatedServing(
        plan=plan,
        levers=Levers(order=OrderPolicy(), tiers=case.tiers, inflight_per_device=inflight),
    )
    slo = tier_slo(case.tiers)

    def holds(scale: float) -> bool:
        return case.simulator.holds(serving, case.traffic.faster(scale), slo)

    # One that does not hold what another does cannot win.
    if start > 0.05 and not holds(start * (1 + _TOLERANCE)):
        return 0.0
    return largest_scale(
        holds, start=max(start, 0.5), tolerance=_TOLERANCE, evaluations=_EVALUATIONS
    )


def _words(plan: DeploymentPlan, inflight: float | None) -> str:
    counts: dict[str, int] = {}
    for spec in plan.replicas:
        name = f"{spec.shape.name}/{spec.shape.max_num_seqs}"
        counts[name] = counts.get(name, 0) + 1
    told = " + ".join(f"{count} x {name}" for name, count in counts.items())
    return told if inflight is None else f"{told}, {inflight:g} in flight a device"


if __name__ == "__main__":
    main()
