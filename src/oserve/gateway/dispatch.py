"""From an admitted request to a replica: route, send, wait in a bounded queue, account."""

import asyncio
import heapq
import logging
import time

import msgspec

from oserve.control.dispatch.affinity import Affinity
from oserve.control.dispatch.breaker import Breakers
from oserve.control.dispatch.ledger import WorkEntry, WorkLedger
from oserve.control.dispatch.overload import DEMOTED_S, OverloadPolicy, shed_in_s, too_late
from oserve.control.dispatch.router import NoRoute, Router, RouteReason
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, FinishStatus, ReplicaPhase
from oserve.core.faults import fault
from oserve.gateway.account import account
from oserve.gateway.estimator import Foresight
from oserve.gateway.handover import HandOvers
from oserve.gateway.http.errors import overloaded, shown, unavailable
from oserve.gateway.metrics import Metrics
from oserve.gateway.moving import Moving
from oserve.gateway.records import RecordStore
from oserve.gateway.relay import Relay
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.stream.replay_buffer import Budget
from oserve.gateway.upstream_request import pool_of, request_bytes
from oserve.gateway.yield_queue import Turns
from oserve.wire import UpstreamPool
from oserve.workload import PromptLengthEstimator
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.gateway")

EMPTY_TABLE = RoutingTable(plan_id="", workload_types=(), routing_shares={}, replicas=())


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway process is told of the rest: for status, switches, metrics and load.

    ``elsewhere``: prior seconds of work and requests of other gateway processes, per replica.
    ``metrics``: counters summed over all processes, this one included; empty if it is the only one.
    ``hand_overs``: replicas that give up their requests: when they started, within what seconds.
    """

    status: msgspec.Raw = msgspec.Raw(b"{}")
    gauges: list[tuple[str, list[str], float]] = []
    elsewhere: dict[str, tuple[float, int]] = {}
    metrics: dict[str, dict[str, list[float]]] = {}
    switches: msgspec.Raw = msgspec.Raw(b"[]")
    queued: int = 0
    hand_overs: dict[str, tuple[float, float]] = {}


class Dispatcher:
    """Everything between admission and the replicas, for one gateway process."""

    def __init__(
        self,
        settings: GatewaySettings,
        records: RecordStore | None,
        estimator: OutputEstimator | None = None,
    ) -> None:
        self.table = EMPTY_TABLE
        self.metrics = Metrics()
        self.picture = Picture()
        self.lengths = PromptLengthEstimator()
        self.foresight = Foresight(estimator)
        self.serving: dict[str, TableReplica] = {}
        self.active: set[Relay] = set()
        self._settings = settings
        self.records = records
        self._router = Router({})
        self._affinity = Affinity()
        overload = settings.overload
        self._overload = OverloadPolicy(
            ttft_s=overload.ttft_ms / 1e3 if overload.demote and overload.ttft_ms else None,
            shed_after_s=overload.shed_after_ms / 1e3 if overload.shed_after_ms else None,
        )
        self._ledger = WorkLedger(self._overload, processes=settings.processes)
        self.breakers = Breakers()
        # Attached servers, by start, that refused stream_options.
        self._without_options: set[tuple[str, float]] = set()
        self._pools: dict[tuple[str, Endpoint], UpstreamPool] = {}
        self._queue: list[tuple[float, int, Relay]] = []
        self._waiting: set[Relay] = set()
        self._sequence = 0
        self._timers: dict[Relay, asyncio.TimerHandle] = {}
        self._max_queued = -(-settings.max_queued // settings.processes)
        self.max_attempts = settings.max_attempts
        self._budget = Budget(settings.move.max_bytes, settings.move.max_stream_bytes)
        self.in_turn = Turns()
        self.hand_overs = HandOvers(self, settings.move.drain_limit_s)

    # -- the deployment -------------------------------------------------------------------------
    def update(self, table: RoutingTable) -> None:
        """Replace the routing table; requests on replicas that are gone are given to others."""
        previous = self._pools
        before = {replica.id: replica.started_s for replica in self.table.replicas}
        now = {replica.id: replica.started_s for replica in table.replicas}
        self._affinity.forget(name for name in before if now.get(name) != before[name])
        self.breakers.follow(name for name in before if now.get(name) == before[name])
        self._without_options &= set(now.items())
        self.table = table
        self.foresight.follow(table)
        self._router = Router(
            table.routing_shares,
            overflow_s=self._settings.overflow_s,
            type_shares=[kind.shares for kind in table.types],
        )
        self._pools = {}
        for replica in table.replicas:
            key = (replica.id, replica.endpoint)
            self._pools[key] = previous.get(key) or pool_of(replica.endpoint)
        self.hand_overs.follow(table)
        self._serve_by(table)
        self._ledger.follow(table.replicas)
        for key, pool in previous.items():
            if key not in self._pools:
                pool.fail_all()
        self._pump()

    def _serve_by(self, table: RoutingTable) -> None:
        self.serving = {
            replica.id: replica
            for replica in table.replicas
            if replica.phase is ReplicaPhase.READY and not self.hand_overs.leaving(replica)
        }

    def hand_over(self, replica: str, within_s: float, started_s: float | None = None) -> None:
        """Have a replica's running requests go on elsewhere within so many seconds.

        It gets no new ones; those that cannot move drain. ``started_s``: that start of it only.
        """
        for item in self.table.replicas:
            if item.id == replica and started_s in {None, item.started_s}:
                self.serving.pop(replica, None)
                self.hand_overs.begin((replica, item.started_s), within_s)

    def tell(self, picture: Picture) -> None:
        """Take in what other parts of OServe know."""
        self.picture = picture
        self._ledger.set_elsewhere(picture.elsewhere)
        for name, (started_s, within_s) in picture.hand_overs.items():
            self.hand_over(name, within_s, started_s)

    def outstanding(self) -> dict[str, tuple[float, int]]:
        """Work (prior seconds) and requests this process has at each replica."""
        return self._ledger.own()

    @property
    def queued(self) -> int:
        """Requests waiting here."""
        return len(self._waiting)

    # -- requests -------------------------------------------------------------------------------
    def accept(self, relay: Relay) -> None:
        """Take a request in."""
        self.active.add(relay)
        loop = asyncio.get_running_loop()
        self._timers[relay] = loop.call_later(
            self._settings.request_timeout_s, relay.safely, relay.deadline
        )
        relay.safely(self._arrived, relay)

    def _arrived(self, relay: Relay) -> None:
        if relay.expected is not None:
            self.foresight.tally.arrived(relay.expected.arrived_s, relay.expected.chances)
        self.dispatch(relay)

    def dispatch(self, relay: Relay) -> None:
        """Send a request to the replica the router picks, or let it wait, or refuse it."""
        if relay.request is None:
            self._dispatch_auxiliary(relay)
            return
        picked = self._try_send(relay)
        if picked is None:
            return
        if picked is NoRoute.NO_REPLICA and not self.table.expected:
            relay.fail(unavailable("No replica can serve now, and none is starting"))
        elif len(self._waiting) >= self._max_queued and not relay.moves:
            relay.fail(
                overloaded("Too many requests are waiting", retry_after_s=self._retry_after_s())
            )
        else:
            self._enqueue(relay, waiting_for_replica=picked is NoRoute.NO_REPLICA)

    def _try_send(self, relay: Relay) -> NoRoute | None:
        """Route and send; returns why it could not be, if so."""
        request, expected = relay.request, relay.expected
        assert request is not None
        assert expected is not None
        known = expected.known
        cached = self._affinity.cached(known.session, known.system, request.prompt_tokens)
        route = self._router.pick(
            request,
            self._ledger.loads(self.serving),
            exclude=self._closed(relay),
            cached=cached,
        )
        if isinstance(route, NoRoute):
            return route
        replica = self.serving[route.replica]
        kind = request.workload_type
        now_s = time.monotonic()
        had = cached.get(replica.id, 0)
        self._affinity.sent(
            known.session,
            known.system,
            replica.id,
            prompt_tokens=request.prompt_tokens,
            prefix_tokens=expected.prefix_tokens,
        )
        self.metrics.count("oserve_route", kind, replica.id)
        if route.reason is not RouteReason.POOL:
            self.metrics.count("oserve_route_fallback", route.reason.value)
        if had:
            self.metrics.count("oserve_route_cached")
        self.metrics.histogram("oserve_queue_seconds", kind).observe(now_s - relay.arrival_s)
        entry = self._ledger.admit(
            replica.id, request, now_s, cached_tokens=had, streams=relay.stream
        )
        self.breakers.sent(replica.id, now_s)
        self._send(relay, replica, entry)
        return None

    def _dispatch_auxiliary(self, relay: Relay) -> None:
        closed = self._closed(relay)
        replicas = [item for name, item in self.serving.items() if name not in closed]
        if not replicas:
            relay.fail(unavailable("No replica can serve now"))
            return
        self._send(relay, replicas[0], None)

    def _send(self, relay: Relay, replica: TableReplica, entry: WorkEntry | None) -> None:
        try:
            relay.sent_to(replica, entry)
            message = self._upstream(relay, replica)
        except Exception:
            # Booked before anybody could free it.
            if entry is not None:
                entry.close(time.monotonic(), done=False)
            raise
        self._waiting.discard(relay)
        self._pools[replica.id, replica.endpoint].send(message, relay.sink)

    def _upstream(self, relay: Relay, replica: TableReplica) -> bytes:
        """The request as the replica gets it."""
        knows = replica.stream_options and _start(replica) not in self._without_options
        return request_bytes(relay, replica, stream_options=knows)

    def _excluded(self, relay: Relay, *, also_present: bool = False) -> set[str]:
        return {
            name
            for name, replica in self.serving.items()
            if (also_present and relay.replica is not None and name == relay.replica.id)
            or (relay.tried and (name, replica.started_s) in relay.tried)
            or (relay.moves and not replica.tells_token_ids)
        }

    def _closed(self, relay: Relay) -> set[str]:
        """Whom not to ask now: as ``_excluded``, and those set aside if there are others."""
        excluded = self._excluded(relay)
        closed = excluded | self.breakers.open(time.monotonic())
        return closed if self.serving.keys() - closed else excluded

    def failed_at(
        self,
        replica: TableReplica,
        reason: str,
        *,
        at_once: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        """A replica did not answer a request well; see ``Breakers.failed``."""
        if self._still_serves(replica):
            self.breakers.failed(
                replica.id,
                time.monotonic(),
                reason,
                at_once=at_once,
                retry_after_s=retry_after_s,
            )

    def served_by(self, replica: TableReplica) -> None:
        """A replica answered a request."""
        if self._still_serves(replica):
            self.breakers.served(replica.id)

    def _still_serves(self, replica: TableReplica) -> bool:
        now = self.serving.get(replica.id)
        return now is not None and now.started_s == replica.started_s

    def learn_no_stream_options(self, replica: TableReplica) -> bool:
        """A server refused that field and is not sent it any more; tells whether that is news."""
        start = _start(replica)
        if start in self._without_options or not replica.stream_options:
            return False
        self._without_options.add(start)
        _log.info("replica %s knows no stream_options; it is asked without", replica.id)
        return True

    def may_retry(self, relay: Relay, *, died: bool) -> bool:
        """Whether another try makes sense: attempts left, and someone who may take it.

        If its replica ``died``, one that is on its way is worth waiting for; if that answered with
        an error, only others are.
        """
        if relay.attempts >= self.max_attempts or relay.replica is None:
            return False
        others = self.serving.keys() - self._excluded(relay) - {relay.replica.id}
        return bool(others) or (died and self.table.expected)

    def moving(self, relay: Relay, *, shows_ids: bool) -> Moving | None:
        """What lets a stream move, where that is wanted."""
        most = self._settings.move.max_moves
        if most == 0:
            return None
        return Moving(relay, self._budget, shows_ids=shows_ids, max_moves=most)

    def may_move(self, relay: Relay, needed_tokens: int, *, again: bool) -> bool:
        """Whether a replica may go on with a stream of that context.

        ``again``: the one it is on may. One that is on its way is waited for where there are none.
        """
        excluded = self._excluded(relay, also_present=not again)
        fits = [
            item.max_model_len == 0 or item.max_model_len > needed_tokens
            for name, item in self.serving.items()
            if name not in excluded and item.tells_token_ids
        ]
        return any(fits) if fits else self.table.expected

    def has_place(self, relay: Relay) -> bool:
        """Whether another replica would take a running request at once."""
        assert relay.request is not None
        excluded = self._excluded(relay, also_present=True)
        loads = self._ledger.loads(self.serving)
        return not isinstance(self._router.pick(relay.request, loads, exclude=excluded), NoRoute)

    def send_on(self, relay: Relay, reason: str) -> None:
        """Give a request that has left its replica to another, and say what became of it."""
        name = relay.replica.id if relay.replica is not None else "?"
        self.dispatch(relay)
        if relay in self._waiting:
            _log.warning("request leaves replica %s and waits for another: %s", name, reason)
        elif not relay.ended:
            _log.warning("request moves on from replica %s: %s", name, reason)

    def log_stays(self, relay: Relay, reason: str) -> None:
        """Say why a stream ends with its replica."""
        name = relay.replica.id if relay.replica is not None else "?"
        _log.warning("request cannot leave replica %s: %s", name, reason)

    # -- the queue ------------------------------------------------------------------------------
    def _enqueue(self, relay: Relay, *, waiting_for_replica: bool) -> None:
        self._sequence += 1
        self._waiting.add(relay)
        if len(self._queue) > 2 * self._max_queued + 16:
            # Those who left without being served must not pile up behind a full fleet.
            self._queue = [item for item in self._queue if item[2] in self._waiting]
            heapq.heapify(self._queue)
        heapq.heappush(self._queue, (relay.rank, self._sequence, relay))
        if waiting_for_replica:
            asyncio.get_running_loop().call_later(
                self._settings.no_replica_wait_s, self._give_up, relay, relay.attempts
            )

        shed_s = shed_in_s(self._overload, arrival_s=relay.arrival_s, now_s=time.monotonic())
        if shed_s is not None:
            asyncio.get_running_loop().call_later(shed_s, self._shed, relay)

    def _shed(self, relay: Relay) -> None:
        """Refuse a request that still waits."""
        if relay in self._waiting and not relay.moves:
            self.metrics.count("oserve_requests_shed")
            relay.fail(
                overloaded("It waited too long", retry_after_s=self._retry_after_s(), code="shed")
            )

    def _demoted(self, relay: Relay) -> bool:
        """Put a request last that cannot have its first token in time any more; once."""
        if relay.demoted or relay.moves or relay.request is None:
            return False
        costs = [item.prefill_s_per_token for item in self._ledger.loads(self.serving).values()]
        late = too_late(
            self._overload,
            arrival_s=relay.arrival_s,
            now_s=time.monotonic(),
            prefill_s=relay.request.prompt_tokens * min(costs, default=0.0),
            first_token_s=self._ledger.first_token_s,
        )
        if late:
            relay.demoted = True
            relay.rank = relay.arrival_s + DEMOTED_S
            self._sequence += 1
            heapq.heapreplace(self._queue, (relay.rank, self._sequence, relay))
            self.metrics.count("oserve_requests_demoted")
        return late

    def _give_up(self, relay: Relay, attempts: int) -> None:
        if relay in self._waiting and relay.attempts == attempts:
            relay.fail(unavailable("No replica became ready in time"))

    def _pump(self) -> None:
        """Send waiting requests, best rank first, until the router refuses one."""
        while self._queue:
            _, _, relay = self._queue[0]
            if relay in self._waiting:
                try:
                    if self._overload.ttft_s is not None and self._demoted(relay):
                        continue
                    if self._try_send(relay) is not None:
                        return
                except Exception as error:
                    relay.crashed(error)
                    self._waiting.discard(relay)
                    continue
            heapq.heappop(self._queue)

    def _retry_after_s(self) -> int:
        loads = self._ledger.loads(self.serving).values()
        return max(1, min(60, round(min((load.work_s for load in loads), default=5.0))))

    def prompt_done(self) -> None:
        """A replica has computed a prompt, and may have room for another."""
        if self._waiting and self._overload.ttft_s is not None:
            asyncio.get_running_loop().call_soon(self._pump)

    # -- the end of a request -------------------------------------------------------------------
    def ended(self, relay: Relay, status: FinishStatus) -> None:
        """Count and record a finished request, and let the next one go."""
        self.active.discard(relay)
        self._waiting.discard(relay)
        timer = self._timers.pop(relay, None)
        if timer is not None:
            timer.cancel()
        if relay.expected is not None:
            try:
                account(self, relay, relay.expected, status)
            except Exception as error:
                id_ = shown(relay.request_id)
                _log.error("request %s could not be accounted for: %s", id_, fault(error))
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._pump)

    def close(self) -> None:
        """Break off what is left, and finish writing records."""
        for relay in list(self.active):
            relay.fail(unavailable("The server is shutting down"))
        for pool in self._pools.values():
            pool.fail_all()
        if self.records is not None:
            self.records.close()


def _start(replica: TableReplica) -> tuple[str, float]:
    return replica.id, replica.started_s
