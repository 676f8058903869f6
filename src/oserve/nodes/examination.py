"""What the examination of a node asks and tells: facts, without addresses, tokens or user names.

Lines are JSON, over a socket behind the node's hatch; see ``examiner``.
"""

from typing import Annotated, Final

import msgspec

from oserve.core import HatchAddress

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
MAX_NODES: Final = 1024

MAX_FILES: Final = 2000
FILE_NAMES: Final = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}"
"""Names of files: no slash, so that none leads out of its folder, and none that is hidden."""

# Not "$", which a newline may follow.
FileName = Annotated[str, msgspec.Meta(pattern=rf"^{FILE_NAMES}\Z")]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=30)]


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. ``mig``: it is divided into instances. ``strangers``: names of programs that use it
    and are not OServe's."""

    name: str
    kind: str = ""
    memory_bytes: int = 0
    used_bytes: int = 0
    mig: bool = False
    strangers: tuple[str, ...] = ()


class InterfaceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface that is up. ``speed_mbps``: as its driver tells; 0: it does not."""

    name: str
    mtu: int = 0
    speed_mbps: int = 0


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the model. ``digest``: of its content and size; of the content of a large file only
    samples are read, if ``sampled``."""

    name: FileName
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    digest: str
    sampled: bool = False


ModelFiles = Annotated[tuple[ModelFile, ...], msgspec.Meta(max_length=MAX_FILES)]


class ModelFilesFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The files of the model on a node; none if it is not there. ``error``: why it is unread."""

    files: ModelFiles = ()
    error: str = ""


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One machine. Versions are empty, and sizes 0, of what is not there or does not tell.

    ``open_files``: the limit that a process can raise its own to. ``model`` is ``None`` if no model
    was named.
    """

    oserve: str = ""
    python: str = ""
    engine: str = ""
    driver: str = ""
    cores: int = 0
    memory_bytes: int = 0
    free_bytes: int = 0
    shared_memory_bytes: int = 0
    open_files: int = 0
    gpus: tuple[GpuFacts, ...] = ()
    interfaces: tuple[InterfaceFacts, ...] = ()
    model: ModelFilesFacts | None = None


class LinkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one node measured of its way to the hatch of another.

    ``round_trip_s``: the median of a small message, through TLS. ``bytes_per_s``: of what the other
    echoed: the same bytes go both ways, and TLS takes its part. 0: not measured. ``error``: the
    other could not be reached.
    """

    target: str
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""


class ClockFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How far a node's clock is ahead of this machine's; it is right within ``within_s``."""

    ahead_s: float
    within_s: float


class NodeExamination(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found of a node. ``unreached``: why nothing was; ``remedy``: what to do then.

    ``devices``: that it offers. ``engines``: that run there.
    """

    node: str
    machine: MachineFacts | None = None
    clock: ClockFacts | None = None
    links: tuple[LinkFacts, ...] = ()
    devices: int = 0
    engines: int = 0
    unreached: str = ""
    remedy: str = ""


# -- to the examiner of a node --------------------------------------------------------------------
class FactsQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Facts"):
    """Ask for ``MachineFacts``; ``model``: its folder or Hugging Face id, or empty."""

    model: str = ""


class TimeQuery(msgspec.Struct, frozen=True, tag="Time"):
    """Ask for ``TimeReply``."""


class LinkQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Link"):
    """Ask for ``LinkFacts`` of the way to another node; without ``bandwidth`` of its delay only."""

    target: str
    address: HatchAddress
    bandwidth: bool = True
    limit_s: _Seconds = 1.0


class TimeReply(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the epoch."""

    unix_s: float


class ExaminerOrders(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on an examiner's standard input: where it listens; it ends after so long.

    ``nice``: by how much less urgent it is than what serves.
    """

    socket: str
    limit_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 0
