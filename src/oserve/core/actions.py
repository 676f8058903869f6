"""The actions of a cluster. Each is idempotent."""

from dataclasses import dataclass

from oserve.core.plan import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Start the replica on its devices.

    A ``standby`` replica starts without weights, next to the replica that holds the devices now. It
    receives its weights from other replicas and serves once it is committed.
    """

    spec: ReplicaSpec
    standby: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReplica:
    """Send the replica no new requests; its running requests complete."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Terminate the replica's processes now and free its devices."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReplicas:
    """Atomically make the replicas in ``ready`` serve and those in ``drain`` drain.

    A replica in ``ready`` that drains serves again, unless it was told to stop. Raises ValueError,
    and changes nothing, unless each of them is on standby, serves already, or drains so.
    """

    ready: tuple[str, ...]
    drain: tuple[str, ...] = ()


Action = StartReplica | DrainReplica | StopReplica | CommitReplicas
