"""The protocol between a server and its Ray helper: JSON lines on the helper's standard streams.

The server starts the helper, so that both are of one version; the version in the first line of each
side tells if that is ever not so. The server sends ``HelperCommand``, ``HelperStart`` first; the
helper ``HelperEvent``, ``HelperReady`` or ``HelperFailure`` first. The end of its standard input
ends the helper.
"""

from typing import Annotated, Final

import msgspec

from oserve.core import Device
from oserve.nodes.agent_messages import AgentOrders, NodeReport

PROTOCOL_VERSION: Final = 1
"""Raised whenever a message changes in a way that the other side cannot read."""

MAX_LINE_BYTES: Final = 16 * 1024 * 1024

NAMESPACE_PREFIX: Final = "oserve-"
"""Ray namespaces of OServe's agents begin so; each deployment has one."""

_Seconds = Annotated[float, msgspec.Meta(gt=0)]


# -- from the server ------------------------------------------------------------------------------
class HelperStart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Connect to Ray.

    ``list_only``: answer with ``NodesOffered`` and end, without any agent.

    ``address``: ``HOST:PORT`` of its GCS; empty: RAY_ADDRESS, else the local one. ``namespace``: of
    the deployment's agents. ``orders``: for each node, whose name and host are filled in.
    ``poll_s``: between two looks at the nodes. ``tend_s``: between two calls of an agent.
    ``silence_s``: Ray counts as silent after so long without an answer. ``refuse_s``: a node counts
    as refused after so long without an agent.
    """

    address: str
    namespace: str
    orders: AgentOrders
    poll_s: _Seconds = 0.5
    tend_s: _Seconds = 5.0
    silence_s: _Seconds = 5.0
    refuse_s: _Seconds = 150.0
    list_only: bool = False
    version: int = PROTOCOL_VERSION


class HelperShutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the helper; with ``end_nodes`` first the agents, and all that their keepers hold."""

    end_nodes: bool


HelperCommand = HelperStart | HelperShutdown


# -- from the helper ------------------------------------------------------------------------------
class HelperReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Connected. ``ray``: its version."""

    ray: str
    version: int = PROTOCOL_VERSION


class NodeFound(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The agent of a node is up, or has changed what it reports.

    ``id``: Ray's for this life of the node. ``resources`` and ``labels``: as Ray knows them.
    """

    name: str
    id: str
    address: str
    resources: dict[str, float]
    labels: dict[str, str]
    report: NodeReport


class NodeRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node of the Ray cluster that cannot be used for now; it is tried again."""

    name: str
    id: str
    reason: str
    remedy: str


class NodeLost(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ray says that a node is dead, and why."""

    name: str
    id: str
    reason: str


class NodesSettled(msgspec.Struct, frozen=True, tag=True):
    """Every node that lives has been found or refused; sent once for each connection to Ray."""


class RaySilent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ray's head does not answer: deaths and new nodes are not told until ``RayBack``."""

    reason: str


class RayBack(msgspec.Struct, frozen=True, tag=True):
    """Ray's head answers again."""


class NodesOffered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The devices that Ray lists now, named ``NODE/gpu:0`` and so on; memory 0 where untold."""

    devices: tuple[Device, ...]


class HelperFailure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The helper ends. ``final``: the same would happen again."""

    reason: str
    remedy: str
    final: bool


HelperEvent = (
    HelperReady
    | NodeFound
    | NodeRefused
    | NodeLost
    | NodesSettled
    | RaySilent
    | RayBack
    | NodesOffered
    | HelperFailure
)

_COMMANDS: Final[msgspec.json.Decoder[HelperCommand]] = msgspec.json.Decoder(HelperCommand)
_EVENTS: Final[msgspec.json.Decoder[HelperEvent]] = msgspec.json.Decoder(HelperEvent)


def encoded(message: HelperCommand | HelperEvent) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def command_of(line: bytes) -> HelperCommand:
    """A server's message. Raises ``msgspec.DecodeError`` if this version cannot read it."""
    return _COMMANDS.decode(line)


def event_of(line: bytes) -> HelperEvent:
    """A helper's message. Raises ``msgspec.DecodeError`` if this version cannot read it."""
    return _EVENTS.decode(line)
