"""The demand of each service tier: length clusters by tier, merged where they are few."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oserve.core import OServeError, Tier, WorkloadType
from oserve.perf.capacity import LatencyLimits
from oserve.plan.demand import SAMPLES, Demand, demand_from_trace
from oserve.traces import TraceRequest
from oserve.workload.model import log_lengths, nearest

Indices = NDArray[np.intp]

# A cluster with a smaller share of its tier's requests is merged with the nearest of the tier.
_FEW = 0.1


def tier_indices(
    requests: Sequence[TraceRequest], tiers: Sequence[Tier], default: str, *, source: str
) -> NDArray[np.int64]:
    """The tier of each request, as an index; those without one have the default.

    Raises OServeError for a tier that is not there.
    """
    places = {tier.name: place for place, tier in enumerate(tiers)}
    found = [places.get(item.tier or default, -1) for item in requests]
    if -1 in found:
        at = found.index(-1)
        raise OServeError(
            f"request {at + 1} has the tier {requests[at].tier or default!r}",
            place=source,
            remedy=f"the tiers are {', '.join(places)}",
        )
    return np.array(found, dtype=np.int64)


def demand_by_tier(
    requests: Sequence[TraceRequest],
    tiers: Sequence[Tier],
    default: str,
    *,
    source: str,
    max_model_len: int,
    k: int | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
) -> Demand:
    """The demand of a trace by tier; without tiers that of ``demand_from_trace``.

    Lengths are clustered over all requests, so that tiers share the meaning of a cluster. Each tier
    then has the clusters that at least a tenth of its requests belong to; the others count with the
    nearest of these. A tier without requests has one type, with the mean lengths of all.
    """
    whole = demand_from_trace(
        requests, source=source, max_model_len=max_model_len, k=k, rate_scale=rate_scale, seed=seed
    )
    if not tiers:
        return whole
    tier = tier_indices(requests, tiers, default, source=source)
    output = np.minimum([item.output_tokens for item in requests], max(1, max_model_len - 1))
    prompt = np.clip([item.prompt_tokens for item in requests], 1, max_model_len - output)
    lengths = np.stack([prompt, output], axis=1)
    return _split(whole, tiers, tier, lengths, seed)


def _split(
    whole: Demand,
    tiers: Sequence[Tier],
    tier: NDArray[np.int64],
    lengths: "NDArray[np.int64]",
    seed: int,
) -> Demand:
    centres = np.log1p(np.array([whole.centres[kind.name] for kind in whole.types]))
    points = log_lengths(lengths[:, 0], lengths[:, 1])
    cluster = nearest(points, centres)
    per_request = whole.rate_rps / len(lengths)
    draw = np.random.default_rng(seed)
    types: list[WorkloadType] = []
    parts: list[tuple[WorkloadType, Indices]] = []
    for number, item in enumerate(tiers):
        mine = np.flatnonzero(tier == number)
        own = _merged(cluster[mine], centres)
        for place in np.unique(own):
            members = mine[own == place]
            kind = _type_of(item.name, whole.types[place].name, lengths[members], per_request)
            parts.append((kind, members))
        if not len(mine):
            parts.append((_empty(item.name, lengths), mine))
    types = [kind for kind, _ in parts]
    return replace(
        whole,
        types=tuple(types),
        tiers=tuple(item.name for item in tiers),
        longest_tokens={kind.name: _longest(lengths[rows], lengths) for kind, rows in parts},
        centres={kind.name: _centre(points[rows], kind) for kind, rows in parts},
        class_mix=_class_mix(whole, parts, cluster),
        samples={kind.name: _sample(lengths[rows], draw) for kind, rows in parts if len(rows)},
    )


def _merged(cluster: Indices, centres: NDArray[np.float64]) -> Indices:
    """The clusters of a tier's requests, with few requests moved to the nearest other cluster."""
    if not len(cluster):
        return cluster
    counts = np.bincount(cluster, minlength=len(centres))
    kept = np.flatnonzero(counts >= _FEW * len(cluster))
    kept = kept if len(kept) else np.array([counts.argmax()])
    nearest_kept = kept[nearest(centres, centres[kept])]
    found: Indices = nearest_kept[cluster]
    return found


def _type_of(
    tier: str, name: str, lengths: "NDArray[np.int64]", per_request_rps: float
) -> WorkloadType:
    return WorkloadType(
        name=f"{tier}: {name}",
        prompt_tokens=float(lengths[:, 0].mean()),
        output_tokens=float(lengths[:, 1].mean()),
        arrival_rate_rps=per_request_rps * len(lengths),
        tier=tier,
    )


def _empty(tier: str, lengths: "NDArray[np.int64]") -> WorkloadType:
    return WorkloadType(
        name=f"{tier}: any length",
        prompt_tokens=float(lengths[:, 0].mean()),
        output_tokens=float(lengths[:, 1].mean()),
        arrival_rate_rps=0.0,
        tier=tier,
    )


def _longest(own: "NDArray[np.int64]", everything: "NDArray[np.int64]") -> float:
    rows = own if len(own) else everything
    return float(np.quantile(rows.sum(axis=1), 0.99))


def _centre(points: NDArray[np.float64], kind: WorkloadType) -> tuple[float, float]:
    if not len(points):
        return kind.prompt_tokens, kind.output_tokens
    prompt, output = np.expm1(points.mean(axis=0)).tolist()
    return float(prompt), float(output)


def _class_mix(
    whole: Demand, parts: Sequence[tuple[WorkloadType, Indices]], cluster: Indices
) -> dict[str, dict[str, float]]:
    """The mix of each length class: each cluster's part goes to tiers as its requests do."""
    counts = np.bincount(cluster, minlength=len(whole.types))
    mixes: dict[str, dict[str, float]] = {}
    for name, mix in whole.class_mix.items():
        own = {
            kind.name: sum(
                mix[whole.types[place].name] * number / counts[place]
                for place, number in enumerate(np.bincount(cluster[rows], minlength=len(counts)))
                if number
            )
            for kind, rows in parts
        }
        total = sum(own.values())
        mixes[name] = {key: float(value / total) for key, value in own.items()}
    return mixes


def _sample(lengths: "NDArray[np.int64]", draw: np.random.Generator) -> tuple[tuple[int, int], ...]:
    chosen = lengths
    if len(lengths) > SAMPLES:
        chosen = lengths[np.sort(draw.choice(len(lengths), SAMPLES, replace=False))]
    return tuple((int(prompt), int(output)) for prompt, output in chosen)


def with_tiers(demand: Demand, tiers: Sequence[Tier], default: str) -> Demand:
    """The demand of given rates: each type has its tier, or the default.

    Raises OServeError for a type of a tier that is not there.
    """
    names = tuple(tier.name for tier in tiers)
    if not names:
        plain = tuple(replace(kind, tier="") for kind in demand.types)
        return replace(demand, types=plain)
    types = tuple(replace(kind, tier=kind.tier or default) for kind in demand.types)
    unknown = next((kind for kind in types if kind.tier not in names), None)
    if unknown is not None:
        raise OServeError(
            f"the workload type {unknown.name!r} has the tier {unknown.tier!r}",
            place=demand.source,
            remedy=f"the tiers are {', '.join(names)}",
        )
    return replace(demand, types=types, tiers=names)


def tier_limits(
    demand: Demand, tiers: Sequence[Tier], common: LatencyLimits
) -> dict[str, LatencyLimits]:
    """The limits of each type: those of its tier, else the common ones."""
    own: Mapping[str, LatencyLimits] = {tier.name: limits_of(tier) for tier in tiers}
    return {kind.name: own.get(kind.tier, common) for kind in demand.types}


def limits_of(tier: Tier) -> LatencyLimits:
    """The limits of a tier as the planner takes them."""
    return LatencyLimits(
        ttft_s=tier.ttft_s, tpot_s=tier.tpot_s, e2e_s=tier.e2e_s, precisions=tier.precisions
    )
