"""Sim: engines and clusters that are not there, behind the same doors as the real ones.

``Fleet`` serves requests on simulated replicas behind a simulated gateway, exactly and fast.
``SimulatedCluster`` keeps replicas (those of a fleet, if there is one) on a virtual clock, and
checks that no device is ever used twice. ``EmulatedEngine`` speaks OpenAI's API at a speed of your
choice, without a model.
"""

from oserve.sim.cluster import ReplicaModel, SimulatedCluster, replica_model
from oserve.sim.engine import EmulatedEngine, EngineSpeed
from oserve.sim.faults import Faults, Phases
from oserve.sim.fleet import Fleet
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables, step_tables
from oserve.sim.words import (
    FleetObservation,
    GatewayOptions,
    Link,
    Policy,
    Rebalance,
    ReplicaObservation,
    RequestTable,
    Status,
)

__all__ = [
    "EmulatedEngine",
    "EngineSpeed",
    "Faults",
    "Fleet",
    "FleetObservation",
    "FleetResults",
    "GatewayOptions",
    "Link",
    "Phases",
    "Policy",
    "Rebalance",
    "ReplicaModel",
    "ReplicaObservation",
    "RequestTable",
    "SimulatedCluster",
    "Status",
    "StepTables",
    "replica_model",
    "step_tables",
]
