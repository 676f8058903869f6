"""What the machine asks for. Commands are carried out in order; none of them decides anything."""

from enum import StrEnum

import msgspec

from oserve.control.dispatch.events import Cause
from oserve.control.dispatch.router import RouteReason
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus


class Command(msgspec.Struct, frozen=True, tag=True):
    """One command."""


class Send(Command, frozen=True, kw_only=True):
    """Send the request to a replica; ``resumes``: the continuation of its stream.

    ``reason`` and ``cached_tokens`` say why there; ``reason`` is ``None`` for auxiliary calls.
    """

    number: int
    replica: TableReplica
    reason: RouteReason | None = None
    cached_tokens: int = 0
    resumes: bool = False


class Hold(Command, frozen=True):
    """The request waits in the queue; nothing to carry out, but something to tell."""

    number: int


class Forward(Command, frozen=True):
    """Show the client what came and what follows, up to ``credit_tokens`` output tokens."""

    number: int
    credit_tokens: int


class LetGo(Command, frozen=True):
    """Drop the connection to the replica, whose answer is not wanted any more."""

    number: int


class Retry(Command, frozen=True):
    """As ``LetGo``, since that replica failed; a ``Send`` follows, now or later."""

    number: int
    replica: str
    reason: str


class Depart(Command, frozen=True):
    """Report the request as ``Broken``, handed over: it is to go on elsewhere."""

    number: int
    with_cache: bool


class Resume(Command, frozen=True):
    """The stream leaves its replica and goes on elsewhere; a ``Send`` follows, now or later."""

    number: int
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


class Refuse(Command, frozen=True, kw_only=True):
    """Answer with an error, in whatever form is still possible.

    ``status``: that of the replica's answer, for ``REFUSED_UNHEARD``.
    """

    number: int
    refusal: Refusal
    replica: str = ""
    reason: str = ""
    status: int = 0
    retry_after_s: int = 0


class Demote(Command, frozen=True):
    """The request cannot have its first token in time any more and is served last; only told."""

    number: int


class Record(Command, frozen=True, kw_only=True):
    """The request has ended: count it, learn from it, keep its row."""

    number: int
    status: FinishStatus
    replica: str
    moves: int
