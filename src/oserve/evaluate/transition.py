"""A switch on a simulated fleet, leg by leg, under load.

The legs are those that the controller's planner has for the switch: on a server the waves of a
switch that moves weights, else the stages of a roll-out. So the simulation assumes the same way and
the same seconds as the price of the switch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oserve.control.evaluation import Leg
from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.evaluate.simulator import LATEST_S, SimulatedServing, SimulatedTraffic, Simulator
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.results import FleetResults

_ROUND_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLeg:
    """A leg with its routing: ``during`` while replicas start, ``after`` once they serve."""

    leg: Leg
    during: DeploymentPlan
    after: DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSwitch:
    """A switch that begins at ``at_s``, or when the one before it has ended."""

    at_s: float
    legs: tuple[RoutedLeg, ...]


class SwitchExecution:
    """Executes a switch on a fleet that serves ``serving``.

    Requests that still run on a draining replica ``drain_limit_s`` after its drain began move to
    other replicas with the tokens that they have.
    """

    def __init__(
        self,
        simulator: Simulator,
        serving: SimulatedServing,
        fleet: SimulatedFleet,
        *,
        drain_limit_s: float,
    ) -> None:
        self._simulator = simulator
        self._levers = serving.levers
        self._fleet = fleet
        self._drain_limit_s = drain_limit_s
        # The fleet rounds its time to picoseconds, so loops must not wait for its clock.
        self._now_s = fleet.now_s
        # Replicas that drain while the switch proceeds, with the times at which they are stopped.
        self._retired: list[tuple[float, ReplicaSpec]] = []

    def run(self, legs: Sequence[RoutedLeg], *, until_s: float) -> None:
        """Execute all legs, but not past ``until_s``."""
        for item in legs:
            if self._now_s >= until_s:
                return
            self._route(item.during)
            self._stop(item.leg.leaving, until_s)
            ready_at_s = self._now_s + item.leg.seconds
            for spec in item.leg.started:
                self._simulator.add(self._fleet, spec, self._levers, ready_at_s=ready_at_s)
            if item.leg.started:
                self._advance(min(ready_at_s, until_s))
            self._route(item.after)
            for spec in item.leg.retired:
                self._fleet.drain(spec.id)
                self._retired.append((self._now_s + self._drain_limit_s, spec))
        while self._retired and self._now_s < until_s:
            self._advance(min(self._now_s + _ROUND_S, until_s))

    def _route(self, plan: DeploymentPlan) -> None:
        self._simulator.route(self._fleet, plan, self._levers)

    def _stop(self, specs: Sequence[ReplicaSpec], until_s: float) -> None:
        """Drain replicas, wait for their requests up to the drain limit, and stop them."""
        for spec in specs:
            self._fleet.drain(spec.id)
        limit_s = min(self._now_s + self._drain_limit_s, until_s)
        while self._now_s < limit_s and any(self._is_busy(spec) for spec in specs):
            self._advance(min(self._now_s + _ROUND_S, limit_s))
        for spec in specs:
            self._fleet.remove(spec.id)

    def _advance(self, until_s: float) -> None:
        """Let time pass, and stop retired replicas that are empty or out of time."""
        while self._now_s < until_s:
            self._now_s = min(self._now_s + _ROUND_S, until_s)
            self._fleet.advance(self._now_s)
            waiting = []
            for limit_s, spec in self._retired:
                if self._is_busy(spec) and self._now_s < limit_s:
                    waiting.append((limit_s, spec))
                else:
                    self._fleet.remove(spec.id)
            self._retired = waiting

    def _is_busy(self, spec: ReplicaSpec) -> bool:
        _, inflight = self._fleet.outstanding(spec.id)
        return inflight > 0


def simulate_switches(
    simulator: Simulator,
    serving: SimulatedServing,
    switches: Sequence[TimedSwitch],
    traffic: SimulatedTraffic,
    *,
    drain_limit_s: float,
    latest_s: float = LATEST_S,
) -> FleetResults:
    """Serve all of the traffic, with these switches one after another.

    The simulation ends ``latest_s`` after the last arrival.
    """
    end_s = traffic.duration_s + latest_s
    fleet = simulator.started(serving, traffic)
    for item in switches:
        fleet.advance(min(max(item.at_s, fleet.now_s), end_s))
        switch = SwitchExecution(simulator, serving, fleet, drain_limit_s=drain_limit_s)
        switch.run(item.legs, until_s=end_s)
    fleet.run(limit_s=end_s)
    simulator.simulated_requests += len(traffic)
    return fleet.results()
