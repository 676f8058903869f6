"""The observed state of a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from oserve.core.endpoint import Endpoint
from oserve.core.nodes import NodeSighting, NodeState
from oserve.core.plan import ReplicaSpec
from oserve.core.shape import Device


class ReplicaPhase(StrEnum):
    """The lifecycle of a replica: loading, ready, draining, gone.

    A replica that receives its weights from other replicas is on standby before it is ready. A hung
    replica is being terminated and no longer holds requests. A replica that is away runs on a node
    that was lost and is not used yet; it gets no requests.
    """

    LOADING = "loading"
    STANDBY = "standby"
    READY = "ready"
    DRAINING = "draining"
    HUNG = "hung"
    AWAY = "away"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """Monotonic counters of an engine since its start.

    ``steps``; the ``prompt_tokens`` they computed and the ``prompts`` they completed; the
    ``output_tokens`` they generated; ``gaps`` and ``gap_s``: the number of intervals between
    consecutive steps and their sum in seconds.
    """

    steps: int = 0
    prompt_tokens: int = 0
    prompts: int = 0
    output_tokens: int = 0
    gaps: int = 0
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """The observed state of one replica.

    ``max_model_len`` (tokens) is 0 until the engine reports it. ``since_s``: start of this phase;
    ``started_s``: when the engine was started or adopted, which distinguishes successive engines
    of one replica. ``work`` is ``None`` if the engine reports no counters. ``silent_s``: time since
    the engine's last sign of life; beyond ``patience_s`` the engine counts as hung.
    """

    spec: ReplicaSpec
    phase: ReplicaPhase
    endpoint: Endpoint
    since_s: float
    started_s: float = 0.0
    pid: int = 0
    max_model_len: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    work: EngineWork | None = None
    silent_s: float = 0.0
    patience_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailures:
    """The unexpected exits of a replica since it last served for a sufficient time.

    ``spec`` is the spec that failed: a changed spec resets the count.
    """

    spec: ReplicaSpec
    count: int
    last_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A snapshot of the cluster at ``now_s`` (seconds of the clock).

    ``nodes``: what is seen of each node; empty for a cluster of one machine, which is never lost.
    ``node_states`` are added by ``control.nodes``, which also takes the devices of lost nodes away.
    """

    now_s: float
    devices: tuple[Device, ...]
    replicas: tuple[ReplicaState, ...]
    failures: Mapping[str, StartFailures] = field(default_factory=dict)
    nodes: tuple[NodeSighting, ...] = ()
    node_states: tuple[NodeState, ...] = ()

    def replica(self, replica_id: str) -> ReplicaState | None:
        """The observed replica of that id; ``None`` if there is none or it is gone."""
        for state in self.replicas:
            if state.spec.id == replica_id and state.phase is not ReplicaPhase.GONE:
                return state
        return None

    @property
    def startable(self) -> frozenset[str]:
        """The devices on which a replica may start now, held or not."""
        barred = {state.name for state in self.node_states if not state.startable}
        return frozenset(device.id for device in self.devices if device.node not in barred)


class ReplicaLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The router's view of one replica that accepts requests.

    ``work_s``: outstanding engine time in seconds. ``prefill_s_per_token`` and
    ``decode_s_per_token``: engine time per further token. ``max_inflight`` bounds the requests that
    the gateway dispatches to the replica concurrently; ``max_model_len`` is 0 when unknown.
    ``prompt_s``: the part of ``work_s`` that is prompts of streams. ``slots``: how many more
    requests it could hold, even where it takes none now because it owes too many prompts.
    """

    replica: str
    work_s: float
    inflight: int
    max_inflight: int
    prefill_s_per_token: float
    decode_s_per_token: float
    max_model_len: int = 0
    prompt_s: float = 0.0
    slots: int = 0
