"""The router: soft pools from routing shares; the live load decides within a pool.

Replicas with a routing share of a workload type form its soft pool. The replica of the pool with
the least expected work, in seconds, wins. If even that exceeds the overflow threshold, and a
replica outside the pool would complete the request sooner, the request overflows to it. Fixed
shares alone would be unsafe, since the live load differs from the planned one.

If the type of a request depends on its output, the router mixes the shares of the types by their
probabilities. A cached prefix reduces the cost of the request at that replica.
"""

from collections.abc import Mapping, Sequence, Set
from enum import StrEnum

import msgspec

from oserve.control.dispatch.pick import (
    ALL_FULL,
    NO_REPLICA,
    OVERFLOW,
    POOL,
    POOL_UNAVAILABLE,
    pick,
)
from oserve.core import ReplicaLoad, Request


class RouteReason(StrEnum):
    """Why the router chose a replica."""

    POOL = "pool"
    OVERFLOW = "overflow"
    POOL_UNAVAILABLE = "pool_unavailable"


class NoRoute(StrEnum):
    """Why no replica can take a request now."""

    NO_REPLICA = "no_replica"
    ALL_FULL = "all_full"


_NO_SHARES: Mapping[str, float] = {}
_NOTHING_CACHED: Mapping[str, int] = {}
# Types less likely than this, and mixed shares below this fraction of the largest, are ignored.
_LEAST_CHANCE = 0.01
_LEAST_OF_LARGEST = 0.1
_REASONS = {
    POOL: RouteReason.POOL,
    OVERFLOW: RouteReason.OVERFLOW,
    POOL_UNAVAILABLE: RouteReason.POOL_UNAVAILABLE,
}
_NO_ROUTES = {NO_REPLICA: NoRoute.NO_REPLICA, ALL_FULL: NoRoute.ALL_FULL}


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen replica; ``work_s``: the expected work that the request adds to it."""

    replica: str
    reason: RouteReason
    work_s: float


class Router:
    """Pure: the same request and loads give the same choice.

    ``type_shares``: shares of the plan's types, in order, for requests with type probabilities.
    """

    def __init__(
        self,
        routing_shares: Mapping[str, Mapping[str, float]],
        *,
        overflow_s: float = 2.0,
        type_shares: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self._shares = routing_shares
        self._type_shares = tuple(type_shares)
        self._overflow_s = overflow_s

    def pick(
        self,
        request: Request,
        loads: Mapping[str, ReplicaLoad],
        *,
        exclude: Set[str] = frozenset(),
        cached: Mapping[str, int] = _NOTHING_CACHED,
    ) -> Route | NoRoute:
        """Choose among ``loads`` (replicas that may take requests) without ``exclude``.

        ``cached``: cached tokens of the prompt by replica name.
        """
        # Sorted by name, which breaks ties.
        allowed = sorted(loads.keys() - exclude if exclude else loads)
        if not allowed:
            return NoRoute.NO_REPLICA
        shares = self.shares(request)
        prompt_tokens, output_tokens = request.prompt_tokens, request.output_tokens
        given, share, outstanding_s, own_s, inflight, most = [], [], [], [], [], []
        # For a few replicas one loop is faster than a comprehension for each list.
        for name in allowed:
            load = loads[name]
            given.append(load)
            share.append(shares.get(name, 0.0))
            outstanding_s.append(load.work_s)
            prompt = prompt_tokens - cached.get(name, 0) if cached else prompt_tokens
            own_s.append(
                prompt * load.prefill_s_per_token + output_tokens * load.decode_s_per_token
            )
            inflight.append(load.inflight)
            most.append(load.max_inflight)
        index, code = pick(
            share,
            outstanding_s,
            own_s,
            inflight,
            most,
            _fitting(prompt_tokens + 1, given),
            self._overflow_s,
            replicas=len(given),
            row=0,
        )
        if index < 0:
            return _NO_ROUTES[code]
        return Route(replica=allowed[index], reason=_REASONS[code], work_s=own_s[index])

    def shares(self, request: Request) -> Mapping[str, float]:
        """Shares by replica, mixed by the request's type probabilities, without negligible ones."""
        probabilities = request.probabilities
        if not probabilities or len(probabilities) != len(self._type_shares):
            return self._shares.get(request.workload_type, _NO_SHARES)
        mixed: dict[str, float] = {}
        for chance, shares in zip(probabilities, self._type_shares, strict=True):
            if chance >= _LEAST_CHANCE:
                for name, share in shares.items():
                    mixed[name] = mixed.get(name, 0.0) + chance * share
        least = _LEAST_OF_LARGEST * max(mixed.values(), default=0.0)
        return {name: share for name, share in mixed.items() if share >= least}


def work_s(request: Request, load: ReplicaLoad, cached_tokens: int = 0) -> float:
    """Expected engine seconds of the request on that replica."""
    return (
        request.prompt_tokens - cached_tokens
    ) * load.prefill_s_per_token + request.output_tokens * load.decode_s_per_token


def _fitting(needed_tokens: int, loads: list[ReplicaLoad]) -> list[bool]:
    """Replicas whose context holds the request; if none does, those with the longest context.

    The length is an estimate; only the engine, which counts tokens, refuses a prompt as too long.
    """
    fits = [load.max_model_len == 0 or load.max_model_len >= needed_tokens for load in loads]
    if True in fits:
        return fits
    longest = max(load.max_model_len for load in loads)
    return [load.max_model_len == longest for load in loads]
