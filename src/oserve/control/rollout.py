"""Rolling update from one deployment to another: the plan to reconcile to at each stage.

Level-triggered, like reconcile: the stage follows from the target and the observation. A replica
outside the target serves until a replica of the target needs its devices or its name, and the
replacements of one group must be ready before the next group retires. So no device is planned for
twice, and all replicas retire at once only if one new replica needs all their devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oserve.core import DeploymentPlan, Observation, ReplicaPhase, ReplicaSpec, ReplicaState

# At most this fraction of the replicas changes at a time (1 / 4), but at least one group.
_AT_ONCE = 4
_NOT_ROLLED = {ReplicaPhase.GONE, ReplicaPhase.STANDBY, ReplicaPhase.AWAY}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStage:
    """Replicas that retire together, and those that start on the devices they free."""

    retired: tuple[ReplicaSpec, ...]
    started: tuple[ReplicaSpec, ...]


def stages(
    current: Sequence[ReplicaSpec], target: Sequence[ReplicaSpec]
) -> tuple[RolloutStage, ...]:
    """All stages from one set of replicas to another, if every replica starts."""
    before, after = set(current), set(target)
    old = [spec for spec in current if spec not in after]
    missing = [spec for spec in target if spec not in before]
    found = []
    count = len(current)
    while old or missing:
        stage = next_stage(old, missing, count)
        gone, come = set(stage.retired), set(stage.started)
        old = [spec for spec in old if spec not in gone]
        missing = [spec for spec in missing if spec not in come]
        count += len(stage.started) - len(stage.retired)
        found.append(stage)
    return tuple(found)


def next_stage(
    old: Sequence[ReplicaSpec], missing: Sequence[ReplicaSpec], count: int
) -> RolloutStage:
    """The next stage of ``count`` replicas; in the end ``old`` retire and ``missing`` start."""
    holders = _Holders(old)
    blockers = [(spec, holders.blockers(spec)) for spec in missing]
    free = tuple(spec for spec, found in blockers if not found)
    if free or not missing:
        return RolloutStage(retired=() if missing else tuple(old), started=free)
    budget = max(1, count // _AT_ONCE)
    retired: list[ReplicaSpec] = []
    for _, found in sorted(blockers, key=lambda item: len(item[1])):
        more = [item for item in found if item not in retired]
        if retired and len(retired) + len(more) > budget:
            break
        retired += more
    left = _Holders([spec for spec in old if spec not in retired])
    started = tuple(spec for spec in missing if not left.blockers(spec))
    return RolloutStage(retired=tuple(retired), started=started)


def staged(
    target: DeploymentPlan,
    observation: Observation,
    lost: frozenset[str] = frozenset(),
    held: frozenset[str] = frozenset(),
) -> DeploymentPlan:
    """The plan to reconcile to now, on the way to ``target``.

    ``lost``: replicas of the target that were given up; other replicas of their shapes are not
    rolled out, and what serves now stays. ``held``: replicas that a switch controls. Replicas of
    the target on nodes that are not in use do not start, and nothing leaves for them.
    """
    alive = [
        state
        for state in observation.replicas
        if state.phase not in _NOT_ROLLED and state.spec.id not in held
    ]
    retiring = _retiring(target, alive)
    if not retiring:
        return target
    kept = _remaining(retiring, _next_retired(target, alive, retiring, lost, observation.startable))
    holders = _Holders(kept)
    desired = tuple(spec for spec in target.replicas if not holders.blockers(spec))
    return replace(target, replicas=(*desired, *kept))


def _retiring(target: DeploymentPlan, alive: Sequence[ReplicaState]) -> list[ReplicaState]:
    """Replicas that serve or drain and are not in the target."""
    wanted = set(target.replicas)
    return [
        state
        for state in alive
        if state.spec not in wanted and state.phase is not ReplicaPhase.LOADING
    ]


def _next_retired(
    target: DeploymentPlan,
    alive: Sequence[ReplicaState],
    retiring: Sequence[ReplicaState],
    lost: frozenset[str],
    startable: frozenset[str],
) -> tuple[ReplicaSpec, ...]:
    """Replicas to retire now: none while a replica of the target starts or can start."""
    failed_shapes = {spec.shape for spec in target.replicas if spec.id in lost}
    present = {state.spec for state in alive if state.phase is not ReplicaPhase.DRAINING}
    absent = [
        spec for spec in target.replicas if spec not in present and spec.shape not in failed_shapes
    ]
    missing = [spec for spec in absent if startable.issuperset(spec.devices)]
    specs = [state.spec for state in retiring]
    holders = _Holders(specs)
    starting = any(
        state.phase is ReplicaPhase.LOADING and state.spec in target.replicas for state in alive
    )
    if starting or any(not holders.blockers(spec) for spec in missing):
        return ()
    if failed_shapes and not missing:
        return ()
    if absent and not missing:
        # The rest of the target waits for its nodes: only what is on such nodes itself leaves.
        return tuple(spec for spec in specs if not startable.issuperset(spec.devices))
    return next_stage(specs, missing, len(alive)).retired


def _remaining(
    retiring: Sequence[ReplicaState], retired: tuple[ReplicaSpec, ...]
) -> list[ReplicaSpec]:
    """Replicas outside the target that continue to serve; draining ones do not."""
    draining = {state.spec.id for state in retiring if state.phase is ReplicaPhase.DRAINING}
    specs = [state.spec for state in retiring if state.spec not in retired]
    return [spec for spec in specs if spec.id not in draining]


def settled(target: DeploymentPlan, observation: Observation, lost: frozenset[str]) -> bool:
    """Whether the cluster is at the target, apart from replicas that were given up (``lost``)."""
    alive = {s.spec.id: s for s in observation.replicas if s.phase is not ReplicaPhase.GONE}
    for spec in target.replicas:
        state = alive.pop(spec.id, None)
        ready = state is not None and state.spec == spec and state.phase is ReplicaPhase.READY
        if not ready and spec.id not in lost:
            return False
    return not alive or bool(lost)


class _Holders:
    """Which of some replicas hold a device or an id, so that another one must wait for them."""

    def __init__(self, replicas: Sequence[ReplicaSpec]) -> None:
        self._order = {id(spec): place for place, spec in enumerate(replicas)}
        self._by_id = {spec.id: spec for spec in replicas}
        self._by_device: dict[str, list[ReplicaSpec]] = {}
        for spec in replicas:
            for device in spec.devices:
                self._by_device.setdefault(device, []).append(spec)

    def blockers(self, spec: ReplicaSpec) -> list[ReplicaSpec]:
        """Those on a device of ``spec``, or with its id: they must end before it can start."""
        found = {id(own): own for device in spec.devices for own in self._by_device.get(device, ())}
        same = self._by_id.get(spec.id)
        if same is not None:
            found[id(same)] = same
        return [found[key] for key in sorted(found, key=self._order.__getitem__)]
