"""A request in the machine: what is known of it, and the phase that it is in.

The phase is a union, so that what cannot be cannot be written: only a request at a replica has a
booking there, and only one that waits is in the queue.
"""

import msgspec

from oserve.control.dispatch.events import OutputForecast
from oserve.control.dispatch.ledger import WorkEntry
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus, Request

UNLIMITED_TOKENS = 1 << 60

ReplicaStart = tuple[str, float]
"""A replica's id and the time at which its engine started."""


class Booking(msgspec.Struct, frozen=True):
    """A request's slot at a replica. ``entry`` is ``None`` for auxiliary calls."""

    replica: TableReplica
    entry: WorkEntry | None

    @property
    def start(self) -> ReplicaStart:
        return self.replica.id, self.replica.started_s


class Queued(msgspec.Struct, frozen=True):
    """It waits for a replica; the client has nothing of an answer."""


class Resuming(msgspec.Struct, frozen=True):
    """The client has part of its stream, and it waits for a replica that goes on with it."""


class Sent(msgspec.Struct, frozen=True):
    """A replica has it, and has not begun to answer."""

    booking: Booking


class Held(msgspec.Struct, frozen=True):
    """A replica answers; all of that is held back, so that another replica may still be tried."""

    booking: Booking


class Streaming(msgspec.Struct, frozen=True):
    """The client has part of the answer, and a replica goes on with it.

    ``answering``: that replica has sent a part. It has not where it has just taken the stream over.
    """

    booking: Booking
    answering: bool = True


class Ended(msgspec.Struct, frozen=True):
    """It is over."""

    status: FinishStatus


Waiting = Queued | Resuming
Placed = Sent | Held | Streaming
Phase = Waiting | Placed | Ended

QUEUED = Queued()
RESUMING = Resuming()


class RequestState:
    """One request. ``request`` is what is asked now; of a resumed stream that is the rest."""

    __slots__ = (
        "arrival_s",
        "attempts",
        "booked_tokens",
        "demoted",
        "forecast",
        "give_up_s",
        "made_tokens",
        "moves",
        "number",
        "original",
        "phase",
        "prefix",
        "prefix_tokens",
        "rank_s",
        "replica",
        "request",
        "session",
        "streams",
        "tried",
    )

    def __init__(
        self,
        *,
        number: int,
        arrival_s: float,
        request: Request | None,
        rank_s: float,
        streams: bool,
        forecast: OutputForecast | None,
    ) -> None:
        self.number = number
        self.arrival_s = arrival_s
        self.original = self.request = request
        self.rank_s = rank_s
        self.streams = streams
        self.forecast = forecast
        self.session = ""
        self.prefix = ""
        self.prefix_tokens = 0
        self.phase: Phase = QUEUED
        # The replica that had it last, for its record.
        self.replica = ""
        self.tried: set[ReplicaStart] = set()
        self.attempts = 0
        self.moves = 0
        # Output tokens when it last left a replica, and those that it is booked to reach.
        self.made_tokens = 0
        self.booked_tokens = 0
        self.demoted = False
        # When it is refused if no replica has become ready by then.
        self.give_up_s: float | None = None

    @property
    def kind(self) -> str:
        """Its workload type, empty for auxiliary calls."""
        return self.request.workload_type if self.request is not None else ""

    @property
    def prompt_tokens(self) -> int:
        """Of what is asked now; 0 for auxiliary calls."""
        return self.request.prompt_tokens if self.request is not None else 0

    def remaining_tokens(self, made_tokens: int) -> float:
        """Output tokens still to come, at least one."""
        if self.forecast is not None:
            return max(1.0, self.forecast.beyond(made_tokens) - made_tokens)
        whole = self.original.output_tokens if self.original is not None else 1
        return max(1.0, float(whole - made_tokens))
