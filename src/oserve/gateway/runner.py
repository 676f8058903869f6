"""Drives the request machine: turns socket callbacks into events, and executes commands.

Each gateway process has one runner. It holds the connections to replicas and the only timer; the
machine decides. An exception in one request ends only that request.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.charge import Charge
from oserve.control.dispatch.commands import Command, RequestCommand
from oserve.control.dispatch.events import Event
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.router import RouteReason
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.control.draining import decide_exits
from oserve.core import Endpoint, FinishStatus
from oserve.core.faults import fault
from oserve.gateway.accounting import Accounting
from oserve.gateway.constants import policy_of
from oserve.gateway.estimator import RequestEstimator
from oserve.gateway.http.errors import refusal_error, shown
from oserve.gateway.metrics import Metrics
from oserve.gateway.records import RecordSink
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.gateway.stream.replay_buffer import ReplayBudget
from oserve.gateway.stream.session import Session, SessionContext
from oserve.gateway.tenants import Tenants, salted
from oserve.gateway.tracing import RequestTracer, Untraced, tracer_of
from oserve.gateway.upstream_request import pool_of, request_bytes
from oserve.gateway.yield_queue import YieldQueue
from oserve.switch.kv import Way
from oserve.wire import UpstreamPool
from oserve.workload import PromptLengthEstimator
from oserve.workload.output import OutputEstimator

_log = logging.getLogger("oserve.gateway")

_NEVER_S = float("inf")
_SOONEST_S = 0.001
# Engine errors that reached clients, by the final status of the request.
_SHOWN_ERRORS = {
    FinishStatus.CLIENT_ERROR: "engine_refused",
    FinishStatus.FAILED: "engine_failed",
}


class RequestRunner:
    """The request path of one gateway process, from admission to the replicas."""

    def __init__(
        self,
        settings: GatewaySettings,
        records: RecordSink | None,
        estimator: OutputEstimator | None = None,
    ) -> None:
        self.machine = RequestMachine(policy_of(settings), decide_exits)
        self.metrics = Metrics()
        self.snapshot = ClusterSnapshot()
        self.lengths = PromptLengthEstimator()
        self.estimator = RequestEstimator(estimator)
        self.active: dict[int, Session] = {}
        self.records = records
        self._accounting = Accounting(self.metrics, self.estimator, self.lengths, records)
        self._pools: dict[tuple[str, Endpoint], UpstreamPool] = {}
        # Attached servers, by their start, that refused stream_options.
        self._without_options: set[tuple[str, float]] = set()
        self.tenants = Tenants(settings, self.metrics)
        self.tracer: RequestTracer | Untraced = tracer_of(settings.tracing)
        self._number = 0
        self._events: deque[Event] = deque()
        self._working = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = _NEVER_S
        move = settings.move
        budget = ReplayBudget(move.max_bytes, move.max_stream_bytes)
        self.context = SessionContext(
            report=self.report,
            crashed=self._crashed,
            later=YieldQueue(),
            budget=budget if move.max_moves else None,
            observe=self.metrics.inter_token.observe,
            drop_options=self._drop_options,
            plan_id=lambda: self.machine.table.plan_id,
        )
        self._steps: dict[type[RequestCommand], Callable[[Any, Session], None]] = {
            do.Send: self._send,
            do.Hold: self._hold,
            do.Forward: self._forward,
            do.ShowError: lambda _, session: session.show_error(),
            do.LetGo: lambda _, session: session.release(),
            do.Retry: self._retry,
            do.Depart: lambda command, session: session.depart(command),
            do.Resume: self._resume,
            do.Refuse: self._refuse,
            do.Demote: lambda *_: self.metrics.count("oserve_requests_demoted"),
            do.Record: self._record,
        }

    # -- the deployment -------------------------------------------------------------------------
    @property
    def table(self) -> RoutingTable:
        """The routing table in force."""
        return self.machine.table

    @property
    def serving(self) -> dict[str, TableReplica]:
        """Replicas that take new requests, by id."""
        return self.machine.serving

    def update(self, table: RoutingTable) -> None:
        """Replace the routing table; requests of removed replicas go to others."""
        previous = self._pools
        self._without_options &= {(item.id, item.started_s) for item in table.replicas}
        self.estimator.follow(table)
        self._pools = {}
        for replica in table.replicas:
            key = (replica.id, replica.endpoint)
            self._pools[key] = previous.get(key) or pool_of(replica.endpoint)
        self.report(on.TableChanged(table))
        for key, pool in previous.items():
            if key not in self._pools:
                pool.fail_all()

    def hand_over(self, replica: str, within_s: float, started_s: float | None = None) -> None:
        """Vacate a replica: migrate its running requests within so many seconds.

        It gets no new requests; those that cannot migrate drain. ``started_s``: only the engine
        started then.
        """
        self.report(on.Vacate(replica=replica, within_s=within_s, started_s=started_s))

    def apply(self, snapshot: ClusterSnapshot) -> None:
        """Apply a new cluster snapshot."""
        self.snapshot = snapshot
        self.report(on.LoadElsewhere(snapshot.elsewhere, snapshot.processes))
        self.tenants.follow(snapshot)
        for name, (started_s, within_s) in snapshot.hand_overs.items():
            self.hand_over(name, within_s, started_s)

    def outstanding(self) -> dict[str, tuple[float, int]]:
        """Outstanding work (prior seconds) and requests of this process, per replica."""
        return self.machine.fleet.ledger.own()

    @property
    def queued(self) -> int:
        """The number of waiting requests."""
        return len(self.machine.waiting)

    def open_breakers(self) -> dict[str, tuple[str, float]]:
        """Replicas with an open circuit breaker: the reason, and the seconds left."""
        return self.machine.fleet.breakers.report(monotonic())

    # -- requests -------------------------------------------------------------------------------
    def next_number(self) -> int:
        """A new request number; numbers grow in order of arrival."""
        self._number += 1
        return self._number

    def accept(self, session: Session, rank_s: float) -> None:
        """Admit a request. Raises ApiError if its tenant has reached a limit."""
        estimate = session.estimate
        self.tenants.admit(session)
        if estimate is not None:
            self.estimator.tally.arrived(estimate.arrived_s, estimate.probabilities)
        self.active[session.number] = session
        self.tracer.arrived(session)
        if estimate is None:
            self.report(on.Arrived(number=session.number, request=None))
            return
        self.report(
            on.Arrived(
                number=session.number,
                request=session.request,
                rank_s=rank_s,
                streams=session.streams,
                session=salted(estimate.known.session, session.cache_salt),
                prefix=salted(estimate.known.system, session.cache_salt),
                prefix_tokens=estimate.prefix_tokens,
                forecast=estimate.output,
                tenant=self.tenants.fair_name(session),
                owner=session.tenant,
                max_queued=self.tenants.max_queued(session),
            )
        )
        self.tracer.accepted(session)

    def report(self, event: Event) -> None:
        """Report an event to the machine, and execute its commands before returning.

        During the execution of another command, the event waits until that is done.
        """
        self._events.append(event)
        if self._working:
            return
        self._working = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._working = False
        if self.machine.due_s < self._timer_s:
            self._arm()

    def _handle(self, event: Event) -> None:
        try:
            commands = self.machine.handle(event, monotonic())
        except Exception as error:  # a fault of the machine ends only the request concerned
            # Other requests depend on the commands from before the fault.
            self._execute_all(self.machine.emitted)
            self._machine_failed(event, error)
            return
        self._execute_all(commands)

    def _execute_all(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, do.Survey):
                self._survey(command)
            elif isinstance(command, RequestCommand):
                self._execute(command)

    def _execute(self, command: RequestCommand) -> None:
        session = self.active.get(command.number)
        if session is not None:
            try:
                self._steps[type(command)](command, session)
            except Exception as error:  # an unforeseen fault ends this request alone
                self._failed(command, session, error)

    def _failed(self, command: RequestCommand, session: Session, error: Exception) -> None:
        """Handle an exception in the execution of a command."""
        id_ = shown(session.request_id)
        if isinstance(command, do.Record):
            _log.error("the accounting of request %s failed: %s", id_, fault(error))
        elif isinstance(command, do.Refuse):
            _log.error("request %s aborted: %s", id_, fault(error))
            session.exchange.abort()
        else:
            self._crashed(session.number, error)

    def _machine_failed(self, event: Event, error: Exception) -> None:
        charge: Charge | None = None
        number = getattr(event, "number", None)
        session = None if number is None else self.active.get(number)
        if session is None:
            _log.error("the request machine failed to handle an event: %s", fault(error))
            return
        if isinstance(event, on.Crashed):
            id_ = shown(session.request_id)
            _log.error("request %s could not be ended: %s", id_, fault(error))
            session.release()
            with contextlib.suppress(Exception):  # its client is told all the same
                charge = self.machine.forget(session.number)
        else:
            self._crashed(session.number, error)
        if session.number not in self.machine.requests:
            self._execute(do.Refuse(number=session.number, refusal=do.Refusal.INTERNAL))
            self._execute(
                do.Record(
                    number=session.number,
                    status=FinishStatus.FAILED,
                    replica="",
                    moves=0,
                    charge=charge,
                    made_tokens=0 if charge is None else charge.made_tokens,
                )
            )

    def _crashed(self, number: int, error: Exception) -> None:
        """End a request in which an exception was raised; no other request is affected."""
        session = self.active.get(number)
        if session is not None:
            id_ = shown(session.request_id)
            _log.error("request %s failed in the gateway: %s", id_, fault(error))
            self.report(on.Crashed(number))

    # -- time -----------------------------------------------------------------------------------
    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = self.machine.due_s
        wait_s = max(_SOONEST_S, self._timer_s - monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_s = None, _NEVER_S
        self.report(on.Tick())

    # -- commands -------------------------------------------------------------------------------
    def _send(self, command: do.Send, session: Session) -> None:
        replica, request = command.replica, session.request
        if request is not None:
            metrics, kind = self.metrics, request.workload_type
            metrics.count("oserve_route", kind, replica.id)
            if command.reason not in {None, RouteReason.POOL}:
                metrics.count("oserve_route_fallback", str(command.reason))
            if command.cached_tokens:
                metrics.count("oserve_route_cached")
            waited_s = monotonic() - session.arrival_s
            metrics.histogram("oserve_queue_seconds", kind).observe(waited_s)
        if session.left is not None:
            _log.warning("request moves on from replica %s: %s", *session.left)
            session.left = None
        self.tracer.event(session.number, "sent", replica=replica.id)
        outgoing, reader = session.send(command)
        start = (replica.id, replica.started_s)
        options = replica.stream_options and start not in self._without_options
        session.asks_options = options
        message = request_bytes(outgoing, replica, rank_s=command.rank_s, stream_options=options)
        self._pools[replica.id, replica.endpoint].send(message, reader)

    def _hold(self, command: do.Hold, session: Session) -> None:
        if session.left is not None:
            _log.warning("request leaves replica %s and waits for another: %s", *session.left)

    def _forward(self, command: do.Forward, session: Session) -> None:
        if command.outgrown:
            self.metrics.count("oserve_requests_outgrown")
        session.forward(command)

    def _retry(self, command: do.Retry, session: Session) -> None:
        self.metrics.count("oserve_requests_retried", command.replica)
        session.release()
        session.first_byte_s = 0.0
        session.left = (command.replica, command.reason)
        self.tracer.event(session.number, "retried", replica=command.replica)

    def _resume(self, command: do.Resume, session: Session) -> None:
        way = Way.MOVE if session.resume(command) else Way.REPLAY
        self.metrics.count("oserve_requests_moved", command.cause.value, way.value)
        session.left = (command.replica, command.cause.value)
        self.tracer.event(session.number, "moved", cause=command.cause.value, way=way.value)

    def _refuse(self, command: do.Refuse, session: Session) -> None:
        error = refusal_error(command)
        if command.refusal is do.Refusal.INTERNAL and command.reason:
            id_ = shown(session.request_id)
            _log.error("request %s failed in the gateway: %s", id_, command.reason)
        if command.refusal in {do.Refusal.SHED, do.Refusal.PROMISE}:
            self.metrics.count("oserve_requests_shed")
        refused = command.refusal is do.Refusal.REFUSED_WITHOUT_BODY
        reason = "engine_refused" if refused else error.code or "error"
        self.metrics.count("oserve_request_errors", reason)
        try:
            session.fail(error)
        finally:
            if not session.exchange.done:
                session.exchange.abort()

    def _survey(self, command: do.Survey) -> None:
        progress: dict[int, on.Progress] = {}
        for number in command.numbers:
            session = self.active.get(number)
            if session is not None:
                try:
                    progress[number] = session.progress()
                except Exception as error:  # the others of that replica are to leave it
                    self._crashed(number, error)
        self.report(on.Surveyed(command.replica, command.started_s, progress))

    def _record(self, command: do.Record, session: Session) -> None:
        del self.active[session.number]
        self.tracer.ended(session, command)
        session.end()
        reason = _SHOWN_ERRORS.get(command.status)
        if reason is not None and not session.refused:
            self.metrics.count("oserve_request_errors", reason)
        spent_tokens = self.tenants.ended(session, command)
        if spent_tokens is not None and command.charge is not None:
            self.machine.settle_charge(command.charge, spent_tokens)
        if session.estimate is not None:
            self._accounting.ended(session, session.estimate, command)

    def _drop_options(self, replica: TableReplica) -> None:
        """Stop sending ``stream_options`` to a server."""
        start = (replica.id, replica.started_s)
        if start not in self._without_options:
            self._without_options.add(start)
            _log.info("replica %s refuses stream_options; OServe stops sending it", replica.id)

    def close(self) -> None:
        """Abort the running requests, and finish writing records."""
        self.report(on.ShutDown())
        for pool in self._pools.values():
            pool.fail_all()
        if self._timer is not None:
            self._timer.cancel()
        if self.records is not None:
            self.records.close()
        self.tracer.close()
