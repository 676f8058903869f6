"""Core: the types that every other package shares.

Shapes, plans, requests, observations, actions, the clock and the one error that every command can
print. Pure data: this package knows neither engines nor measurements nor servers.
"""

from oserve.core.actions import Action, CommitReplicas, DrainReplica, StartReplica, StopReplica
from oserve.core.caller import DEFAULT_TENANT, Caller, KeyRole
from oserve.core.clock import Clock, VirtualClock
from oserve.core.endpoint import Endpoint, HatchAddress
from oserve.core.errors import OServeError
from oserve.core.nodes import NodePhase, NodeSighting, NodeState
from oserve.core.objective import Objective
from oserve.core.parts import ReplicaPart, node_of_rank, parts_of
from oserve.core.plan import (
    AttachedBackend,
    Backend,
    DeploymentPlan,
    LengthClass,
    PlannedType,
    ReplicaSpec,
    VllmBackend,
)
from oserve.core.request import (
    FinishStatus,
    Request,
    RequestRecord,
)
from oserve.core.shape import (
    Device,
    Precision,
    ReplicaShape,
    Role,
)
from oserve.core.state import (
    EngineWork,
    Observation,
    ReplicaLoad,
    ReplicaPhase,
    ReplicaState,
    StartFailures,
)
from oserve.core.tier import OverloadAction, Promise, Tier
from oserve.core.workload import WorkloadType

__all__ = [
    "DEFAULT_TENANT",
    "Action",
    "AttachedBackend",
    "Backend",
    "Caller",
    "Clock",
    "CommitReplicas",
    "DeploymentPlan",
    "Device",
    "DrainReplica",
    "Endpoint",
    "EngineWork",
    "FinishStatus",
    "HatchAddress",
    "KeyRole",
    "LengthClass",
    "NodePhase",
    "NodeSighting",
    "NodeState",
    "OServeError",
    "Objective",
    "Observation",
    "OverloadAction",
    "PlannedType",
    "Precision",
    "Promise",
    "ReplicaLoad",
    "ReplicaPart",
    "ReplicaPhase",
    "ReplicaShape",
    "ReplicaSpec",
    "ReplicaState",
    "Request",
    "RequestRecord",
    "Role",
    "StartFailures",
    "StartReplica",
    "StopReplica",
    "Tier",
    "VirtualClock",
    "VllmBackend",
    "WorkloadType",
    "node_of_rank",
    "parts_of",
]
