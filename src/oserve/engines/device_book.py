"""Which devices a cluster has, which nodes are up, and which replica has which device. Pure."""

from collections.abc import Iterable, Mapping

from oserve.core import Device, OServeError, ReplicaSpec


class DeviceBook:
    """The devices of several nodes; those of a node that is down do not count."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices: dict[str, Device] = {}
        self._down: dict[str, str] = {}
        self.add(devices)

    def add(self, devices: Iterable[Device]) -> None:
        """Take up more devices. Raises ``OServeError`` for an id that another one has."""
        for device in devices:
            if self._devices.setdefault(device.id, device) != device:
                raise OServeError(
                    f"two devices have the id {device.id}",
                    place="cluster",
                    remedy="give each node a name of its own",
                )

    def knows(self, spec: ReplicaSpec) -> bool:
        """Whether all devices of a replica exist, on nodes that are up or down."""
        return self._devices.keys() >= set(spec.devices)

    def on(self, node: str) -> tuple[Device, ...]:
        """The devices of a node, up or down."""
        return tuple(one for one in self._devices.values() if one.node == node)

    def of(self, spec: ReplicaSpec) -> list[Device]:
        """A replica's devices in its order; all must be known."""
        return [self._devices[name] for name in spec.devices]

    def usable(self) -> tuple[Device, ...]:
        """The devices of nodes that are up."""
        return tuple(one for one in self._devices.values() if one.node not in self._down)

    def down(self, node: str, reason: str) -> None:
        """A node cannot be reached."""
        self._down[node] = reason

    def up(self, node: str) -> None:
        """A node can be reached, and what runs there is known."""
        self._down.pop(node, None)

    def reasons(self) -> Mapping[str, str]:
        """Nodes that are down, and why."""
        return dict(self._down)

    def node_of(self, spec: ReplicaSpec) -> str:
        """The node of a replica's devices. Raises ``ValueError`` if they are on several."""
        nodes = {device.node for device in self.of(spec)}
        if len(nodes) != 1:
            raise ValueError(f"the devices of replica {spec.id} are on nodes {sorted(nodes)}")
        return nodes.pop()

    def check(self, spec: ReplicaSpec, others: Iterable[ReplicaSpec]) -> None:
        """Raises ``ValueError`` if the replica's devices are not there, or others have them."""
        wanted = set(spec.devices)
        if unknown := {name for name in wanted if name not in self._devices}:
            raise ValueError(f"replica {spec.id} asks for unknown devices {sorted(unknown)}")
        for device in self.of(spec):
            if device.node in self._down:
                reason = self._down[device.node]
                raise ValueError(
                    f"replica {spec.id} asks for device {device.id}, whose node {device.node} "
                    f"is down: {reason}"
                )
        for other in others:
            if taken := wanted & set(other.devices):
                raise ValueError(
                    f"replica {spec.id} asks for devices {sorted(taken)}, which {other.id} has"
                )
