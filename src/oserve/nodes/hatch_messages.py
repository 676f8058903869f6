"""What a hatch is told and tells: its configuration, its published address, its control lines.

Control lines are JSON, one message a line, at the name ``hatch-control`` behind the hatch itself.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec

from oserve.core import HatchAddress, OServeError
from oserve.wire.hatch import ANSWER_LIMIT_S, CONTROL_NAME, HatchError, open_hatch

PROTOCOL_VERSION: Final = 1
"""Raised whenever a control message changes in a way that the other side cannot read."""

ADDRESS_FILE: Final = "hatch.json"
PEERS_FILE: Final = "hatch-peers.json"
NODE_NAMES: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Names of nodes. No slash or space, which end a name in the lines between ranks and hatches."""

_MAX_CONTROL_BYTES: Final = 4 * 1024 * 1024
# Not "$", which a newline may follow.
_NodeName = Annotated[str, msgspec.Meta(pattern=rf"^{NODE_NAMES}\Z")]


@dataclass(frozen=True, slots=True, kw_only=True)
class HatchIdentity:
    """What makes a hatch itself: certificate and private key (PEM), and the token of the run."""

    certificate: str = field(repr=False)
    key: str = field(repr=False)
    token: str = field(repr=False)


class HatchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one hatch.

    ``connections``: open at once. ``bulk_connections``: of those, streams of weights, each with a
    thread. ``greetings``: connections at once that have not proved the token; beyond that the
    oldest is cut off. ``refusals_per_s``: of one address; beyond that it is not heard at all.
    """

    connections: Annotated[int, msgspec.Meta(ge=1)] = 8192
    bulk_connections: Annotated[int, msgspec.Meta(ge=1)] = 256
    greetings: Annotated[int, msgspec.Meta(ge=1)] = 512
    refusals_per_s: Annotated[int, msgspec.Meta(ge=1)] = 50
    answer_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0


class HatchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on the standard input of a hatch process.

    ``folder``: where the sockets of the node lie, of mode 0700; the hatch puts its address and the
    socket ``out.sock`` there. ``host``, ``port``: where it listens; 0: any free port. Without an
    ``identity`` it makes its own.
    """

    node: _NodeName
    folder: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    identity: HatchIdentity | None = None
    limits: HatchLimits = HatchLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedHatch:
    """The file ``hatch.json`` in a hatch's folder: how to reach it from this or another node."""

    pid: int
    port: int
    certificate: str = field(repr=False)
    token: str = field(repr=False)

    def address(self, host: str) -> HatchAddress:
        """Its address, given that of its node."""
        return HatchAddress(
            host=host, port=self.port, certificate=self.certificate, token=self.token
        )


_PUBLISHED_HATCH_DECODER = msgspec.json.Decoder(PublishedHatch)


def read_published(folder: Path) -> PublishedHatch | None:
    """The hatch whose folder this is; ``None`` if it does not listen yet."""
    try:
        return _PUBLISHED_HATCH_DECODER.decode((folder / ADDRESS_FILE).read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


# -- control --------------------------------------------------------------------------------------
class PeersUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="Peers"):
    """All other nodes, by name. The hatch forgets those that are not among them."""

    peers: dict[_NodeName, HatchAddress]
    version: int = PROTOCOL_VERSION


class ReportQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Report"):
    """Ask for the counts."""

    version: int = PROTOCOL_VERSION


class HatchReport(msgspec.Struct, frozen=True, kw_only=True, tag="Counts"):
    """Counts since the hatch started.

    ``open``: connections now. ``refused``: connections by reason. ``sent_bytes``,
    ``received_bytes``: bulk that ranks of this node exchanged with each other node, over
    connections that they opened.
    """

    node: str
    open: int = 0
    accepted: int = 0
    refused: dict[str, int] = {}
    sent_bytes: dict[str, int] = {}
    received_bytes: dict[str, int] = {}


class ControlDone(msgspec.Struct, frozen=True, kw_only=True, tag="Done"):
    """The command has been carried out."""


class ControlRejected(msgspec.Struct, frozen=True, kw_only=True, tag="Rejected"):
    """The line is of unknown type or form."""

    reason: str


ControlCommand = PeersUpdate | ReportQuery
ControlReply = HatchReport | ControlDone | ControlRejected
CONTROL_COMMANDS: msgspec.json.Decoder[ControlCommand] = msgspec.json.Decoder(ControlCommand)
_REPLIES: msgspec.json.Decoder[ControlReply] = msgspec.json.Decoder(ControlReply)


async def ask_hatch(
    address: HatchAddress, command: ControlCommand, *, timeout_s: float = ANSWER_LIMIT_S
) -> ControlReply:
    """Send a hatch one control line; its reply. Raises HatchError."""
    reader, writer = await open_hatch(
        address, CONTROL_NAME, limit=_MAX_CONTROL_BYTES, timeout_s=timeout_s
    )
    try:
        writer.write(msgspec.json.encode(command) + b"\n")
        async with asyncio.timeout(timeout_s):
            return _REPLIES.decode(await reader.readline())
    except (OSError, ValueError) as error:  # ValueError: of msgspec, or a line that is too long
        raise HatchError(f"the node's hatch did not answer: {error or 'it broke off'}") from None
    finally:
        writer.close()


async def tell_peers(
    address: HatchAddress, peers: dict[str, HatchAddress], *, timeout_s: float = ANSWER_LIMIT_S
) -> None:
    """Tell a hatch of all other nodes. Raises HatchError, or OServeError if it cannot read it."""
    match await ask_hatch(address, PeersUpdate(peers=peers), timeout_s=timeout_s):
        case ControlDone():
            return
        case other:
            raise OServeError(
                f"a node's hatch did not take the list of nodes: {getattr(other, 'reason', '')}",
                place="hatch",
                remedy="run the same version of OServe on every node",
            )
