"""What a node's agent is told, and what it answers: JSON, the same through Ray and without it."""

from typing import Annotated, Final

import msgspec

from oserve import __version__
from oserve.core import Device, HatchAddress
from oserve.engines.keeper_messages import NodeFacts
from oserve.nodes.hatch_messages import NODE_NAMES

HATCH_PROCESS: Final = "hatch"
"""The name of the hatch among the processes of a node's keeper."""


class AgentOrders(msgspec.Struct, frozen=True, kw_only=True):
    """How a node is to be set up.

    ``node``: its name. ``host``: the address where its hatch listens, at ``port`` (0: any free
    one). ``state_dir``: the folder for the state of all nodes of this deployment on that machine;
    ``~`` is the user's there. ``method``: how engines start (``auto``, ``zygote`` or
    ``spawn``). ``grace_s``: how long engines are held without a server. ``devices``, ``cpu_slots``:
    see ``devices.find_devices``. ``gpus``, ``slots``: how many Ray offers there, which then count;
    ``None`` without Ray. ``version``: of OServe; ``engine``: of vLLM, empty for any.
    """

    node: Annotated[str, msgspec.Meta(pattern=rf"^{NODE_NAMES}\Z")]
    host: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    state_dir: str = "~/.oserve/nodes"
    method: Annotated[str, msgspec.Meta(pattern="^(auto|zygote|spawn)$")] = "auto"
    grace_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    devices: Annotated[str, msgspec.Meta(pattern="^(auto|cpu|gpu)$")] = "auto"
    cpu_slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    gpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    slots: Annotated[int, msgspec.Meta(ge=0, le=1024)] | None = None
    version: str = __version__
    engine: str = ""


class HatchNote(msgspec.Struct, frozen=True, kw_only=True):
    """What the keeper stores with the hatch: what servers without Ray read of a node.

    ``host``, ``port``: as ordered. ``devices``: by their names on that machine.
    """

    node: str
    host: str
    port: int
    devices: tuple[Device, ...]


class NodeReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node is up. ``devices``: by their names on that machine."""

    node: str
    hatch: HatchAddress
    devices: tuple[Device, ...]
    facts: NodeFacts


class NodeRefusal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node cannot be used. ``version``: of the agent's OServe."""

    node: str
    reason: str
    remedy: str
    version: str = __version__


AgentAnswer = NodeReport | NodeRefusal

_ORDERS: Final = msgspec.json.Decoder(AgentOrders)
_ANSWERS: Final[msgspec.json.Decoder[AgentAnswer]] = msgspec.json.Decoder(AgentAnswer)


def orders_of(text: bytes) -> AgentOrders:
    """Raises ``msgspec.DecodeError`` if this version cannot read them."""
    return _ORDERS.decode(text)


def answer_of(text: bytes) -> AgentAnswer:
    """Raises ``msgspec.DecodeError`` if this version cannot read it."""
    return _ANSWERS.decode(text)
