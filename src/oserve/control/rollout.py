"""From one deployment to another a few replicas at a time: the plan to hold the cluster at now.

Level-triggered, like reconcile: what is kept follows from the target and what is seen. A replica
that the target does not have keeps serving until its devices (or its name) are needed for one that
it has, and what replaces a group must be ready before the next group goes. So no device is wished
for twice, and never do all replicas leave at once unless one new replica needs all their devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oserve.core import DeploymentPlan, Observation, ReplicaPhase, ReplicaSpec

# The part of the replicas that may be changing at a time (at least one group).
_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Replicas that leave together, and those that start when they are gone."""

    retired: tuple[ReplicaSpec, ...]
    started: tuple[ReplicaSpec, ...]


def stages(current: Sequence[ReplicaSpec], target: Sequence[ReplicaSpec]) -> tuple[Stage, ...]:
    """All stages from one set of replicas to another, if every start succeeds."""
    old = [spec for spec in current if spec not in target]
    missing = [spec for spec in target if spec not in current]
    found = []
    count = len(current)
    while old or missing:
        stage = next_stage(old, missing, count)
        old = [spec for spec in old if spec not in stage.retired]
        missing = [spec for spec in missing if spec not in stage.started]
        count += len(stage.started) - len(stage.retired)
        found.append(stage)
    return tuple(found)


def next_stage(old: Sequence[ReplicaSpec], missing: Sequence[ReplicaSpec], count: int) -> Stage:
    """What goes and comes next: ``old`` must go in the end, ``missing`` must come; of ``count``."""
    free = tuple(spec for spec in missing if not _blockers(spec, old))
    if free or not missing:
        return Stage(retired=() if missing else tuple(old), started=free)
    order = sorted(missing, key=lambda spec: len(_blockers(spec, old)))
    budget = max(1, count // _AT_ONCE)
    retired: list[ReplicaSpec] = []
    for spec in order:
        more = [item for item in _blockers(spec, old) if item not in retired]
        if retired and len(retired) + len(more) > budget:
            break
        retired += more
    left = [spec for spec in old if spec not in retired]
    started = tuple(spec for spec in missing if not _blockers(spec, left))
    return Stage(retired=tuple(retired), started=started)


def staged(
    target: DeploymentPlan,
    observation: Observation,
    lost: frozenset[str] = frozenset(),
    held: frozenset[str] = frozenset(),
) -> DeploymentPlan:
    """The plan to reconcile to now. ``lost`` names replicas of the target that were given up.

    ``held`` ones are another's business.

    Shapes of which one was given up are not rolled out further: what serves now is kept.
    """
    alive = [
        state
        for state in observation.replicas
        if state.phase not in {ReplicaPhase.GONE, ReplicaPhase.STANDBY}
        and state.spec.id not in held
    ]
    old = [
        s for s in alive if s.spec not in target.replicas and s.phase is not ReplicaPhase.LOADING
    ]
    if not old:
        return target
    bad = {spec.shape for spec in target.replicas if spec.id in lost}
    there = [state.spec for state in alive if state.phase is not ReplicaPhase.DRAINING]
    missing = [spec for spec in target.replicas if spec not in there and spec.shape not in bad]
    specs = [state.spec for state in old]
    waiting = any(
        state.phase is ReplicaPhase.LOADING and state.spec in target.replicas for state in alive
    ) or any(not _blockers(spec, specs) for spec in missing)
    kept = specs
    if not waiting and (missing or not bad):
        retired = next_stage(specs, missing, len(alive)).retired
        kept = [spec for spec in specs if spec not in retired]
    # Whoever drains already has left.
    draining = {s.spec.id for s in old if s.phase is ReplicaPhase.DRAINING}
    kept = [spec for spec in kept if spec.id not in draining]
    wished = tuple(spec for spec in target.replicas if not _blockers(spec, kept))
    return replace(target, replicas=(*wished, *kept))


def settled(target: DeploymentPlan, observation: Observation, lost: frozenset[str]) -> bool:
    """Whether the cluster is at the target, as far as it can get there."""
    alive = {s.spec.id: s for s in observation.replicas if s.phase is not ReplicaPhase.GONE}
    for spec in target.replicas:
        state = alive.pop(spec.id, None)
        ready = state is not None and state.spec == spec and state.phase is ReplicaPhase.READY
        if not ready and spec.id not in lost:
            return False
    return not alive or bool(lost)


def _blockers(spec: ReplicaSpec, others: Sequence[ReplicaSpec]) -> list[ReplicaSpec]:
    """Those that have a device, or the name, of a replica that is to start."""
    devices = set(spec.devices)
    return [
        other for other in others if other.id == spec.id or not devices.isdisjoint(other.devices)
    ]
