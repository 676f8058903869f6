"""Commands of the request machine. The gateway executes them in order and decides nothing."""

from enum import StrEnum

import msgspec

from oserve.control.dispatch.charge import Charge
from oserve.control.dispatch.events import Cause
from oserve.control.dispatch.router import RouteReason
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus


class Command(msgspec.Struct, frozen=True, tag=True):
    """One command."""


class RequestCommand(Command, frozen=True):
    """A command for one request."""

    number: int


class Send(RequestCommand, frozen=True, kw_only=True):
    """Send the request to a replica; ``resumes``: as the continuation of its stream.

    ``rank_s`` orders requests in the engine's queue. ``reason`` and ``cached_tokens`` explain the
    choice of the replica; ``reason`` is ``None`` for auxiliary calls.
    """

    replica: TableReplica
    rank_s: float = 0.0
    reason: RouteReason | None = None
    cached_tokens: int = 0
    resumes: bool = False


class Hold(RequestCommand, frozen=True):
    """The request waits in the queue. For information only."""


class Forward(RequestCommand, frozen=True):
    """Forward the held and the following output to the client, up to ``credit_tokens`` tokens.

    ``outgrown``: the answer is longer than expected.
    """

    credit_tokens: int
    outgrown: bool = False


class ShowError(RequestCommand, frozen=True):
    """Forward the error in the replica's stream, and what follows it, to the client."""


class LetGo(RequestCommand, frozen=True):
    """Close the connection to the replica, whose answer is no longer needed."""


class Retry(RequestCommand, frozen=True):
    """Close the connection to a replica that failed; a ``Send`` follows, now or later."""

    replica: str
    reason: str


class Depart(RequestCommand, frozen=True):
    """Report the request as ``Broken`` with its progress, so that it migrates."""

    with_cache: bool


class Resume(RequestCommand, frozen=True):
    """Detach the stream from its replica; a ``Send`` resumes it on another one, now or later."""

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
    PROMISE = "promise"
    REPLICA_FAILED = "replica_failed"
    REFUSED_WITHOUT_BODY = "refused_without_body"
    DEADLINE = "deadline"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


REJECTIONS = frozenset(
    {
        Refusal.NO_REPLICA,
        Refusal.NONE_READY_IN_TIME,
        Refusal.QUEUE_FULL,
        Refusal.PROMISE,
        Refusal.SHED,
        Refusal.SHUTTING_DOWN,
    }
)
"""Refusals of requests that no replica had."""


class Refuse(RequestCommand, frozen=True, kw_only=True):
    """End the request with an error response, or with an error event if its stream has begun.

    ``status``: the replica's HTTP status, for ``REFUSED_WITHOUT_BODY``. ``reason`` of ``PROMISE``:
    the expected time to first token and the limit.
    """

    refusal: Refusal
    replica: str = ""
    reason: str = ""
    status: int = 0
    retry_after_s: int = 0


class Demote(RequestCommand, frozen=True):
    """The request has missed its deadline for the first token and is served last.

    For information only.
    """


class Record(RequestCommand, frozen=True, kw_only=True):
    """The request has ended: count it, update the estimators, write its record.

    ``charge``: report it as ``Spent``. ``made_tokens``: output at earlier replicas.
    """

    status: FinishStatus
    replica: str
    moves: int
    charge: Charge | None = None
    made_tokens: int = 0
