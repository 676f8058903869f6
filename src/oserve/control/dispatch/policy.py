"""The limits of the request machine, and the drain decision that it delegates."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.table import TableReplica

_NO_OVERLOAD = OverloadPolicy()
_FAIR = FairPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPolicy:
    """Limits and policies of one of the gateway's ``processes``.

    ``max_queued`` bounds the waiting requests, ``max_attempts`` the replicas tried for a request,
    and ``max_moves`` the migrations of a stream. ``no_replica_wait_s``: how long a request waits
    for a replica that is starting. ``overflow_s``: outstanding work of its pool past which a
    request may leave the pool. ``drain_limit_s``: how long a draining replica keeps requests that
    could migrate; ``None``: to their end. ``learns_speed``: false freezes the costs of the table.
    ``fair``: of shares between tenants.
    """

    max_queued: int = 4096
    max_attempts: int = 3
    max_moves: int = 3
    request_timeout_s: float = 600.0
    no_replica_wait_s: float = 30.0
    overflow_s: float = 2.0
    drain_limit_s: float | None = None
    overload: OverloadPolicy = _NO_OVERLOAD
    processes: int = 1
    learns_speed: bool = True
    fair: FairPolicy = _FAIR


class Exit(StrEnum):
    """How a running request leaves a vacated replica."""

    STAY = "stay"
    REPLAY = "replay"
    WITH_CACHE = "with_cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainCandidate:
    """A request at a vacated replica. Counts are in tokens, ``tpot_s`` in seconds."""

    replica: TableReplica
    context_tokens: int
    remaining_tokens: float
    movable: bool
    tpot_s: float


class DrainDecision(Protocol):
    """Decides for each running request, given the remaining replicas and the seconds left."""

    def __call__(
        self, running: Sequence[DrainCandidate], others: Sequence[TableReplica], left_s: float
    ) -> Sequence[Exit]: ...


def all_leave(
    running: Sequence[DrainCandidate], others: Sequence[TableReplica], left_s: float
) -> Sequence[Exit]:
    """All requests that can migrate do."""
    return [Exit.REPLAY if item.movable else Exit.STAY for item in running]
