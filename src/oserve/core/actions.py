"""What may be asked of a cluster. Asking twice is harmless."""

from dataclasses import dataclass

from oserve.core.plan import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Bring this replica up on its devices.

    ``standby``: without weights, which others will give it, beside what holds its devices now; it
    serves when it is committed.
    """

    spec: ReplicaSpec
    standby: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReplica:
    """Send it no new requests; let running ones end."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """End its processes now and free its devices."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReplicas:
    """In one step: standby replicas serve, and others take no new requests.

    Raises ValueError, with nothing changed, unless all of ``ready`` stand by (or serve already).
    """

    ready: tuple[str, ...]
    drain: tuple[str, ...] = ()


Action = StartReplica | DrainReplica | StopReplica | CommitReplicas
