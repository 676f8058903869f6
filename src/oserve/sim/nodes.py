"""The nodes of a simulated cluster: which have power, and what is seen of them."""

import math
from collections.abc import Sequence

from oserve.core import Device, NodeSighting, ReplicaSpec
from oserve.sim.phases import NodeLoss

# A live cluster takes a line that is silent for so long for lost.
_SILENT_S = 5.0


class SimulatedNodes:
    """Which nodes have power. A cluster of one node has no sightings, like one machine."""

    def __init__(self, devices: Sequence[Device], losses: Sequence[NodeLoss]) -> None:
        self._devices = tuple(devices)
        self._node_of = {device.id: device.node for device in devices}
        self._names = tuple(dict.fromkeys(self._node_of.values()))
        self._losses = tuple(losses)
        self._cut_s: dict[str, float] = {}
        self._noticed_s: dict[str, float] = {}
        several = len(self._names) > 1
        self._all_heard = tuple(NodeSighting(name=name) for name in self._names if several)

    def cut(self, node: str, now_s: float) -> None:
        """Take the power from a node."""
        past = [loss for loss in self._losses if loss.node == node and loss.at_s <= now_s]
        told_after_s = max(past, key=lambda loss: loss.at_s).told_after_s if past else math.inf
        self._cut_s[node] = now_s
        self._noticed_s[node] = now_s + min(_SILENT_S, told_after_s)

    def restore(self, node: str) -> None:
        """Give it power again."""
        self._cut_s.pop(node, None)
        self._noticed_s.pop(node, None)

    def holds(self, node: str, spec: ReplicaSpec) -> bool:
        """Whether a replica has a device on a node."""
        return any(self._node_of.get(device) == node for device in spec.devices)

    def powerless(self, spec: ReplicaSpec) -> bool:
        """Whether any device of a replica is without power."""
        return any(self._node_of.get(device) in self._cut_s for device in spec.devices)

    def noticed_s(self, spec: ReplicaSpec) -> float:
        """When the cluster notices that a replica is without power; infinite if it has power."""
        return min(
            (
                self._noticed_s.get(self._node_of.get(device, ""), math.inf)
                for device in spec.devices
            ),
            default=math.inf,
        )

    def devices(self, now_s: float) -> tuple[Device, ...]:
        """The devices of all nodes but those that are noticed to be without power."""
        gone = {node for node, at_s in self._noticed_s.items() if now_s >= at_s}
        if not gone:
            return self._devices
        return tuple(device for device in self._devices if device.node not in gone)

    def sightings(self, now_s: float) -> tuple[NodeSighting, ...]:
        """What is seen of each node."""
        if not self._cut_s or not self._all_heard:
            return self._all_heard
        return tuple(
            NodeSighting(
                name=name,
                silent_s=now_s - self._cut_s.get(name, now_s),
                dead=self._dead(name, now_s),
            )
            for name in self._names
        )

    def _dead(self, name: str, now_s: float) -> str:
        noticed_s = self._noticed_s.get(name, math.inf)
        told = noticed_s < self._cut_s.get(name, now_s) + _SILENT_S
        return "it was told dead" if told and now_s >= noticed_s else ""
