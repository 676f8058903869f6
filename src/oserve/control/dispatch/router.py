"""Which replica serves a request: soft pools from routing shares, live load decides inside.

The plan's shares say which replicas suit a workload type; those form its pool. Within the pool the
replica with the least expected work wins, in seconds and not in requests. When even that one is
further from idle than the overflow threshold and a replica outside the pool would be sooner done,
the request goes there. Shares are never followed blindly: under live load fixed shares are unsafe.

If its answer determines a request's type, the router mixes the shares of the types by their
probabilities. A cached prefix of the prompt makes the request cost less on that replica.
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
    """Why a request went where it went."""

    POOL = "pool"
    OVERFLOW = "overflow"
    POOL_UNAVAILABLE = "pool_unavailable"


class NoRoute(StrEnum):
    """Why no replica can take a request now."""

    NO_REPLICA = "no_replica"
    ALL_FULL = "all_full"


_NO_SHARES: Mapping[str, float] = {}
_NOTHING_CACHED: Mapping[str, int] = {}
# A type less likely than this, or a mixed share below this part of the largest, makes no pool.
_LEAST_CHANCE = 0.01
_LEAST_OF_LARGEST = 0.1
_REASONS = {
    POOL: RouteReason.POOL,
    OVERFLOW: RouteReason.OVERFLOW,
    POOL_UNAVAILABLE: RouteReason.POOL_UNAVAILABLE,
}
_NO_ROUTES = {NO_REPLICA: NoRoute.NO_REPLICA, ALL_FULL: NoRoute.ALL_FULL}


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The pick; ``work_s`` is what the request adds to the replica's expected work."""

    replica: str
    reason: RouteReason
    work_s: float


class Router:
    """Pure: the same request and loads give the same pick.

    ``type_shares``: those of the plan's types, in their order, for requests with probabilities.
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
        """Choose among ``loads`` (replicas that may take requests), leaving out ``exclude``.

        ``cached``: tokens of the prompt that replicas have already, by name.
        """
        # By name, which so decides between equals.
        allowed = sorted(loads.keys() - exclude if exclude else loads)
        if not allowed:
            return NoRoute.NO_REPLICA
        shares = self.shares(request)
        prompt_tokens, output_tokens = request.prompt_tokens, request.output_tokens
        given, share, outstanding_s, own_s, inflight, most = [], [], [], [], [], []
        # One loop: for a few replicas that is quicker than a comprehension for each list.
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
    """Engine seconds that ``request`` is expected to occupy on that replica."""
    return (
        request.prompt_tokens - cached_tokens
    ) * load.prefill_s_per_token + request.output_tokens * load.decode_s_per_token


def _fitting(needed_tokens: int, loads: list[ReplicaLoad]) -> list[bool]:
    """Replicas whose context holds the request; if none does, those with the longest context.

    The length is an estimate, so the engine, which counts, has the last word on what is too long.
    """
    fits = [load.max_model_len == 0 or load.max_model_len >= needed_tokens for load in loads]
    if True in fits:
        return fits
    longest = max(load.max_model_len for load in loads)
    return [load.max_model_len == longest for load in loads]
