"""The nodes of a cluster as its server knows them, whoever tells of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from oserve.core import Device, HatchAddress
from oserve.engines.keeper_messages import NodeFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """One node. ``devices``: named ``NODE/gpu:0`` and so on.

    ``hatch`` is ``None`` while the node has never been reached. ``refused``: why it cannot be used
    now; ``lost``: who says that it is dead, and why; both empty for a node that can be used.
    """

    name: str
    hatch: HatchAddress | None = None
    devices: tuple[Device, ...] = ()
    facts: NodeFacts = field(default_factory=NodeFacts)
    labels: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    lost: str = ""

    @property
    def usable(self) -> bool:
        """Whether its keeper can be called."""
        return self.hatch is not None and not self.refused and not self.lost


class NodeDirectory(Protocol):
    """Where a server learns of nodes.

    Every change of a node is told with its new state. A node stays listed once it was seen.
    ``silent``: why nothing is learned at present; empty if all is well.
    """

    nodes: dict[str, ClusterNode]
    silent: str

    async def start(self) -> None:
        """Learn of the nodes that there are. Raises OServeError if that is not possible."""
        ...

    async def close(self, *, end_nodes: bool) -> None:
        """Learn no more; with ``end_nodes`` the nodes are given back, where that is its to do."""
        ...


NodeChanged = Callable[[ClusterNode], None]


def on_node(node: str, devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """A machine's devices as devices of a cluster: ``NODE/gpu:0``."""
    return tuple(replace(device, id=f"{node}/{device.id}", node=node) for device in devices)
