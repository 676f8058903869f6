"""Simulated engines and clusters, behind the same interfaces as the real ones.

``SimulatedFleet`` is an exact and fast simulation of replicas behind a gateway.
``SimulatedCluster`` runs replicas on a virtual clock and checks that no device is used twice at a
time. The replicas of a ``FleetCluster`` belong to a fleet and serve requests. ``EmulatedEngine``
serves OpenAI's API without a model, at a chosen speed, in the format of a server (``DIALECTS``).
"""

from oserve.sim.cluster import SimulatedCluster
from oserve.sim.dialects import DIALECTS, Dialect
from oserve.sim.engine import EmulatedEngine
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.phases import Faults, Phases
from oserve.sim.responses import EngineSpeed, Mishap
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables, step_tables
from oserve.sim.types import (
    FleetObservation,
    GatewayOptions,
    Rebalance,
    ReplicaObservation,
    RequestTable,
    RoutingPolicy,
    SimLink,
    Status,
)

__all__ = [
    "DIALECTS",
    "Dialect",
    "EmulatedEngine",
    "EngineSpeed",
    "Faults",
    "FleetCluster",
    "FleetObservation",
    "FleetResults",
    "GatewayOptions",
    "Mishap",
    "Phases",
    "Rebalance",
    "ReplicaObservation",
    "RequestTable",
    "RoutingPolicy",
    "SimLink",
    "SimulatedCluster",
    "SimulatedFleet",
    "Status",
    "StepTables",
    "step_tables",
]
