"""What a Ray helper knows of the cluster's nodes: Ray's lists and agents' answers in, events out.

Pure. Nodes keep their name over restarts of Ray on them, though Ray gives them a new id each time.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from oserve.core import Device
from oserve.nodes.agent_messages import AgentAnswer, NodeRefusal, NodeReport
from oserve.nodes.directory import on_node
from oserve.nodes.ray_messages import (
    NAMESPACE_PREFIX,
    HelperEvent,
    NodeFound,
    NodeLost,
    NodeRefused,
)

SLOT_RESOURCE: Final = "oserve_slot"
"""The resource by which a node without GPUs is offered to OServe."""

GPU_RESOURCE: Final = "GPU"
AGENT_PREFIX: Final = "agent-"
"""The name of an agent in Ray is this and Ray's id of its node."""

_ID_LABEL: Final = "ray.io/node-id"
_ACCELERATOR: Final = "accelerator_type:"
_ACCELERATOR_LABEL: Final = "ray.io/accelerator-type"

_MAX_NAME = 63
_UNTOLD = "Ray told no reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node as Ray lists it. ``id``: of this life of it; ``reason``: of its death."""

    id: str
    host: str
    address: str
    alive: bool = True
    reason: str = ""
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def offered(self) -> dict[str, float]:
        """The resources that an agent holds; without any the node is not for OServe."""
        kinds = (GPU_RESOURCE, SLOT_RESOURCE)
        return {kind: self.resources[kind] for kind in kinds if self.resources.get(kind, 0) > 0}


def ray_node(item: Mapping[str, Any]) -> RayNode:
    """A node, from an item of ``ray.nodes()``; without the label that each life has another."""
    labels = dict(item.get("Labels") or {})
    labels.pop(_ID_LABEL, None)
    return RayNode(
        id=item["NodeID"],
        host=item.get("NodeManagerHostname", ""),
        address=item.get("NodeManagerAddress", ""),
        alive=bool(item.get("Alive")),
        reason=str(item.get("DeathReasonMessage") or ""),
        resources=dict(item.get("Resources") or {}),
        labels=labels,
    )


def other_agents(named: Iterable[Mapping[str, str]], namespace: str) -> dict[str, str]:
    """Namespaces of other deployments that have an agent, by Ray's id of the agent's node.

    ``named``: Ray's list of named actors.
    """
    return {
        item["name"].removeprefix(AGENT_PREFIX): item["namespace"]
        for item in named
        if item["name"].startswith(AGENT_PREFIX)
        and item["namespace"].startswith(NAMESPACE_PREFIX)
        and item["namespace"] != namespace
    }


def plain_name(host: str) -> str:
    """A host name as the name of a node: letters, digits, dots and dashes, without the domain."""
    short = host.partition(".")[0] if not host.replace(".", "").isdigit() else host
    return re.sub(r"[^A-Za-z0-9-]+", "-", short).strip("-")[:_MAX_NAME] or "node"


class NodeNames:
    """Names of machines. One that shares its host name gets the end of its address, too."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def name(self, node: RayNode) -> str:
        """The name of a machine that was given one."""
        return self._names[node.host, node.address]

    def add(self, nodes: Iterable[RayNode]) -> None:
        """Name the machines that have no name yet; the others keep theirs."""
        fresh = {(node.host, node.address) for node in nodes} - self._names.keys()
        plain = {machine: plain_name(machine[0]) for machine in fresh}
        taken = set(self._names.values())
        for machine in sorted(fresh):
            name = plain[machine]
            shared = list(plain.values()).count(name) > 1 or name in taken
            if shared:
                name = _apart(f"{name}-{re.split('[.:]', machine[1])[-1]}", taken)
            taken.add(name)
            self._names[machine] = name


def _apart(name: str, taken: set[str]) -> str:
    number = 2
    found = name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def offered_devices(nodes: Iterable[RayNode]) -> tuple[Device, ...]:
    """The devices of the nodes that are offered, as far as Ray knows them; by name of the node."""
    offered = [node for node in nodes if node.alive and node.offered]
    names = NodeNames()
    names.add(offered)
    found: list[Device] = []
    for node in sorted(offered, key=names.name):
        gpus = int(node.resources.get(GPU_RESOURCE, 0))
        slots = 0 if gpus else int(node.resources.get(SLOT_RESOURCE, 0))
        memory = int(node.resources.get("memory", 0)) // max(1, slots)
        devices = [Device(id=f"gpu:{n}", kind=_accelerator(node)) for n in range(gpus)]
        devices += [Device(id=f"cpu:{n}", kind="cpu", memory_bytes=memory) for n in range(slots)]
        found += on_node(names.name(node), tuple(devices))
    return tuple(found)


def _accelerator(node: RayNode) -> str:
    """The kind of a node's GPUs, by Ray's label or resource; ``GPU`` where it has neither."""
    label = node.labels.get(_ACCELERATOR_LABEL, "")
    kinds = [key for key in node.resources if key.startswith(_ACCELERATOR)]
    return label or (kinds[0].removeprefix(_ACCELERATOR) if kinds else GPU_RESOURCE)


@dataclass(slots=True)
class _Life:
    """One life of a node. ``told``: the last event about it; ``None`` before any."""

    name: str
    node: RayNode
    since_s: float
    told: NodeFound | NodeRefused | None = None


class NodeLedger:
    """Nodes that live and are offered to OServe, by Ray's id.

    ``refuse_s``: a node counts as refused after so long without an agent. ``listed``: whether Ray
    has listed its nodes yet.
    """

    def __init__(self, *, refuse_s: float) -> None:
        self._refuse_s = refuse_s
        self._names = NodeNames()
        self._lives: dict[str, _Life] = {}
        self.listed = False

    def observe(self, nodes: Iterable[RayNode], now_s: float) -> list[HelperEvent]:
        """Take Ray's list up: the nodes that are lost since the last one."""
        seen = {node.id: node for node in nodes}
        living = {key: node for key, node in seen.items() if node.alive and node.offered}
        self._names.add(living.values())
        events: list[HelperEvent] = []
        for key in self._lives.keys() - living.keys():
            life = self._lives.pop(key)
            # Ray forgets the dead in time; one that is not listed any more is as dead.
            reason = seen[key].reason if key in seen else "Ray does not list it any more"
            if life.told is not None:
                events.append(NodeLost(name=life.name, id=key, reason=reason or _UNTOLD))
        for key, node in living.items():
            if key not in self._lives:
                self._lives[key] = _Life(self._names.name(node), node, now_s)
            self._lives[key].node = node
        self.listed = True
        return events

    def living(self) -> dict[str, tuple[str, RayNode]]:
        """Name and node of each, by Ray's id."""
        return {key: (life.name, life.node) for key, life in self._lives.items()}

    def answered(self, key: str, answer: AgentAnswer) -> list[HelperEvent]:
        """An agent's answer: an event if that changes what was told."""
        life = self._lives.get(key)
        if life is None:
            return []
        event: NodeFound | NodeRefused
        match answer:
            case NodeReport():
                event = NodeFound(
                    name=life.name,
                    id=key,
                    address=life.node.address,
                    resources=life.node.resources,
                    labels=life.node.labels,
                    report=answer,
                )
            case NodeRefusal(reason=reason, remedy=remedy):
                event = NodeRefused(name=life.name, id=key, reason=reason, remedy=remedy)
        return self._tell(life, event)

    def unanswered(
        self, key: str, reason: str, remedy: str, now_s: float, *, after_s: float | None = None
    ) -> list[HelperEvent]:
        """An agent did not answer. That counts only where none ever did, and after a while:
        ``after_s``, or the time of this ledger."""
        life = self._lives.get(key)
        if life is None or isinstance(life.told, NodeFound):
            return []
        if now_s - life.since_s < (self._refuse_s if after_s is None else after_s):
            return []
        event = NodeRefused(name=life.name, id=key, reason=reason, remedy=remedy)
        return self._tell(life, event)

    @property
    def settled(self) -> bool:
        """Whether every node that lives has been told of."""
        return self.listed and all(life.told is not None for life in self._lives.values())

    def _tell(self, life: _Life, event: NodeFound | NodeRefused) -> list[HelperEvent]:
        if event == life.told:
            return []
        life.told = event
        return [event]
