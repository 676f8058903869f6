"""The nodes of a cluster: what is seen of them, and the state that follows."""

from dataclasses import dataclass
from enum import StrEnum


class NodePhase(StrEnum):
    """The state of a node.

    ``silent``: it serves, but nothing new starts there. ``lost``: its replicas have left routing.
    ``fetching``: it waits for the model's files, and no plan uses it before it has them.
    ``held_down``: it is back, and must stay so for a while before it is used. ``cordoned`` and
    ``draining`` are an operator's words: nothing new starts there; a draining node is emptied.
    """

    UP = "up"
    SILENT = "silent"
    LOST = "lost"
    HELD_DOWN = "held_down"
    FETCHING = "fetching"
    CORDONED = "cordoned"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSighting:
    """What a cluster sees of one node.

    ``silent_s``: seconds since the last sign of life. ``dead``: who says that the node is gone, and
    why; empty while nobody does. ``lacks``: what it must get before it is used, in words; empty if
    nothing, ``None`` while that is not known: then nothing new starts there.
    """

    name: str
    silent_s: float = 0.0
    dead: str = ""
    lacks: str | None = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """The state of one node, as ``control.nodes`` judges it.

    ``since_s``: when the phase began; ``until_s``: when a hold-down ends, 0 without one.
    ``losses``: how often it was lost of late. ``word``: the operator's, ``cordoned`` or
    ``draining``, also while the node is lost; empty without one. ``startable``: replicas may start
    there now. ``usable``: plans may use its devices. ``reachable``: its replicas may serve.
    """

    name: str
    phase: NodePhase = NodePhase.UP
    since_s: float = 0.0
    until_s: float = 0.0
    silent_s: float = 0.0
    losses: int = 0
    word: str = ""
    reason: str = ""
    startable: bool = True
    usable: bool = True
    reachable: bool = True
