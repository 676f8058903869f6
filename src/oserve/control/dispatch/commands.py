"""What the machine asks for. Commands are carried out in order; none of them decides anything."""

from enum import StrEnum

import msgspec

from oserve.control.dispatch.events import Cause
from oserve.control.dispatch.router import RouteReason
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus


class Command(msgspec.Struct, frozen=True, tag=True):
    """One command."""


class RequestCommand(Command, frozen=True):
    """One that is about a request."""

    number: int


class Send(RequestCommand, frozen=True, kw_only=True):
    """Send the request to a replica; ``resumes``: the continuation of its stream.

    ``rank_s`` orders it among those at the replica. ``reason`` and ``cached_tokens`` say why there;
    ``reason`` is ``None`` for auxiliary calls.
    """

    replica: TableReplica
    rank_s: float = 0.0
    reason: RouteReason | None = None
    cached_tokens: int = 0
    resumes: bool = False


class Hold(RequestCommand, frozen=True):
    """The request waits in the queue; nothing to carry out, but something to tell."""


class Forward(RequestCommand, frozen=True):
    """Show the client what came and what follows, up to ``credit_tokens`` output tokens.

    ``outgrown``: the answer is longer than was expected.
    """

    credit_tokens: int
    outgrown: bool = False


class ShowError(RequestCommand, frozen=True):
    """Show the client the error that its stream's replica tells, and what follows."""


class LetGo(RequestCommand, frozen=True):
    """Drop the connection to the replica, whose answer is not wanted any more."""


class Retry(RequestCommand, frozen=True):
    """As ``LetGo``, since that replica failed; a ``Send`` follows, now or later."""

    replica: str
    reason: str


class Depart(RequestCommand, frozen=True):
    """Report the request as ``Broken``, handed over: it is to go on elsewhere."""

    with_cache: bool


class Resume(RequestCommand, frozen=True):
    """The stream leaves its replica and goes on elsewhere; a ``Send`` follows, now or later."""

    cause: Cause
    replica: str
    with_cache: bool
    reason: str = ""


class Survey(Command, frozen=True):
    """Report the progress of these requests as ``Surveyed``."""

    replica: str
    started_s: float
    numbers: tuple[int, ...]


class Refusal(StrEnum):
    """Why a request is refused or ends with an error."""

    NO_REPLICA = "no_replica"
    NONE_READY_IN_TIME = "none_ready_in_time"
    QUEUE_FULL = "queue_full"
    SHED = "shed"
    REPLICA_FAILED = "replica_failed"
    REFUSED_UNHEARD = "refused_unheard"
    DEADLINE = "deadline"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class Refuse(RequestCommand, frozen=True, kw_only=True):
    """Answer with an error, in whatever form is still possible.

    ``status``: that of the replica's answer, for ``REFUSED_UNHEARD``.
    """

    refusal: Refusal
    replica: str = ""
    reason: str = ""
    status: int = 0
    retry_after_s: int = 0


class Demote(RequestCommand, frozen=True):
    """The request cannot have its first token in time any more and is served last; only told."""


class Record(RequestCommand, frozen=True, kw_only=True):
    """The request has ended: count it, learn from it, keep its row."""

    status: FinishStatus
    replica: str
    moves: int
