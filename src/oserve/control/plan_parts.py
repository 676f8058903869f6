"""Parts of plans: capacities at other speeds, shares, and the ids of plans."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from oserve.core import ReplicaSpec
from oserve.perf import ShapePerformance
from oserve.plan.search import DeploymentCandidate

# Smaller shares are dropped; overflow routing covers them.
_LEAST_SHARE = 0.005


def scaled_row(
    row: ShapePerformance, before: ShapePerformance, after: ShapePerformance
) -> ShapePerformance:
    """Scale a row by the change of its model from ``before`` to ``after``."""
    capacity = tuple(
        own * new / old if old > 0 else new
        for own, old, new in zip(
            row.capacity_rps, before.capacity_rps, after.capacity_rps, strict=True
        )
    )
    return replace(after, capacity_rps=capacity)


def plan_gain(best: DeploymentCandidate, plain: DeploymentCandidate) -> float:
    """The gain of one deployment: in scale where it serves all demand, else in served rate."""
    if best.score.scale >= 1 and plain.score.scale > 0:
        return best.score.scale / plain.score.scale - 1
    return best.score.served_rps / max(plain.score.served_rps, 1e-12) - 1


def even_shares(names: Sequence[str]) -> dict[str, float]:
    """The same share for each replica."""
    return {name: 1.0 / len(names) for name in names}


def whole_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Scale shares to sum to 1, and drop the smallest; empty if there are none."""
    total = sum(shares.values())
    kept = {name: value for name, value in shares.items() if value > _LEAST_SHARE * total}
    total = sum(kept.values())
    return {name: value / total for name, value in kept.items()}


def plan_stamp(replicas: Sequence[ReplicaSpec]) -> str:
    """A short hash of a deployment."""
    text = repr(sorted((spec.id, repr(spec.shape), spec.devices) for spec in replicas))
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
