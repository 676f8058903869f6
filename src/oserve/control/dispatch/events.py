"""What can happen to requests. An event says what was seen; the machine decides what follows.

``number`` names a request; numbers grow in the order of arrival and are never used again. Events
about a request that has ended are ignored: the world may tell of it late.
"""

from enum import StrEnum
from typing import Protocol

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.core import FinishStatus, Request


class OutputForecast(Protocol):
    """What is expected of an answer's length."""

    def beyond(self, made_tokens: int) -> float:
        """Expected output tokens in all, given that there are so many already."""
        ...


class Event(msgspec.Struct, frozen=True, tag=True):
    """One event."""


class Arrived(Event, frozen=True, kw_only=True):
    """A request came. ``request`` is ``None`` for auxiliary calls, which are not booked or queued.

    ``rank_s`` orders it among waiting requests (``order.rank_s``). ``session`` and ``prefix`` are
    keys of what replicas may have cached of its prompt, empty where there is none; the shared
    prefix has about ``prefix_tokens``. ``forecast``: where the client does not fix the length.
    """

    number: int
    request: Request | None
    rank_s: float = 0.0
    streams: bool = False
    session: str = ""
    prefix: str = ""
    prefix_tokens: int = 0
    forecast: OutputForecast | None = None


class Began(Event, frozen=True):
    """Its replica has begun an answer, of which the client has nothing yet."""

    number: int


class Streams(Event, frozen=True):
    """The first tokens of a stream came. ``well``: it does not tell an error."""

    number: int
    well: bool = True


class Shown(Event, frozen=True):
    """The client has part of an answer that is no stream of events."""

    number: int


class Progressed(Event, frozen=True):
    """A stream has about so many output tokens, more than its credit."""

    number: int
    made_tokens: int


class Refused(Event, frozen=True, kw_only=True):
    """The replica answered with an error before the client had anything.

    ``aborted``: its engine gave the request up, which says nothing against the request.
    ``retry_after_s``: what the answer asked for. ``reason`` is for logs.
    """

    number: int
    status: int
    reason: str
    aborted: bool = False
    retry_after_s: float = 0.0


class Lost(Event, frozen=True, kw_only=True):
    """The connection to the replica broke, or what it sent made no sense.

    ``status``: of the answer's head, 0 if none came. ``connected``: there was a connection.
    """

    number: int
    reason: str
    status: int = 0
    connected: bool = True


class Cause(StrEnum):
    """Why a stream that the client has part of leaves its replica."""

    LOST = "lost"
    FAILED = "failed"
    ABORTED = "aborted"
    DIVERGED = "diverged"
    HANDED_OVER = "handed_over"


class Rest(msgspec.Struct, frozen=True):
    """What a stream goes on with: its context (prompt and output so far), its output so far."""

    context_tokens: int
    made_tokens: int


class Broken(Event, frozen=True, kw_only=True):
    """A stream that the client has part of cannot stay. ``rest`` is ``None`` if it cannot move.

    ``with_cache``: its KV cache goes with it. ``can_end``: the replica itself tells an error, which
    the client may be shown instead. ``reason`` is for logs and the client.
    """

    number: int
    cause: Cause
    rest: Rest | None
    reason: str = ""
    with_cache: bool = False
    can_end: bool = False


class Reworded(Event, frozen=True):
    """The replica refused an option of ours; the request is to be asked again without it."""

    number: int


class Finished(Event, frozen=True):
    """The answer is over and the client has all of it."""

    number: int
    status: FinishStatus = FinishStatus.COMPLETED


class ClientGone(Event, frozen=True):
    """The client closed its connection."""

    number: int


class Crashed(Event, frozen=True):
    """Carrying out a command for this request raised."""

    number: int


class Tick(Event, frozen=True):
    """Time has passed: ``RequestMachine.due_s`` is over."""


class TableChanged(Event, frozen=True):
    """Another routing table is in force."""

    table: RoutingTable


class LoadElsewhere(Event, frozen=True):
    """Work (prior seconds) and requests of other gateway processes, per replica."""

    loads: dict[str, tuple[float, int]]


class Vacate(Event, frozen=True, kw_only=True):
    """A replica is to give up its running requests within so many seconds, and gets no new ones.

    ``started_s``: that start of it only; ``None``: the one that runs.
    """

    replica: str
    within_s: float
    started_s: float | None = None


class Progress(msgspec.Struct, frozen=True):
    """How far a request has come. ``tpot_s`` is 0 where it has not been seen."""

    made_tokens: int
    movable: bool
    tpot_s: float


class Surveyed(Event, frozen=True):
    """Progress of the requests at a replica that is vacated, by number."""

    replica: str
    started_s: float
    progress: dict[int, Progress]


class ShutDown(Event, frozen=True):
    """The gateway ends: whatever still runs is broken off."""
