"""Tiers in simulations: which replicas a request may use, when it is late, and what was kept.

The live router knows a request's tier and the probabilities of its types. A simulated request is
routed by its tier and the length class of its prompt: the shares of the tier's types of that class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.tiers import due_of, shift_s
from oserve.core import DeploymentPlan, LengthClass, PlannedType, Promise, Tier
from oserve.traces import Slo
from oserve.workload import classify

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BARRED = -1.0
"""A share that bars a replica, which a share of 0 leaves to overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRouting:
    """Routing by tier and length class; the class of a request is tier * length classes + class.

    ``shares[class][replica]``: ``BARRED`` where no request of the class may go. ``outputs``: mean
    output tokens by class.
    """

    shares: dict[int, dict[str, float]]
    outputs: tuple[int, ...]


def tier_routing(plan: DeploymentPlan, tiers: Sequence[Tier]) -> TierRouting:
    """The routing of a plan whose types have tiers, as the gateway's router does it."""
    shares: dict[int, dict[str, float]] = {}
    outputs: list[int] = []
    classes = plan.length_classes
    for number, tier in enumerate(tiers):
        own = [kind for kind in plan.planned_types if kind.tier == tier.name]
        own = own or [kind for kind in plan.planned_types if not kind.tier]
        allowed = {spec.id for spec in plan.replicas if tier.allows(spec.shape.precision)}
        pool = {name for kind in own for name, share in kind.shares.items() if share > 0} & allowed
        usable = pool or allowed
        for place, item in enumerate(classes):
            here = [kind for kind in own if _class_of(kind, classes) is item] or own
            mixed = {
                spec.id: sum(kind.shares.get(spec.id, 0.0) for kind in here) if here else 0.0
                for spec in plan.replicas
            }
            shares[number * len(classes) + place] = {
                name: share if name in usable else BARRED for name, share in mixed.items()
            }
            means = [kind.output_tokens for kind in here] or [item.output_tokens]
            outputs.append(max(1, round(sum(means) / len(means))))
    return TierRouting(shares=shares, outputs=tuple(outputs))


def _class_of(kind: PlannedType, classes: tuple[LengthClass, ...]) -> LengthClass:
    return classify(round(kind.prompt_tokens), classes)


@lru_cache(maxsize=64)
def _promise(tier: Tier) -> Promise:
    return Promise.of(tier)


def tier_shifts_s(order: OrderPolicy, tiers: Sequence[Tier], tier: Ints, expected: Ints) -> Floats:
    """What the tier of each request adds to its rank."""
    shifts = np.zeros(len(tier))
    for number, item in enumerate(tiers):
        mine = np.flatnonzero(tier == number)
        for output in np.unique(expected[mine]):
            same = mine[expected[mine] == output]
            shifts[same] = shift_s(order, _promise(item), int(output))
    return shifts


def late_after_s(
    overload: OverloadPolicy, tiers: Sequence[Tier], tier: Ints, expected: Ints
) -> Floats:
    """Seconds from arrival within which dispatch and prefill must fit; infinite: no limit."""
    limits = np.full(len(tier), np.inf)
    for number, item in enumerate(tiers):
        mine = np.flatnonzero(tier == number)
        for output in np.unique(expected[mine]):
            due_s = due_of(_promise(item), int(output))
            if due_s is not None:
                limits[mine[expected[mine] == output]] = overload.late_of_ttft * due_s
    return limits


def tier_slo(tiers: Sequence[Tier]) -> Slo:
    """The limits of all tiers as one SLO."""
    return Slo(tiers=tuple(Slo(ttft_s=t.ttft_s, tpot_s=t.tpot_s, e2e_s=t.e2e_s) for t in tiers))
