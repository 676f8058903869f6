"""Which replica serves a request: soft pools from routing shares, live load decides inside.

The plan's shares say which replicas suit a workload type; those form its pool. Within the pool the
replica with the least expected work wins, in seconds and not in requests. When even that one is
further from idle than the overflow threshold and a replica outside the pool would be sooner done,
the request goes there. Shares are never followed blindly: under live load fixed shares are unsafe.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import StrEnum

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
        fitting = _fitting(
            request, [load for load in loads.values() if load.replica not in exclude]
        )
        if not fitting:
            return Refusal.NO_REPLICA
        shares = self._shares.get(request.workload_type, {})
        best_in = best_out = None
        for load in fitting:
            if load.inflight >= load.max_inflight:
                continue
            share = shares.get(load.replica, 0.0)
            own_s = work_s(request, load)
            # Rounding lets the larger share, then the name, decide between equals.
            candidate = (round(load.work_s + own_s, 4), -share, load.replica, load.work_s, own_s)
            if share > 0.0:
                best_in = candidate if best_in is None else min(best_in, candidate)
            else:
                best_out = candidate if best_out is None else min(best_out, candidate)
        if best_in is not None:
            late = best_in[3] > self._overflow_s
            if late and best_out is not None and best_out[0] < best_in[0]:
                return Route(replica=best_out[2], reason=RouteReason.OVERFLOW, work_s=best_out[4])
            return Route(replica=best_in[2], reason=RouteReason.POOL, work_s=best_in[4])
        if best_out is None:
            return Refusal.ALL_FULL
        reason = RouteReason.POOL_UNAVAILABLE
        if any(shares.get(load.replica, 0.0) > 0.0 for load in fitting):
            reason = RouteReason.OVERFLOW
        return Route(replica=best_out[2], reason=reason, work_s=best_out[4])


def work_s(request: Request, load: ReplicaLoad) -> float:
    """Engine seconds that ``request`` is expected to occupy on that replica."""
    return (
        request.prompt_tokens * load.prefill_s_per_token
        + request.output_tokens * load.decode_s_per_token
    )


def _fitting(request: Request, loads: list[ReplicaLoad]) -> list[ReplicaLoad]:
    """Replicas whose context holds the request; if none does, those with the longest context.

    The length is an estimate, so the engine, which counts, has the last word on what is too long.
    """
    needed = request.prompt_tokens + 1
    fitting = [load for load in loads if load.max_model_len == 0 or load.max_model_len >= needed]
    if fitting or not loads:
        return fitting
    longest = max(load.max_model_len for load in loads)
    return [load for load in loads if load.max_model_len == longest]
