"""Which replica serves a request: soft pools from routing shares, live load decides inside.

The plan's shares say which replicas suit a workload type; those form its pool. Within the pool the
replica with the least expected work wins, in seconds and not in requests. When even that one is
further from idle than the overflow threshold and a replica outside the pool would be sooner done,
the request goes there. Shares are never followed blindly: under live load fixed shares are unsafe.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import StrEnum

from oserve.control.pick import ALL_FULL, NO_REPLICA, OVERFLOW, POOL, POOL_UNAVAILABLE, pick
from oserve.core import ReplicaLoad, Request


class RouteReason(StrEnum):
    """Why a request went where it went."""

    POOL = "pool"
    OVERFLOW = "overflow"
    POOL_UNAVAILABLE = "pool_unavailable"


class Refusal(StrEnum):
    """Why no replica can take a request now."""

    NO_REPLICA = "no_replica"
    ALL_FULL = "all_full"


_NO_SHARES: Mapping[str, float] = {}
_REASONS = {
    POOL: RouteReason.POOL,
    OVERFLOW: RouteReason.OVERFLOW,
    POOL_UNAVAILABLE: RouteReason.POOL_UNAVAILABLE,
}
_REFUSALS = {NO_REPLICA: Refusal.NO_REPLICA, ALL_FULL: Refusal.ALL_FULL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The pick; ``work_s`` is what the request adds to the replica's expected work."""

    replica: str
    reason: RouteReason
    work_s: float


class Router:
    """Pure: the same request and loads give the same pick."""

    def __init__(
        self, routing_shares: Mapping[str, Mapping[str, float]], *, overflow_s: float = 2.0
    ) -> None:
        self._shares = routing_shares
        self._overflow_s = overflow_s

    def pick(
        self,
        request: Request,
        loads: Mapping[str, ReplicaLoad],
        *,
        exclude: Set[str] = frozenset(),
    ) -> Route | Refusal:
        """Choose among ``loads`` (replicas that may take requests), leaving out ``exclude``."""
        # By name, which so decides between equals.
        allowed = sorted(name for name in loads if name not in exclude)
        if not allowed:
            return Refusal.NO_REPLICA
        given = [loads[name] for name in allowed]
        shares = self._shares.get(request.workload_type, _NO_SHARES)
        own_s = [work_s(request, load) for load in given]
        index, code = pick(
            [shares.get(name, 0.0) for name in allowed],
            [load.work_s for load in given],
            own_s,
            [load.inflight for load in given],
            [load.max_inflight for load in given],
            _fitting(request, given),
            self._overflow_s,
            replicas=len(given),
            row=0,
        )
        if index < 0:
            return _REFUSALS[code]
        return Route(replica=allowed[index], reason=_REASONS[code], work_s=own_s[index])


def work_s(request: Request, load: ReplicaLoad) -> float:
    """Engine seconds that ``request`` is expected to occupy on that replica."""
    return (
        request.prompt_tokens * load.prefill_s_per_token
        + request.output_tokens * load.decode_s_per_token
    )


def _fitting(request: Request, loads: list[ReplicaLoad]) -> list[bool]:
    """Replicas whose context holds the request; if none does, those with the longest context.

    The length is an estimate, so the engine, which counts, has the last word on what is too long.
    """
    needed = request.prompt_tokens + 1
    fits = [load.max_model_len == 0 or load.max_model_len >= needed for load in loads]
    if any(fits):
        return fits
    longest = max(load.max_model_len for load in loads)
    return [load.max_model_len == longest for load in loads]
