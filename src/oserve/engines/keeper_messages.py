"""The protocol between a server and a keeper: JSON lines over a Unix socket, or through a hatch.

A server sends ``KeeperCommand``, the keeper ``KeeperEvent``. Each line is one message, which its
``type`` tells apart. The keeper speaks first (``KeeperHello``). A connection becomes the server's
with ``ServerHello``, and replaces that of the previous server of the same state folder; another
server's is refused while the keeper has a server, or holds what one has left. Without
``ServerHello`` a connection is a guest's, such as that of a node's agent, and several may be open.
Every version reads two things alike: ``KeeperIdentity``, which is part of the greeting, and
``CloseKeeper``. With them a newer server recognises an older keeper and ends it. The keeper answers
a message of unknown type or form with ``MessageRejected``.
"""

from typing import Annotated, Final

import msgspec

from oserve.control.progress import Activity
from oserve.engines.registry import ProcessNote, RegistryEntry

PROTOCOL_VERSION: Final = 2
"""Raised whenever a message changes in a way that the other side cannot read."""

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
"""Of one message: the first line of a gateway process holds what earlier requests taught."""

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]


# -- from the server ------------------------------------------------------------------------------
class ServerHello(msgspec.Struct, frozen=True, kw_only=True, tag="Greet"):
    """The server has connected. ``grace_s``: how long the keeper waits for the next one.

    ``silence_s``: the connection counts as broken after so long without a message; 0: never.
    ``owner``: a word that only servers of the same state folder have; with it the keeper answers by
    ``ServerAccepted`` or ``ServerRefused``. ``title``: the server, for people. ``forks``: it will
    start engines by fork, so that the zygote should be up by then.
    """

    grace_s: _Seconds
    silence_s: _Seconds = 0.0
    owner: str = ""
    title: str = ""
    forks: bool = False


class EngineStart(msgspec.Struct, frozen=True, kw_only=True, tag="Start"):
    """Start an engine; see ``spawner.Launcher``.

    ``folder``: for its sockets; the keeper makes it, and removes it when the engine has ended. An
    earlier log at ``log`` is kept under another name. ``model``: the folder of the model's files,
    without which the start is refused; empty if it is none.
    """

    name: _Name
    argv: list[str]
    env: dict[str, str]
    cores: list[int]
    log: str
    folder: str = ""
    model: str = ""
    note: ProcessNote = None


class ProcessStart(msgspec.Struct, frozen=True, kw_only=True, tag="Hold"):
    """Start another process and write ``first_line`` to its standard input, which stays open.

    When the keeper ends, the process gets ``grace_s`` between TERM and KILL. ``stays``: it serves
    the node and not a server: it goes on without one, and so does the keeper.
    """

    name: _Name
    argv: list[str]
    first_line: str
    log: str
    grace_s: _Seconds
    stays: bool = False
    note: ProcessNote = None


class NoteUpdate(msgspec.Struct, frozen=True, kw_only=True, tag="Mark"):
    """Replace the note of a process."""

    name: _Name
    note: ProcessNote


class ProcessSignal(msgspec.Struct, frozen=True, kw_only=True, tag="Signal"):
    """Send a signal to a process; of an engine, to its whole group."""

    name: _Name
    number: int


class ActivityQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Look"):
    """Ask what the processes of an engine do; with ``log``, what its log says instead."""

    name: _Name
    log: bool = False


class Ping(msgspec.Struct, frozen=True, tag="Ping"):
    """Answered by ``Pong``."""


class EndProcesses(msgspec.Struct, frozen=True, tag="Clear"):
    """End every process at once but those that stay."""


class CloseKeeper(msgspec.Struct, frozen=True, tag="Close"):
    """End every process at once, then the keeper. Every version of the keeper reads this."""


KeeperCommand = (
    ServerHello
    | EngineStart
    | ProcessStart
    | NoteUpdate
    | ProcessSignal
    | ActivityQuery
    | Ping
    | EndProcesses
    | CloseKeeper
)


# -- from the keeper ------------------------------------------------------------------------------
class KeeperIdentity(msgspec.Struct, frozen=True, kw_only=True, tag="Hello"):
    """What every server can read of a keeper's greeting; ``version`` 0 names none.

    ``identity``: see ``holding.identity_of``.
    """

    identity: str
    pid: int
    version: int = 0


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A keeper's machine and environment.

    ``host``: its name. ``oserve`` and ``engine``: versions of OServe and vLLM, empty if not
    installed. ``boot``: see ``group.boot_id``. ``folder``: for sockets and folders of engines;
    ``logs``: for logs. ``python``: the interpreter that it runs. ``bf16``: whether its
    processor has instructions for that type. ``rdma``: whether it has InfiniBand or RoCE devices.
    """

    host: str = ""
    oserve: str = ""
    engine: str = ""
    boot: str = ""
    folder: str = ""
    logs: str = ""
    python: str = ""
    bf16: bool = False
    rdma: bool = False


class KeeperHello(msgspec.Struct, frozen=True, kw_only=True, tag="Hello"):
    """The keeper's first message, with all that it holds."""

    identity: str
    pid: int
    held: list[RegistryEntry]
    node: NodeFacts = NodeFacts()
    version: int = PROTOCOL_VERSION


class ProcessStarted(msgspec.Struct, frozen=True, kw_only=True, tag="Started"):
    """The process runs."""

    name: str
    pid: int


class StartRefused(msgspec.Struct, frozen=True, kw_only=True, tag="Refused"):
    """The process could not be started; nothing of it is left."""

    name: str
    reason: str


class ProcessExited(msgspec.Struct, frozen=True, kw_only=True, tag="Ended"):
    """No process of that name is left; a negative status is a signal.

    ``cause``: the line of its log that tells why (``logs.telling_line``).
    """

    name: str
    status: int
    cause: str = ""


class ActivityReport(msgspec.Struct, frozen=True, kw_only=True, tag="Activity"):
    """The answer to ``ActivityQuery``; ``activity`` is ``None`` if no process is left.

    ``cause``: see ``ProcessExited``; only if the query was for the log.
    """

    name: str
    log: bool = False
    activity: Activity | None = None
    cause: str = ""


class Pong(msgspec.Struct, frozen=True, tag="Pong"):
    """The answer to ``Ping``."""


class ServerAccepted(msgspec.Struct, frozen=True, tag="Accepted"):
    """The connection is the server's."""


class ServerRefused(msgspec.Struct, frozen=True, kw_only=True, tag="Taken"):
    """Another server has the keeper, or has left processes here; the connection ends.

    ``title``: that server, for people. ``grace_s``: how long they are held without it; 0 while it
    is connected.
    """

    title: str
    grace_s: _Seconds = 0.0


class ServerReplaced(msgspec.Struct, frozen=True, tag="Replaced"):
    """Another server has taken this one's place; the connection ends, and no process with it."""


class MessageRejected(msgspec.Struct, frozen=True, kw_only=True, tag="Rejected"):
    """The keeper could not read a message; ``name`` is that of the process, if it names one."""

    reason: str
    name: str = ""


ProcessEvent = ProcessStarted | StartRefused | ProcessExited | ActivityReport
KeeperEvent = (
    KeeperHello
    | ServerAccepted
    | ServerRefused
    | ProcessEvent
    | Pong
    | ServerReplaced
    | MessageRejected
)

_COMMANDS: Final[msgspec.json.Decoder[KeeperCommand]] = msgspec.json.Decoder(KeeperCommand)
_EVENTS: Final[msgspec.json.Decoder[KeeperEvent]] = msgspec.json.Decoder(KeeperEvent)
_IDENTITY: Final = msgspec.json.Decoder(KeeperIdentity)


class _Named(msgspec.Struct):
    name: str = ""


_NAMED_DECODER = msgspec.json.Decoder(_Named)


def encoded(message: KeeperCommand | KeeperEvent) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def command_of(line: bytes) -> KeeperCommand | MessageRejected:
    """A server's message, or the answer to one that this version cannot read."""
    try:
        return _COMMANDS.decode(line)
    except msgspec.DecodeError as error:
        reason = f"the keeper (protocol {PROTOCOL_VERSION}) cannot read a message: {error}"
        return MessageRejected(name=_name_in(line), reason=reason)


def event_of(line: bytes) -> KeeperEvent:
    """A keeper's message. Raises ``msgspec.DecodeError`` if this version cannot read it."""
    return _EVENTS.decode(line)


def identity_in(line: bytes) -> KeeperIdentity:
    """The keeper that greets. Raises ``msgspec.DecodeError`` if the line is no greeting."""
    return _IDENTITY.decode(line)


def _name_in(line: bytes) -> str:
    try:
        return _NAMED_DECODER.decode(line).name
    except msgspec.DecodeError:
        return ""
