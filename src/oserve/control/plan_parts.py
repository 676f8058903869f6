"""Parts of plans: capacities at other speeds, shares, the ids of plans, and what fits."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from oserve.control.evaluation import Leg
from oserve.control.ladder import Shapes
from oserve.control.rollout import stages
from oserve.core import DeploymentPlan, Device, PlannedType, ReplicaSpec
from oserve.perf import ShapePerformance
from oserve.plan.packing import Packing
from oserve.plan.search import DeploymentCandidate
from oserve.workload import classify

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


def restart_legs(
    old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec], start_s: Callable[[ReplicaSpec], float]
) -> list[Leg]:
    """The stages of a roll-out as the legs of a switch."""
    return [
        Leg(
            leaving=stage.retired,
            started=stage.started,
            seconds=max((start_s(spec) for spec in stage.started), default=0.0),
        )
        for stage in stages(old, new)
    ]


def fitting(devices: Sequence[Device]) -> Callable[[Shapes], bool]:
    """Whether replicas fit on these devices."""

    def fits(shapes: Shapes) -> bool:
        if not devices:
            return not shapes
        packing = Packing(devices, [shape for shape, _ in shapes])
        return packing.fits([count for _, count in shapes])

    return fits


def fitting_rows(
    rows: Sequence[ShapePerformance], devices: Sequence[Device]
) -> tuple[ShapePerformance, ...]:
    """The rows of shapes of which at least one replica fits on these devices."""
    if not devices:
        return ()
    packing = Packing(devices, [row.shape for row in rows])
    return tuple(row for index, row in enumerate(rows) if packing.largest(index) > 0)


def extended(
    current: DeploymentPlan, earlier: DeploymentPlan, devices: Sequence[Device]
) -> DeploymentPlan | None:
    """The current plan with the replicas of an earlier one that fit beside it, if any does.

    They get other ids where theirs are taken. Shares are those of the current plan.
    """
    usable = {device.id for device in devices}
    taken = {device for spec in current.replicas for device in spec.devices}
    names = {spec.id for spec in current.replicas}
    added = []
    for spec in earlier.replicas:
        own = set(spec.devices)
        if not own or not own <= usable or own & taken:
            continue
        name, number = spec.id, 0
        while name in names:
            name, number = f"{spec.id}-{number}", number + 1
        added.append(replace(spec, id=name))
        taken |= own
        names.add(name)
    if not added:
        return None
    replicas = (*current.replicas, *added)
    return replace(current, id=f"extended-{plan_stamp(replicas)}", replicas=replicas)


def typed_plan(
    plan: DeploymentPlan, names: Sequence[str], centres: Sequence[tuple[float, float]]
) -> DeploymentPlan:
    """The plan with types of these names and centres; each gets the shares of its class."""
    same = [kind.name for kind in plan.planned_types] == list(names)
    present = [(kind.prompt_tokens, kind.output_tokens) for kind in plan.planned_types]
    if same and np.allclose(present, centres, rtol=1e-3):
        return plan
    return replace(
        plan,
        planned_types=tuple(
            PlannedType(
                name=name,
                prompt_tokens=prompt,
                output_tokens=output,
                shares=plan.routing_shares.get(
                    classify(round(prompt), plan.length_classes).name, {}
                ),
            )
            for name, (prompt, output) in zip(names, centres, strict=True)
        ),
    )
