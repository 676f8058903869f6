"""A cluster on which switching costs nothing, for the oracle; the others use sim's door."""

from dataclasses import replace

from oserve.core import Observation, ReplicaPhase
from oserve.sim.fleet_cluster import FleetCluster


class FreeCluster(FleetCluster):
    """Replicas serve at once; draining ones are hidden and their devices count as free.

    No real system can do this: it bounds what quicker switching could gain.
    """

    @property
    def settled(self) -> bool:
        return all(
            item.state.phase in {ReplicaPhase.READY, ReplicaPhase.DRAINING}
            for item in self._alive()
        )

    def _seen(self) -> Observation:
        observation = super()._seen()
        shown = []
        for state in observation.replicas:
            if state.phase is not ReplicaPhase.DRAINING:
                shown.append(state)
            elif state.running + state.waiting == 0:
                self._end(self._replicas[state.spec.id])
        return replace(observation, replicas=tuple(shown))

    def _taken(self, *, standby: bool) -> set[str]:
        return {
            device
            for item in self._alive()
            if item.state.phase is not ReplicaPhase.DRAINING
            for device in item.state.spec.devices
        }
