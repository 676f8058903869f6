"""Sim: a cluster and an engine that are not there, behind the same doors as the real ones.

The simulated cluster keeps replicas on a virtual clock and checks that no device is ever used
twice; with a fleet its replicas serve requests as vLLM's scheduler would. The emulated engine
speaks OpenAI's API at a speed of your choice, without a model.
"""

from oserve.sim.cluster import SimulatedCluster
from oserve.sim.engine import EmulatedEngine, EngineSpeed
from oserve.sim.phases import Faults, Phases

__all__ = ["EmulatedEngine", "EngineSpeed", "Faults", "Phases", "SimulatedCluster"]
