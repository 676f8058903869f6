"""The replicas as the request machine sees them: phase, load, caches and circuit breakers."""

from collections.abc import Set

import msgspec

from oserve.control.dispatch.affinity import Affinity
from oserve.control.dispatch.breaker import Breakers
from oserve.control.dispatch.ledger import WorkLedger
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.router import NoRoute, Route, Router
from oserve.control.dispatch.state import Booking, RequestState
from oserve.control.dispatch.table import EMPTY_TABLE, RoutingTable, TableReplica
from oserve.control.dispatch.tiers import tightest
from oserve.control.dispatch.vacating import Vacating
from oserve.core import ReplicaLoad, ReplicaPhase, Request, Tier
from oserve.core.tier import least

_NONE: Set[str] = frozenset()


class Choice(msgspec.Struct, frozen=True):
    """A route, its replica, and the prompt tokens that the replica has in cache."""

    route: Route
    replica: TableReplica
    cached_tokens: int
    decode_s_per_token: float = 0.0


class Fleet:
    """Routing table, outstanding work, caches and circuit breakers of all replicas."""

    def __init__(self, policy: DispatchPolicy) -> None:
        self.table = EMPTY_TABLE
        self.serving: dict[str, TableReplica] = {}
        self.ledger = WorkLedger(
            policy.overload, processes=policy.processes, learns=policy.learns_speed
        )
        self.breakers = Breakers()
        self.vacating = Vacating(policy.drain_limit_s)
        self.overload = policy.overload
        self._policy = policy
        self._processes = policy.processes
        self._most_inflight = 0
        self._router = Router({})
        self._affinity = Affinity()
        # By tier: the replicas with a share of its types; those of precisions that it excludes.
        self._pools: dict[str, frozenset[str]] = {}
        self._barred: dict[Tier, Set[str]] = {}

    def follow(self, table: RoutingTable, now_s: float) -> None:
        """Use a new routing table."""
        before = {replica.id: replica.started_s for replica in self.table.replicas}
        now = {replica.id: replica.started_s for replica in table.replicas}
        self._affinity.forget(name for name in before if now.get(name) != before[name])
        self.breakers.follow(name for name in before if now.get(name) == before[name])
        self.table = table
        constants, policy = table.constants, self._policy
        self.overload = policy.overload if constants is None else constants.overload
        self.ledger.use(tightest(self.overload, table.tiers))
        self._router = Router(
            table.routing_shares,
            overflow_s=policy.overflow_s if constants is None else constants.overflow_s,
            type_shares=[kind.shares for kind in table.planned_types],
        )
        self.vacating.follow(table, now_s)
        pools, limits = tier_pools(table)
        self._pools = pools
        self.ledger.follow(table.replicas, limits)
        self._update_serving()

    def _update_serving(self) -> None:
        self._barred = {}
        self.serving = {
            replica.id: replica
            for replica in self.table.replicas
            if replica.phase is ReplicaPhase.READY and replica not in self.vacating
        }
        self._most_inflight = sum(replica.max_inflight for replica in self.serving.values())

    def vacate(self, name: str, within_s: float, started_s: float | None, now_s: float) -> None:
        """Vacate a replica: send it no new requests, and let its running ones leave."""
        for replica in self.table.replicas:
            if replica.id == name and started_s in {None, replica.started_s}:
                self.vacating.begin((name, replica.started_s), within_s, now_s)
        self._update_serving()

    # -- routing --------------------------------------------------------------------------------
    def choose(
        self, state: RequestState, request: Request, now_s: float, *, tight: bool = False
    ) -> Choice | NoRoute:
        """The replica for a request, or the reason why there is none.

        ``tight``: the request leaves slots free for other tenants.
        """
        cached = self._affinity.cached(state.session, state.prefix, request.prompt_tokens)
        if tight:
            loads = self.ledger.tight_loads(self.serving, self._policy.fair.reserve)
        else:
            loads = self.ledger.loads(self.serving)
        route = self._router.pick(
            request,
            loads,
            exclude=self.closed(state, now_s),
            cached=cached,
        )
        if isinstance(route, NoRoute):
            return route
        return Choice(
            route,
            self.serving[route.replica],
            cached.get(route.replica, 0),
            loads[route.replica].decode_s_per_token,
        )

    def saved_s(self, state: RequestState) -> float:
        """The prompt work that a cached prefix would spare a request, in seconds."""
        cached = self._affinity.cached(state.session, state.prefix, state.prompt_tokens)
        if not cached:
            return 0.0
        loads = self.ledger.loads(cached.keys() & self.serving.keys())
        return max(
            (
                cached[name] * load.prefill_s_per_token
                for name, load in loads.items()
                if load.inflight < load.max_inflight
            ),
            default=0.0,
        )

    def book(self, state: RequestState, request: Request, choice: Choice, now_s: float) -> Booking:
        """Book a request at the chosen replica."""
        name = choice.replica.id
        self._affinity.sent(
            state.session,
            state.prefix,
            name,
            prompt_tokens=request.prompt_tokens,
            prefix_tokens=state.prefix_tokens,
        )
        self.breakers.sent(name, now_s)
        entry = self.ledger.admit(
            name, request, now_s, cached_tokens=choice.cached_tokens, streams=state.streams
        )
        return Booking(choice.replica, entry)

    def unbook(self, booking: Booking, now_s: float, *, done: bool = False) -> None:
        """Free the slot of a booking. ``done``: the replica has finished the request."""
        if booking.entry is not None:
            booking.entry.close(now_s, done=done)
            self.breakers.release(booking.replica.id)

    def any_open(self, state: RequestState, now_s: float) -> TableReplica | None:
        """A replica for an auxiliary call."""
        closed = self.closed(state, now_s)
        return next((item for name, item in self.serving.items() if name not in closed), None)

    def excluded(self, state: RequestState, *, present: str = "") -> Set[str]:
        """Replicas that were tried, cannot continue the request, or are its ``present`` one.

        And those of a precision that its tier excludes, whatever happens.
        """
        barred = self._barred_for(state.tier)
        if not (state.tried or state.moves or present):
            return barred
        return {
            name
            for name, replica in self.serving.items()
            if name == present
            or (name, replica.started_s) in state.tried
            or (state.moves and not replica.returns_token_ids)
            or name in barred
        }

    def _barred_for(self, tier: Tier | None) -> Set[str]:
        """Serving replicas of a precision that a tier excludes."""
        if tier is None or not tier.precisions:
            return _NONE
        found = self._barred.get(tier)
        if found is None:
            found = self._barred[tier] = frozenset(
                name for name, item in self.serving.items() if not tier.allows(item.precision)
            )
        return found

    def closed(self, state: RequestState, now_s: float) -> Set[str]:
        """As ``excluded``, plus replicas with an open breaker if others remain.

        And plus those that serve other tiers only, if others remain: a batch that may grow large
        there would break the limits of this tier, or this request those of theirs.
        """
        excluded = self.excluded(state)
        open_ = self.breakers.open(now_s)
        pool = self._pools.get(state.promise.tier.name) if state.promise is not None else None
        if pool is not None and not pool.issuperset(self.serving):
            closed = excluded | open_ | (self.serving.keys() - pool)
            if self.serving.keys() - closed:
                return closed
        if not open_:
            return excluded
        closed = excluded | open_
        return closed if self.serving.keys() - closed else excluded

    def loads_for(self, state: RequestState, now_s: float) -> list[ReplicaLoad]:
        """The loads of the replicas that may take a request now, or once they have room."""
        return list(self.ledger.loads(self.serving.keys() - self.closed(state, now_s)).values())

    def may_serve(self, state: RequestState, now_s: float) -> bool:
        """Whether some replica can take the request, now or once it has room."""
        return bool(self.serving.keys() - self.closed(state, now_s))

    def share(self, processes: int) -> None:
        """This is one of so many gateway processes from now on."""
        self._processes = processes
        self.ledger.share(processes)

    @property
    def slots(self) -> float:
        """Sequences that the serving replicas run at once, for this process."""
        return self._most_inflight / 2 / self._processes

    @property
    def any_room(self) -> bool:
        """Whether some replica has room for a request."""
        loads = self.ledger.loads(self.serving).values()
        return any(load.inflight < load.max_inflight for load in loads)

    def has_room(
        self, state: RequestState, request: Request, present: str, *, leaving: int
    ) -> bool:
        """Whether another replica has room for a running request now.

        ``leaving``: requests that already migrate to such replicas.
        """
        loads = self.ledger.loads(self.serving)
        excluded = self.excluded(state, present=present)
        free = sum(
            load.max_inflight - load.inflight
            for name, load in loads.items()
            if name not in excluded and load.inflight < load.max_inflight
        )
        if free <= leaving:
            return False
        return not isinstance(self._router.pick(request, loads, exclude=excluded), NoRoute)

    def may_retry(self, state: RequestState, present: str, *, died: bool) -> bool:
        """Whether another replica may try a request.

        If its replica ``died``, the request may also wait for one that is starting. After an
        error response only replicas that serve now count.
        """
        others = self.serving.keys() - self.excluded(state) - {present}
        return bool(others) or (died and self.table.expected)

    def may_continue(
        self, state: RequestState, present: str, context_tokens: int, *, again: bool
    ) -> bool:
        """Whether a replica can continue a stream of that context length.

        ``again``: the present one may, too. If no replica serves, one that is starting counts.
        """
        excluded = self.excluded(state, present="" if again else present)
        fits = [
            item.max_model_len == 0 or item.max_model_len > context_tokens
            for name, item in self.serving.items()
            if name not in excluded and item.returns_token_ids
        ]
        return any(fits) if fits else self.table.expected

    # -- what replicas did ----------------------------------------------------------------------
    def failed(
        self,
        replica: TableReplica,
        now_s: float,
        reason: str,
        *,
        at_once: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        """Record a failure of a replica; see ``Breakers.failed``."""
        if self._still_serves(replica):
            self.breakers.failed(
                replica.id, now_s, reason, at_once=at_once, retry_after_s=retry_after_s
            )

    def served(self, replica: TableReplica) -> bool:
        """Record a success of a replica; returns whether it closed its breaker."""
        return self._still_serves(replica) and self.breakers.served(replica.id)

    def _still_serves(self, replica: TableReplica) -> bool:
        now = self.serving.get(replica.id)
        return now is not None and now.started_s == replica.started_s

    @property
    def least_work_s(self) -> float:
        """Outstanding work of the least loaded replica in seconds; 5 if no replica serves."""
        loads = self.ledger.loads(self.serving).values()
        return min((load.work_s for load in loads), default=5.0)

    @property
    def least_prefill_s_per_token(self) -> float:
        """Prefill seconds per prompt token at the fastest replica."""
        loads = self.ledger.loads(self.serving).values()
        return min((load.prefill_s_per_token for load in loads), default=0.0)


def tier_pools(
    table: RoutingTable,
) -> tuple[dict[str, frozenset[str]], dict[str, float | None]]:
    """By tier, the replicas with a share of its types; by replica, the tightest limit of TTFT.

    Both are empty for a plan whose types have no tiers.
    """
    pools: dict[str, set[str]] = {}
    for kind in table.planned_types:
        if kind.tier:
            own = {name for name, share in kind.shares.items() if share > 0}
            pools.setdefault(kind.tier, set()).update(own)
    limits = {
        replica.id: least(
            tier.ttft_s for tier in table.tiers if replica.id in pools.get(tier.name, ())
        )
        for replica in table.replicas
        if pools
    }
    return {name: frozenset(own) for name, own in pools.items()}, limits
