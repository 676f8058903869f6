"""The state of a request in the machine: its facts and its phase.

The phase is a tagged union, so that invalid states cannot be represented: only a request at a
replica has a booking, and only a waiting request is in the queue.
"""

import msgspec

from oserve.control.dispatch.charge import Charge
from oserve.control.dispatch.events import OutputForecast
from oserve.control.dispatch.ledger import WorkEntry
from oserve.control.dispatch.table import TableReplica
from oserve.control.dispatch.tiers import REFUSED_LATE, due_of, urgency_s
from oserve.core import FinishStatus, Request, Tier

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
    """The request waits for a replica; the client has nothing yet."""


class Resuming(msgspec.Struct, frozen=True):
    """The client has part of the stream; the request waits for a replica that resumes it."""


class Sent(msgspec.Struct, frozen=True):
    """A replica has the request and has not begun to answer."""

    booking: Booking


class Held(msgspec.Struct, frozen=True):
    """A replica answers; the gateway holds the answer back, so that a retry stays possible."""

    booking: Booking


class Streaming(msgspec.Struct, frozen=True):
    """The client has part of the answer, and a replica generates the rest.

    ``answering``: this replica has sent a part; false just after it took the stream over.
    """

    booking: Booking
    answering: bool = True


class Ended(msgspec.Struct, frozen=True):
    """The request has ended."""

    status: FinishStatus


Waiting = Queued | Resuming
Placed = Sent | Held | Streaming
Phase = Waiting | Placed | Ended

QUEUED = Queued()
RESUMING = Resuming()


class RequestState:
    """One request. ``request``: the present demand; of a resumed stream, its remainder."""

    __slots__ = (
        "arrival_s",
        "attempts",
        "booked_tokens",
        "charge",
        "demoted",
        "due_s",
        "forecast",
        "give_up_s",
        "made_tokens",
        "max_queued",
        "moves",
        "number",
        "original",
        "owner",
        "phase",
        "prefix",
        "prefix_tokens",
        "promise",
        "rank_s",
        "replica",
        "request",
        "session",
        "streams",
        "tenant",
        "tried",
        "urgency_s",
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
        # Without keys there are no tenants, without fair shares only owners, for their limits.
        self.tenant = self.owner = ""
        self.max_queued = UNLIMITED_TOKENS
        # What fair shares charged it at its present replica.
        self.charge: Charge | None = None
        # The last replica, for the record.
        self.replica = ""
        self.tried: set[ReplicaStart] = set()
        self.attempts = 0
        self.moves = 0
        # Output tokens when it last left a replica, and the booked total.
        self.made_tokens = 0
        self.booked_tokens = 0
        self.demoted = False
        # Its limits. By its tier's own: seconds from arrival until its first token is due, and
        # whose turn it is; a client that tightens them goes no sooner.
        self.promise = request.promise if request is not None else None
        tokens = 0 if request is None else request.output_tokens
        self.due_s = due_of(self.promise, tokens)
        self.urgency_s = urgency_s(self.promise, self.due_s)
        # The deadline for a replica to become ready; then the request is refused.
        self.give_up_s: float | None = None

    @property
    def kind(self) -> str:
        """The workload type; empty for auxiliary calls."""
        return self.request.workload_type if self.request is not None else ""

    @property
    def tier(self) -> Tier | None:
        """The service tier; ``None`` without tiers."""
        return self.promise.tier if self.promise is not None else None

    @property
    def refused_late(self) -> bool:
        """Whether it is refused, not served last, once it can no longer be in time."""
        return self.promise is not None and self.promise.tier.overload in REFUSED_LATE

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the present demand; 0 for auxiliary calls."""
        return self.request.prompt_tokens if self.request is not None else 0

    def remaining_tokens(self, made_tokens: int) -> float:
        """Expected output tokens still to come, at least one."""
        if self.forecast is not None:
            return max(1.0, self.forecast.beyond(made_tokens) - made_tokens)
        whole = self.original.output_tokens if self.original is not None else 1
        return max(1.0, float(whole - made_tokens))
