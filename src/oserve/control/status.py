"""The status document: replicas, their devices and load, and what happens to failed ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from oserve.control.reconcile import ReconcilePolicy, given_up, restart_wait_s
from oserve.core import (
    Action,
    AttachedBackend,
    CommitReplicas,
    DeploymentPlan,
    DrainReplica,
    Observation,
    ReplicaPhase,
    ReplicaSpec,
    ReplicaState,
    StartReplica,
    StopReplica,
)

# Shorter silences are ordinary steps.
_SILENT_S = 3.0
_NOTES = {
    ReplicaPhase.STANDBY: "receives its weights from other replicas",
    ReplicaPhase.HUNG: "is being stopped",
    ReplicaPhase.AWAY: "gets no requests until its node is in use again",
}


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica in the status document; the last field tells what happens next."""

    id: str
    shape: dict[str, str | int | None]
    devices: list[str]
    phase: ReplicaPhase = ReplicaPhase.GONE
    phase_s: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    max_model_len: int = 0
    pid: int = 0
    silent_s: float = 0.0
    patience_s: float = 0.0
    detail: str = ""
    url: str = ""
    note: str = ""


def status_document(
    plan: DeploymentPlan,
    observation: Observation,
    policy: ReconcilePolicy,
    *,
    model: str,
    version: str,
    open_breakers: Mapping[str, tuple[str, float]] | None = None,
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """JSON values for ``/oserve/v1/status`` and ``oserve status``.

    ``open_breakers``: replicas that get no requests now: the reason, and the seconds left.
    ``nodes``: see ``node_documents``.
    """
    replicas = _replicas(plan, observation, policy, open_breakers or {})
    planned = {spec.id for spec in plan.replicas}
    serving = any(item.phase is ReplicaPhase.READY and item.id in planned for item in replicas)
    return {
        "version": version,
        "model": model,
        "plan_id": plan.id,
        "serving": serving,
        "replicas": msgspec.to_builtins(replicas),
        "given_up": {
            name: failures.reason for name, failures in given_up(plan, observation, policy).items()
        },
        "workload_types": [
            {
                "name": kind.name,
                "max_prompt_tokens": kind.max_prompt_tokens,
                "output_tokens": kind.output_tokens,
            }
            for kind in plan.length_classes
        ],
        "routing_shares": plan.routing_shares,
        "devices": [
            {"id": device.id, "kind": device.kind, "node": device.node, "cores": device.cores}
            for device in observation.devices
        ],
        "nodes": node_documents(observation, nodes),
    }


def node_documents(
    observation: Observation, more: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The nodes and their states as JSON values, by name; empty for one machine.

    ``more``: what else is known of each node.
    """
    if not observation.node_states:
        return []
    homes = {device.id: device.node for device in observation.devices}
    sizes = Counter(homes.values())
    living: dict[str, list[str]] = {}
    for replica in observation.replicas:
        if replica.phase is not ReplicaPhase.GONE:
            for node in {homes.get(device, "") for device in replica.spec.devices}:
                living.setdefault(node, []).append(replica.spec.id)
    found = []
    for state in observation.node_states:
        found.append(
            {
                "name": state.name,
                "state": state.phase.value,
                "state_s": round(observation.now_s - state.since_s, 1),
                "word": state.word,
                "held_down_s": round(max(0.0, state.until_s - observation.now_s), 1),
                "silent_s": round(state.silent_s, 1),
                "losses": state.losses,
                "reason": state.reason,
                "devices": sizes[state.name],
                "replicas": living.get(state.name, []),
                **(more or {}).get(state.name, {}),
            }
        )
    return found


def _replicas(
    plan: DeploymentPlan,
    observation: Observation,
    policy: ReconcilePolicy,
    open_breakers: Mapping[str, tuple[str, float]],
) -> list[ReplicaStatus]:
    """The observed replicas, then those of the plan that were not observed, with their notes."""
    seen = {state.spec.id for state in observation.replicas}
    found = [_observed(state, observation.now_s) for state in observation.replicas]
    found += [_absent(spec) for spec in plan.replicas if spec.id not in seen]
    planned = {spec.id: spec for spec in plan.replicas}
    replicas = []
    for item in found:
        note = _note(item, planned.get(item.id), observation, policy)
        if item.id in open_breakers and item.phase is ReplicaPhase.READY:
            note = _breaker_note(*open_breakers[item.id])
        replicas.append(msgspec.structs.replace(item, note=note))
    return replicas


def _shape(spec: ReplicaSpec) -> dict[str, str | int | None]:
    shape = spec.shape
    return {
        "tensor_parallel_size": shape.tensor_parallel_size,
        "pipeline_parallel_size": shape.pipeline_parallel_size,
        "precision": shape.precision.value,
        "max_num_batched_tokens": shape.max_num_batched_tokens,
        "max_num_seqs": shape.max_num_seqs,
        "kv_cache_memory_bytes": shape.kv_cache_memory_bytes,
    }


def _observed(state: ReplicaState, now_s: float) -> ReplicaStatus:
    return ReplicaStatus(
        id=state.spec.id,
        shape=_shape(state.spec),
        devices=list(state.spec.devices),
        phase=state.phase,
        phase_s=round(now_s - state.since_s, 1),
        running=state.running,
        waiting=state.waiting,
        kv_cache_usage=round(state.kv_cache_usage, 4),
        max_model_len=state.max_model_len,
        pid=state.pid,
        silent_s=round(state.silent_s, 1),
        patience_s=round(state.patience_s, 1),
        detail=state.detail,
        url=_url(state.spec),
    )


def _absent(spec: ReplicaSpec) -> ReplicaStatus:
    return ReplicaStatus(
        id=spec.id,
        shape=_shape(spec),
        devices=list(spec.devices),
        detail="not started yet",
        url=_url(spec),
    )


def _url(spec: ReplicaSpec) -> str:
    """The URL of an attached server; empty for OServe's own engines."""
    return spec.backend.url if isinstance(spec.backend, AttachedBackend) else ""


def _breaker_note(reason: str, left_s: float) -> str:
    when = f"for {left_s:.0f} s" if left_s >= 1 else "until its next answer"
    return f"circuit breaker open {when}: {reason}"


def _note(
    item: ReplicaStatus,
    spec: ReplicaSpec | None,
    observation: Observation,
    policy: ReconcilePolicy,
) -> str:
    """What happens next to a replica that does not serve as planned."""
    if item.phase in _NOTES:
        return _NOTES[item.phase]
    if spec is None:
        return "not in the plan"
    if item.phase is not ReplicaPhase.GONE:
        return _silence(item)
    failures = observation.failures.get(spec.id)
    if failures is None or failures.spec != spec:
        return item.detail if item.detail.startswith("node ") else "waiting for its devices"
    wait_s = restart_wait_s(spec, observation, policy)
    if wait_s == float("inf"):
        return f"given up after {failures.count} failures: {failures.reason}"
    return f"restarts in {wait_s:.0f} s after failure {failures.count}: {failures.reason}"


def _silence(item: ReplicaStatus) -> str:
    if item.silent_s < _SILENT_S:
        return ""
    return f"no sign of life for {item.silent_s:.0f} s; after {item.patience_s:.0f} s it is stopped"


def gauges(observation: Observation) -> list[tuple[str, list[str], float]]:
    """Replica and device gauges as (metric, labels, value)."""
    values: dict[tuple[str, tuple[str, ...]], float] = {}
    used: set[str] = set()
    for state in observation.replicas:
        shape = state.spec.shape.name
        key = ("oserve_replicas", (shape, state.phase.value))
        values[key] = values.get(key, 0.0) + 1.0
        if state.phase is not ReplicaPhase.GONE:
            used.update(state.spec.devices)
            name = (state.spec.id,)
            values["oserve_requests_running", name] = float(state.running)
            values["oserve_requests_waiting", name] = float(state.waiting)
            values["oserve_kv_cache_usage_ratio", name] = state.kv_cache_usage
            values["oserve_replica_silent_seconds", name] = state.silent_s
    for node in observation.node_states:
        where = ("oserve_nodes", (node.phase.value,))
        values[where] = values.get(where, 0.0) + 1.0
    values["oserve_devices", ("used",)] = float(len(used))
    values["oserve_devices", ("free",)] = float(len(observation.devices) - len(used))
    return [(name, list(labels), value) for (name, labels), value in values.items()]


def summary(states: Sequence[ReplicaState]) -> str:
    """One line about the phases of all replicas."""
    return ", ".join(f"{state.spec.id} {state.phase.value}" for state in states) or "no replicas"


def explained(action: Action, observation: Observation) -> str:
    """An action and its reason, for the log."""
    match action:
        case StartReplica(spec=spec):
            failures = observation.failures.get(spec.id)
            why = "it is in the plan and not running"
            if failures is not None:
                why = f"it failed {failures.count} time(s), last: {failures.reason}"
            where = ",".join(spec.devices) or "its own server"
            return f"start replica {spec.id} ({spec.shape.name} on {where}): {why}"
        case DrainReplica(replica=name):
            return f"drain replica {name}: it is not in the plan in this form"
        case CommitReplicas(ready=ready, drain=drain):
            return f"commit {', '.join(ready)}; drain {', '.join(drain)}: the switch decided it"
        case StopReplica(replica=name):
            return f"stop replica {name}: it is drained, or not in the plan any more"
