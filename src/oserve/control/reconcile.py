"""From the desired plan and the observed cluster to actions: level-triggered, without I/O.

Actions follow from the desired and the observed state, never from earlier actions. So a lost,
repeated or late action does no harm, and a restarted controller continues from what it observes.
"""

from dataclasses import dataclass

from oserve.core import (
    Action,
    DeploymentPlan,
    DrainReplica,
    Observation,
    ReplicaPhase,
    ReplicaSpec,
    ReplicaState,
    StartFailures,
    StartReplica,
    StopReplica,
)

# A standby replica gets its weights from a switch; one that no switch holds never will.
_LEAVING = {ReplicaPhase.DRAINING, ReplicaPhase.STANDBY}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcilePolicy:
    """Limits on restarting and draining; all in seconds but ``max_failures``.

    After k failures in a row a replica restarts after a back-off of ``backoff_s * 2**(k-1)``, at
    most ``max_backoff_s``; after ``max_failures`` it is given up. An idle draining replica is kept
    for ``drain_settle_s``, since requests sent just before may not be counted yet.
    """

    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    max_failures: int = 5
    drain_settle_s: float = 3.0
    drain_limit_s: float = 600.0


def reconcile(
    plan: DeploymentPlan,
    observation: Observation,
    policy: ReconcilePolicy,
    held: frozenset[str] = frozenset(),
) -> tuple[Action, ...]:
    """Actions that bring the cluster nearer to the plan; empty if it is there or must wait.

    ``held``: replicas that a switch controls; they get no actions. Nothing starts on a node that
    is not fully in use.
    """
    alive = [state for state in observation.replicas if state.phase is not ReplicaPhase.GONE]
    planned = {spec.id: spec for spec in plan.replicas}
    actions: list[Action] = []
    for state in alive:
        if state.spec.id in held:
            continue
        if planned.get(state.spec.id) != state.spec or state.phase in _LEAVING:
            actions.extend(_retire(state, observation.now_s, policy))
    known = observation.startable
    taken = {device for state in alive for device in state.spec.devices}
    present = {state.spec.id for state in alive}
    for spec in plan.replicas:
        wanted = set(spec.devices)
        if spec.id in present or spec.id in held or wanted & taken or not wanted <= known:
            continue
        if restart_wait_s(spec, observation, policy) == 0.0:
            actions.append(StartReplica(spec=spec))
            taken |= wanted
    return tuple(actions)


def _retire(state: ReplicaState, now_s: float, policy: ReconcilePolicy) -> list[Action]:
    if state.phase in {ReplicaPhase.LOADING, ReplicaPhase.STANDBY}:
        return [StopReplica(replica=state.spec.id)]
    if state.phase is ReplicaPhase.READY:
        return [DrainReplica(replica=state.spec.id)]
    drained_s = now_s - state.since_s
    idle = state.running + state.waiting == 0 and drained_s >= policy.drain_settle_s
    if idle or drained_s >= policy.drain_limit_s:
        return [StopReplica(replica=state.spec.id)]
    return []


def restart_wait_s(spec: ReplicaSpec, observation: Observation, policy: ReconcilePolicy) -> float:
    """Seconds until this replica may be started; infinite if it was given up."""
    failures = _failures(spec, observation)
    if failures is None:
        return 0.0
    if failures.count >= policy.max_failures:
        return float("inf")
    backoff_s = min(policy.backoff_s * 2.0 ** (failures.count - 1), policy.max_backoff_s)
    return max(0.0, failures.last_s + backoff_s - observation.now_s)


def given_up(
    plan: DeploymentPlan, observation: Observation, policy: ReconcilePolicy
) -> dict[str, StartFailures]:
    """Replicas of the plan that are not restarted any more, with their failures."""
    return {
        spec.id: failures
        for spec in plan.replicas
        if (failures := _failures(spec, observation)) is not None
        and failures.count >= policy.max_failures
    }


def _failures(spec: ReplicaSpec, observation: Observation) -> StartFailures | None:
    failures = observation.failures.get(spec.id)
    return failures if failures is not None and failures.spec == spec else None
