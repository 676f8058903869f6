"""The nodes that a server serves on, if not on its own machine: found, remembered, handed over.

A directory (Ray's, or that of a cluster file) tells of nodes. Their engines belong to the cluster
of engines, which calls each node's keeper itself; so a node that the directory calls dead is left
alone as long as its keeper is heard.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oserve.config import Settings
from oserve.config.cluster import load_hosts, named_network
from oserve.core import Clock, Device, HatchAddress, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.engine_starts import platform_of
from oserve.engines.holding import HatchDial, HeldEngines, ServerOwner
from oserve.engines.patches import engine_package
from oserve.engines.processor import AUTO, BF16_FLAG, Processor, find_processor
from oserve.nodes.agent_messages import AgentOrders
from oserve.nodes.directory import ClusterNode, NodeChanged, NodeDirectory
from oserve.nodes.host_cluster import HostDirectory, asked_devices
from oserve.nodes.known_nodes import KnownDirectory, KnownNodes, server_owner
from oserve.nodes.link_book import LinkBook
from oserve.nodes.link_measuring import LinkMeasuring
from oserve.nodes.model_fetch import ModelFetch
from oserve.nodes.peer_lists import PeerLists
from oserve.nodes.ray_address import is_ray, ray_address
from oserve.nodes.ray_cluster import (
    RayDirectory,
    check_ray_installed,
    listed_devices,
    ray_namespace,
)
from oserve.nodes.ray_messages import HelperStart
from oserve.perf.device import Link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.startup.folders import state_file
from oserve.startup.link_memory import LinkMemory
from oserve.startup.lock import serves_already

_log = logging.getLogger("oserve.nodes")

# A keeper that was heard this recently lives, whatever is said of its node; it answers each second.
_HEARD_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesFound:
    """What a deployment is prepared from: the devices of all nodes, and what all can run.

    ``network``: the link between nodes, a name in the catalogue or as measured.
    """

    devices: tuple[Device, ...]
    processor: Processor
    network: str | Link = DEFAULT_NETWORK


class NodeFleet:
    """The nodes of a cluster. ``make`` makes their directory, given whom it tells of changes.

    ``network``: the link between nodes that a person has named; empty: as measured.
    ``remembered``: where measured links are kept. ``models``: those that every node must have, and
    gets from others if it lacks them. ``owner``: of the nodes, as their keepers are told.
    ``forks``: whether engines on nodes without GPUs are started by fork.
    """

    def __init__(
        self,
        make: Callable[[NodeChanged, Mapping[str, ClusterNode]], NodeDirectory],
        known: KnownNodes,
        *,
        grace_s: float,
        network: str = "",
        remembered: LinkMemory | None = None,
        models: Sequence[str] = (),
        forks: bool = False,
        owner: ServerOwner | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._known = known
        self._owner = owner
        self._named = network
        self._remembered = remembered
        self.links = LinkBook(() if remembered is None else remembered.read())
        self._directory = make(self._changed, known.read())
        self._grace_s = grace_s
        self._forks = forks
        self._clock = clock or LiveClock()
        self._cluster: EngineCluster | None = None
        self._held: dict[str, HeldEngines] = {}
        # By node, as they were when its engines were handed over.
        self._taken: dict[str, tuple[Device, ...]] = {}
        self._grown: Callable[[], None] = lambda: None
        self._peers = PeerLists(self._hatches, self._clock)
        self._measuring = LinkMeasuring(
            self._up, self.links, self._clock, changed=self._links_changed
        )
        self._fetch = ModelFetch(
            models,
            self._up,
            self._clock,
            rates=self.links.rates,
            rates_known=lambda: self._measuring.idle,
        )

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
        found = {name: node.devices for name, node in self._nodes().items()} | self._taken
        return tuple(device for name in sorted(found) for device in found[name])

    def found(self, settings: Settings) -> NodesFound:
        """What a deployment is prepared from."""
        processor = find_processor(settings.cluster.cpu_flags)
        if settings.cluster.cpu_flags.strip() == AUTO:
            nodes = [node for node in self._nodes().values() if node.devices]
            flags = {BF16_FLAG} if all(node.facts.bf16 for node in nodes) else set()
            processor = Processor(name="CPU", flags=frozenset(flags))
        return NodesFound(devices=self.devices, processor=processor, network=self.network)

    @property
    def network(self) -> str | Link:
        """The link between nodes for pipeline stages: the one that is named, else as measured."""
        return _network(self._named, self._nodes(), self.links)

    def documents(self) -> dict[str, dict[str, Any]]:
        """What is known of each node beyond its state, as JSON values by its name."""
        return {name: {"links": self.links.summary(name)} for name in self._nodes()}

    def held(self) -> list[HeldEngines]:
        """A keeper's engines for each node that was ever reached."""
        for name, node in sorted(self._nodes().items()):
            if node.hatch is not None and node.devices and name not in self._held:
                self._held[name] = self._keeper(node, node.hatch)
                self._taken[name] = node.devices
        return list(self._held.values())

    @property
    def joined(self) -> list[HeldEngines]:
        """The keepers of the nodes that the cluster of engines has."""
        return list(self._held.values())

    def attach(
        self,
        cluster: EngineCluster,
        grown: Callable[[], None] | None = None,
        *,
        busy: Callable[[], bool] | None = None,
    ) -> None:
        """Hand over nodes that come from now on.

        ``grown`` is called when there are more devices, or links are known better. While ``busy``,
        no links are measured.
        """
        self._cluster = cluster
        self._grown = grown or self._grown
        cluster.nodes.on_node = self._turned
        cluster.nodes.lacks = self._fetch.lacks
        for node in self._nodes().values():
            self._changed(node)
        self._peers.begin()
        self._measuring.busy = lambda: self._fetch.active or (busy is not None and busy())
        self._measuring.begin()
        self._fetch.begin()

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
        await self._fetch.close()
        await self._measuring.close()
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
            self._compare(node)
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
        held = self._keeper(node, node.hatch)
        try:
            cluster.nodes.join(held, node.devices)
        except OServeError as error:
            _log.error("node %s cannot be used: %s", node.name, error.message)
            return
        self._held[node.name], self._taken[node.name] = held, node.devices
        cluster.nodes.begin()
        self._grown()

    def _compare(self, node: ClusterNode) -> None:
        before = {device.id for device in self._taken.get(node.name, ())}
        if before != (told := {device.id for device in node.devices}):
            _log.error(
                "node %s offers other devices than before (%d more, %d fewer): restart the server, "
                "which goes on planning for those before",
                *(node.name, len(told - before), len(before - told)),
            )

    def _turned(self, _node: str, _reason: str) -> None:
        self._peers.refresh()
        self._measuring.refresh()
        self._fetch.refresh()

    async def _links_changed(self) -> None:
        if self._remembered is not None:
            await asyncio.to_thread(self._remembered.write, self.links.links())
        self._grown()

    def _keeper(self, node: ClusterNode, hatch: HatchAddress) -> HeldEngines:
        return HeldEngines(
            HatchDial(node.name, hatch, clock=self._clock),
            grace_s=self._grace_s,
            owner=self._owner,
            forks=self._forks and platform_of(node.devices) == "cpu",
        )

    def _hatches(self) -> dict[str, HatchAddress]:
        down = {} if self._cluster is None else self._cluster.nodes.book.reasons()
        return {
            name: node.hatch
            for name, node in self._nodes().items()
            if node.hatch is not None and name not in down
        }

    def _up(self) -> dict[str, ClusterNode]:
        nodes = self._nodes()
        return {name: nodes[name] for name in self._hatches() if nodes[name].usable}

    def _nodes(self) -> dict[str, ClusterNode]:
        return self._directory.nodes


def _network(named: str, nodes: Mapping[str, ClusterNode], links: LinkBook) -> str | Link:
    """See ``NodeFleet.network``.

    What hatches can carry says nothing of nodes whose ranks use InfiniBand.
    """
    if named or any(node.facts.rdma for node in nodes.values()):
        return named or DEFAULT_NETWORK
    return links.network() or DEFAULT_NETWORK


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
    return NodesFound(
        devices=devices,
        processor=find_processor(settings.cluster.cpu_flags),
        network=_network(
            _named(settings), _known(settings).read(), LinkBook(_links(settings).read())
        ),
    )


def _known(settings: Settings) -> KnownNodes:
    return KnownNodes(Path(settings.state_dir) / "hatches", settings.cluster.nodes)


def _links(settings: Settings) -> LinkMemory:
    return LinkMemory(state_file(settings))


def _named(settings: Settings) -> str:
    """The link between nodes that a person has named."""
    nodes = settings.cluster.nodes
    return "" if is_ray(nodes) else named_network(nodes)


def node_fleet(settings: Settings) -> NodeFleet | None:
    """The nodes that the settings name; ``None`` for this machine alone. Raises OServeError."""
    if not settings.cluster.nodes:
        return None
    state, engines = Path(settings.state_dir), settings.engines
    return NodeFleet(
        _maker(settings),
        _known(settings),
        grace_s=engines.orphan_grace_s,
        forks=engines.method(on_cpu=True) == "zygote",
        owner=server_owner(state, state / "hatches"),
        network=_named(settings),
        remembered=_links(settings),
        models=_models(settings),
    )


def _models(settings: Settings) -> tuple[str, ...]:
    """The models that nodes send each other."""
    if settings.cluster.fetch == "never" or not settings.model:
        return ()
    return (settings.model, *settings.engines.variants.values())


def node_directory(settings: Settings) -> NodeDirectory | None:
    """The same nodes for a visitor that serves nothing there; remembers none.

    Agents of Ray carry out orders, and a visitor's may differ from those of the server that uses
    them: then its nodes are visited as it knows them.
    """
    text = settings.cluster.nodes
    if not text:
        return None
    if is_ray(text) and serves_already(Path(settings.state_dir)):
        nodes = KnownNodes(Path(settings.state_dir) / "hatches", text).read()
        if nodes:
            return KnownDirectory(nodes)
    return _maker(settings)(lambda _node: None, {})


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
