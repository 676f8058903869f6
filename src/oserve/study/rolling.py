"""From one plan to another a few devices at a time: what should run at this moment.

Pure and level-triggered like reconcile: the step follows from the target and from what is
observed. The first change may always begin; further ones only while the devices that are out of
service (loading, draining, or meant to) stay within the limit.
"""

from dataclasses import replace

from oserve.core import DeploymentPlan, Observation, ReplicaPhase, ReplicaSpec


def step_plan(
    target: DeploymentPlan, observation: Observation, moving_devices: int | None
) -> DeploymentPlan:
    """The plan to reconcile now; ``target`` itself once nothing old needs to be kept."""
    alive = {
        state.spec: state.phase
        for state in observation.replicas
        if state.phase is not ReplicaPhase.GONE
    }
    old = {spec: phase for spec, phase in alive.items() if spec not in set(target.replicas)}
    pending = [spec for spec in target.replicas if spec not in alive]
    if moving_devices is None or not pending:
        return target
    moving = sum(
        len(spec.devices) for spec, phase in alive.items() if phase is not ReplicaPhase.READY
    )
    retired: set[ReplicaSpec] = {s for s, phase in old.items() if phase is not ReplicaPhase.READY}
    for spec in pending:
        wanted = set(spec.devices)
        holders = [other for other in old if wanted & set(other.devices)]
        leaving = [other for other in holders if other not in retired]
        if not leaving:
            continue
        extra = sum(len(other.devices) for other in leaving)
        if moving and moving + extra > moving_devices:
            continue
        moving += extra
        retired.update(leaving)
    kept = tuple(spec for spec in old if spec not in retired)
    return replace(target, replicas=(*target.replicas, *kept))
