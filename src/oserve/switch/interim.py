"""Plans on the way of a switch: names that do not clash, and shares of what serves meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from oserve.core import DeploymentPlan, PlannedType, ReplicaSpec


def renamed(target: DeploymentPlan, serving: Sequence[ReplicaSpec]) -> DeploymentPlan:
    """Return the plan with the names of replicas that already serve, and no other name twice.

    A replica that stays keeps its name, whatever the plan calls it. A new replica gets another
    name where the planned one is in use.
    """
    names = _names(target, serving)
    return replace(
        target,
        replicas=tuple(replace(spec, id=names[spec.id]) for spec in target.replicas),
        routing_shares={
            kind: _named(shares, names) for kind, shares in target.routing_shares.items()
        },
        planned_types=tuple(
            replace(kind, shares=_named(kind.shares, names)) for kind in target.planned_types
        ),
    )


def between(
    target: DeploymentPlan, current: DeploymentPlan, serving: Sequence[ReplicaSpec]
) -> DeploymentPlan:
    """Return the target plan with the replicas that serve after a wave.

    Shares go to those of the target's replicas that serve, else to those of the current plan, else
    to all in equal parts.
    """
    if set(serving) == set(target.replicas):
        return target
    ids = [spec.id for spec in serving]
    before = {kind.name: kind.shares for kind in current.planned_types}

    def shared(wished: Mapping[str, float], old: Mapping[str, float]) -> dict[str, float]:
        for shares in (wished, old):
            kept = {name: share for name, share in shares.items() if name in ids and share > 0}
            if kept:
                total = sum(kept.values())
                return {name: share / total for name, share in kept.items()}
        return dict.fromkeys(ids, 1.0 / len(ids))

    def typed(kind: PlannedType) -> PlannedType:
        return replace(kind, shares=shared(kind.shares, before.get(kind.name, {})))

    return replace(
        target,
        replicas=tuple(serving),
        routing_shares={
            kind: shared(shares, current.routing_shares.get(kind, {}))
            for kind, shares in target.routing_shares.items()
        },
        planned_types=tuple(map(typed, target.planned_types)),
    )


def _names(target: DeploymentPlan, serving: Sequence[ReplicaSpec]) -> dict[str, str]:
    """Return the name of each of the target's replicas, by the name in its plan."""
    taken = {spec.id for spec in serving}
    names: dict[str, str] = {}
    for spec in target.replicas:
        same = next((one for one in serving if replace(one, id=spec.id) == spec), None)
        if same is not None:
            names[spec.id] = same.id
    used = {*taken, *(spec.id for spec in target.replicas)}
    for spec in target.replicas:
        if spec.id in names:
            continue
        name, number = spec.id, 2
        while name in taken or (name != spec.id and name in used):
            name, number = f"{spec.id}-{number}", number + 1
        names[spec.id] = name
        taken.add(name)
    return names


def _named(shares: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    return {names[name]: share for name, share in shares.items()}
