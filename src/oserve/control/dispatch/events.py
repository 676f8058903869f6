"""Events of the request machine. An event reports an observation; the machine decides.

``number`` identifies a request; numbers grow in order of arrival and are never reused. The machine
ignores events of a request that has ended, since they may arrive late.
"""

from enum import StrEnum
from typing import Protocol

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.core import FinishStatus, Request


class OutputForecast(Protocol):
    """Forecasts the output length of a request."""

    def beyond(self, made_tokens: int) -> float:
        """Expected total output tokens, given that ``made_tokens`` exist already."""
        ...


class Event(msgspec.Struct, frozen=True, tag=True):
    """One event."""


class Arrived(Event, frozen=True, kw_only=True):
    """A request arrived. ``request`` is ``None`` for auxiliary calls, which skip ledger and queue.

    ``rank_s`` orders waiting requests (``order.rank_s``). ``session`` and ``prefix`` are cache keys
    of the prompt, empty if it has none; the shared prefix has about ``prefix_tokens`` tokens.
    ``forecast``: of the output length, unless the client fixes that. ``tenant``: for fair
    shares; "" without. No more than ``max_queued`` requests of its ``owner`` may wait.
    """

    number: int
    request: Request | None
    rank_s: float = 0.0
    streams: bool = False
    session: str = ""
    prefix: str = ""
    prefix_tokens: int = 0
    forecast: OutputForecast | None = None
    tenant: str = ""
    owner: str = ""
    max_queued: int | None = None


class Began(Event, frozen=True):
    """The replica has begun to answer; the client has nothing yet."""

    number: int


class Streams(Event, frozen=True):
    """The first event of a stream arrived. ``well``: it is not an error."""

    number: int
    well: bool = True


class Shown(Event, frozen=True):
    """The client has part of a non-streaming answer."""

    number: int


class Progressed(Event, frozen=True):
    """A stream exceeds its credit; it has about so many output tokens."""

    number: int
    made_tokens: int


class Refused(Event, frozen=True, kw_only=True):
    """The replica answered with an error before the client had anything.

    ``aborted``: the engine aborted the request, which is not the request's fault.
    ``retry_after_s``: from the Retry-After header. ``reason`` is for logs.
    """

    number: int
    status: int
    reason: str
    aborted: bool = False
    retry_after_s: float = 0.0


class Lost(Event, frozen=True, kw_only=True):
    """The connection to the replica broke, or the replica sent an invalid answer.

    ``status``: of the answer's head, 0 without one. ``connected``: a connection existed.
    """

    number: int
    reason: str
    status: int = 0
    connected: bool = True


class Cause(StrEnum):
    """Why a stream that has reached the client leaves its replica."""

    LOST = "lost"
    FAILED = "failed"
    ABORTED = "aborted"
    DIVERGED = "diverged"
    HANDED_OVER = "handed_over"


class Rest(msgspec.Struct, frozen=True):
    """Where a stream resumes: its context (prompt and output so far) and its output, in tokens."""

    context_tokens: int
    made_tokens: int


class Broken(Event, frozen=True, kw_only=True):
    """A stream that has reached the client must leave. ``rest`` is ``None`` if it cannot migrate.

    ``with_cache``: its KV cache migrates, too. ``can_end``: the replica's stream holds an error,
    which the client may get instead. ``reason`` is for logs and the client.
    """

    number: int
    cause: Cause
    rest: Rest | None
    reason: str = ""
    with_cache: bool = False
    can_end: bool = False


class Reworded(Event, frozen=True):
    """The replica refused an option that OServe added; OServe sends the request without it."""

    number: int


class Finished(Event, frozen=True):
    """The client has the complete answer."""

    number: int
    status: FinishStatus = FinishStatus.COMPLETED


class ClientGone(Event, frozen=True):
    """The client closed its connection."""

    number: int


class Crashed(Event, frozen=True):
    """Executing a command for this request raised an exception."""

    number: int


class ChargedElsewhere(Event, frozen=True):
    """Device-seconds that other gateway processes charged anew, by tier and tenant."""

    charged_s: dict[tuple[str, str], float]


class Tick(Event, frozen=True):
    """``RequestMachine.due_s`` has passed."""


class TableChanged(Event, frozen=True):
    """A new routing table is in force."""

    table: RoutingTable


class LoadElsewhere(Event, frozen=True):
    """Work (prior seconds) and requests of other gateway processes, per replica.

    ``processes``: how many there are, this one included; 0: as the policy says.
    """

    loads: dict[str, tuple[float, int]]
    processes: int = 0


class Vacate(Event, frozen=True, kw_only=True):
    """Vacate a replica within so many seconds: its requests leave, and it gets no new ones.

    ``started_s``: only the engine started then; ``None``: the one that runs.
    """

    replica: str
    within_s: float
    started_s: float | None = None


class Progress(msgspec.Struct, frozen=True):
    """The progress of a request. ``tpot_s`` is 0 until it is measured."""

    made_tokens: int
    movable: bool
    tpot_s: float


class Surveyed(Event, frozen=True):
    """The progress of the requests at a vacated replica, by number."""

    replica: str
    started_s: float
    progress: dict[int, Progress]


class ShutDown(Event, frozen=True):
    """The gateway shuts down and aborts all running requests."""
