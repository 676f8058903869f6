"""The nodes that a server serves on, if not on its own machine: found, remembered, handed over.

A directory (Ray's, or that of a cluster file) tells of nodes. Their engines belong to the cluster
of engines, which calls each node's keeper itself; so a node that the directory calls dead is left
alone as long as its keeper is heard.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from oserve.config import Settings
from oserve.config.cluster import load_hosts
from oserve.core import Clock, Device, HatchAddress, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.holding import HatchDial, HeldEngines, ServerOwner, keeper_runs
from oserve.engines.patches import engine_package
from oserve.engines.processor import AUTO, BF16_FLAG, Processor, find_processor
from oserve.nodes.agent_messages import AgentOrders
from oserve.nodes.directory import ClusterNode, NodeChanged, NodeDirectory
from oserve.nodes.host_cluster import HostDirectory, asked_devices
from oserve.nodes.known_nodes import KnownNodes, server_owner
from oserve.nodes.peer_lists import PeerLists
from oserve.nodes.ray_address import is_ray, ray_address
from oserve.nodes.ray_cluster import (
    RayDirectory,
    check_ray_installed,
    listed_devices,
    ray_namespace,
)
from oserve.nodes.ray_messages import HelperStart
from oserve.startup.lock import StateLock

_log = logging.getLogger("oserve.nodes")

# A keeper that was heard this recently lives, whatever is said of its node; it answers each second.
_HEARD_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesFound:
    """What a deployment is prepared from: the devices of all nodes, and what all can run."""

    devices: tuple[Device, ...]
    processor: Processor


class NodeFleet:
    """The nodes of a cluster. ``make`` makes their directory, given whom it tells of changes."""

    def __init__(
        self,
        make: Callable[[NodeChanged, Mapping[str, ClusterNode]], NodeDirectory],
        known: KnownNodes,
        *,
        grace_s: float,
        owner: ServerOwner | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._known = known
        self._owner = owner
        self._directory = make(self._changed, known.read())
        self._grace_s = grace_s
        self._clock = clock or LiveClock()
        self._cluster: EngineCluster | None = None
        self._held: dict[str, HeldEngines] = {}
        self._grown: Callable[[tuple[Device, ...]], None] = lambda _devices: None
        self._peers = PeerLists(self._hatches, self._clock)

    async def start(self) -> None:
        """Find the nodes. Raises OServeError if none can be used."""
        await self._directory.start()
        if not self.devices:
            reasons = "; ".join(
                f"{node.name}: {node.refused or node.lost}" for node in self._nodes().values()
            )
            raise OServeError(
                f"no node can be used{': ' if reasons else ''}{reasons}",
                place="--cluster",
                remedy="see docs/cluster.md for what each node needs",
            )
        self._known.write(self._nodes())

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of every node that was ever reached, by name of the node."""
        nodes = self._nodes()
        return tuple(device for name in sorted(nodes) for device in nodes[name].devices)

    def found(self, settings: Settings) -> NodesFound:
        """What a deployment is prepared from."""
        processor = find_processor(settings.cluster.cpu_flags)
        if settings.cluster.cpu_flags.strip() == AUTO:
            nodes = [node for node in self._nodes().values() if node.devices]
            flags = {BF16_FLAG} if all(node.facts.bf16 for node in nodes) else set()
            processor = Processor(name="CPU", flags=frozenset(flags))
        return NodesFound(devices=self.devices, processor=processor)

    def held(self) -> list[HeldEngines]:
        """A keeper's engines for each node that was ever reached."""
        for name, node in sorted(self._nodes().items()):
            if node.hatch is not None and node.devices and name not in self._held:
                self._held[name] = self._keeper(name, node.hatch)
        return list(self._held.values())

    def attach(
        self, cluster: EngineCluster, grown: Callable[[tuple[Device, ...]], None] | None = None
    ) -> None:
        """Hand over nodes that come from now on; ``grown`` is told all devices then."""
        self._cluster = cluster
        self._grown = grown or self._grown
        cluster.nodes.on_node = self._turned
        for node in self._nodes().values():
            self._changed(node)
        self._peers.begin()

    def check_free(self) -> None:
        """Raises OServeError if another server has every node, once all have been called."""
        taken = {name: held.taken for name, held in self._held.items()}
        if taken and all(taken.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(taken.items()))
            raise OServeError(
                f"no node is free: {reasons}",
                place="--cluster",
                remedy="stop that server, which gives its nodes back, or use other nodes",
            )

    async def close(self, *, end_nodes: bool) -> None:
        """Learn no more; ``end_nodes``: also end agents and keepers that were started for this."""
        self._cluster = None
        await self._peers.close()
        await self._directory.close(end_nodes=end_nodes)

    # -- what comes and goes --------------------------------------------------------------------
    def _changed(self, node: ClusterNode) -> None:
        cluster = self._cluster
        if cluster is None:
            return
        self._known.write(self._nodes())
        held = self._held.get(node.name)
        if held is None:
            self._join(cluster, node)
        elif node.usable and node.hatch is not None:
            cluster.nodes.redirect(node.name, node.hatch)
        elif held.silent_s < _HEARD_S and cluster.nodes.is_up(node.name):
            _log.warning(
                "node %s serves on, since its keeper answers (%s)",
                node.name,
                node.lost or node.refused,
            )
        else:
            cluster.nodes.lose(node.name, node.lost or node.refused)
        self._peers.refresh()

    def _join(self, cluster: EngineCluster, node: ClusterNode) -> None:
        if not node.usable or node.hatch is None:
            return
        held = self._keeper(node.name, node.hatch)
        try:
            cluster.nodes.join(held, node.devices)
        except OServeError as error:
            _log.error("node %s cannot be used: %s", node.name, error.message)
            return
        self._held[node.name] = held
        cluster.nodes.begin()
        self._grown(self.devices)

    def _turned(self, _node: str, _reason: str) -> None:
        self._peers.refresh()

    def _keeper(self, name: str, hatch: HatchAddress) -> HeldEngines:
        dial = HatchDial(name, hatch, clock=self._clock)
        return HeldEngines(dial, grace_s=self._grace_s, owner=self._owner)

    def _hatches(self) -> dict[str, HatchAddress]:
        down = {} if self._cluster is None else self._cluster.nodes.book.reasons()
        return {
            name: node.hatch
            for name, node in self._nodes().items()
            if node.hatch is not None and name not in down
        }

    def _nodes(self) -> dict[str, ClusterNode]:
        return self._directory.nodes


_MakeDirectory = Callable[[NodeChanged, Mapping[str, ClusterNode]], NodeDirectory]


async def foreseen(settings: Settings) -> NodesFound | None:
    """What a deployment could be prepared from now; nothing is started on any node.

    ``None`` for this machine alone. Raises OServeError.
    """
    text = settings.cluster.nodes
    if not text:
        return None
    if is_ray(text):
        check_ray_installed()
        devices = await listed_devices(ray_address(text))
    else:
        devices = await asked_devices(load_hosts(text))
    return NodesFound(devices=devices, processor=find_processor(settings.cluster.cpu_flags))


def serves_already(settings: Settings) -> bool:
    """Whether a server, or what a killed one has left, uses the nodes of this state folder."""
    state = Path(settings.state_dir)
    try:
        StateLock(state).release()
    except OServeError:
        return True
    return keeper_runs(state)


def node_fleet(settings: Settings) -> NodeFleet | None:
    """The nodes that the settings name; ``None`` for this machine alone. Raises OServeError."""
    if not settings.cluster.nodes:
        return None
    state = Path(settings.state_dir)
    folder = state / "hatches"
    return NodeFleet(
        _maker(settings),
        KnownNodes(folder, settings.cluster.nodes),
        grace_s=settings.engines.orphan_grace_s,
        owner=server_owner(state, folder),
    )


def node_directory(settings: Settings) -> NodeDirectory | None:
    """The same nodes for a visitor that serves nothing there; remembers none."""
    return _maker(settings)(lambda _node: None, {}) if settings.cluster.nodes else None


def _maker(settings: Settings) -> _MakeDirectory:
    text, state = settings.cluster.nodes, Path(settings.state_dir)
    if not is_ray(text):
        hosts = load_hosts(text)
        return lambda changed, known: HostDirectory(hosts, changed=changed, known=known)
    check_ray_installed()
    namespace = ray_namespace(state)
    start = HelperStart(
        address=ray_address(text), namespace=namespace, orders=_orders(settings, namespace)
    )
    log = Path(settings.engines.log_dir or state / "logs") / "ray-helper.log"
    return lambda changed, known: RayDirectory(start, log=log, changed=changed, known=known)


def _orders(settings: Settings, namespace: str) -> AgentOrders:
    """What the agents of a Ray cluster set up; name and address are each node's own."""
    cluster = settings.cluster
    return AgentOrders(
        node="any",
        host="",
        port=cluster.hatch_port,
        state_dir=f"{cluster.node_state_dir}/{namespace}",
        method=settings.engines.start_method,
        grace_s=settings.engines.orphan_grace_s,
        devices=cluster.devices,
        cpu_slots=cluster.cpu_slots,
        engine=engine[1] if (engine := engine_package()) is not None else "",
    )
