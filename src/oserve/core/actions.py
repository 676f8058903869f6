"""What may be asked of a cluster. Asking twice is harmless."""

from dataclasses import dataclass

from oserve.core.plan import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Bring this replica up on its devices."""

    spec: ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReplica:
    """Send it no new requests; let running ones end."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """End its processes now and free its devices."""

    replica: str


Action = StartReplica | DrainReplica | StopReplica
