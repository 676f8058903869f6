"""The hub: where gateway processes and the control loop exchange state.

Several times a second each gateway process reports its outstanding work, its metrics and the
arrivals it counted. The hub replies with the routing table, the outstanding work of the other
processes and the sum of all metrics. Batches of counts are numbered and sent until the hub
acknowledges them, so no count is lost or added twice. While no hub answers, a process serves on
with the last reply; it then reports to the hub of the next server.
"""

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.gateway.access.limits import TenantUse
from oserve.gateway.metrics import merged
from oserve.gateway.process.messages import (
    MESSAGE_PATH,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    ProcessMessage,
    WorkerReport,
)
from oserve.gateway.process.packed_table import PackedTable, packed
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer

# Batches that the control loop does not take are dropped beyond this number, oldest first.
_MOST_BATCHES = 10_000
# Histograms of every type and replica are a few KiB; an operator's plan is smaller than a MiB.
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_DECODER: msgspec.json.Decoder[ProcessMessage] = msgspec.json.Decoder(ProcessMessage)

OperatorCallHandler = Callable[[OperatorCall], Awaitable[OperatorAnswer]]


class Hub:
    """Holds the current table and snapshot, and the latest report of each process.

    ``operate`` answers the operators' calls that gateway processes pass on.
    """

    def __init__(self, operate: OperatorCallHandler | None = None) -> None:
        self._operate = operate
        self._calls: set[asyncio.Task[None]] = set()
        self._batches: list[Batch] = []
        self._counted: dict[int, int] = {}
        self._table: RoutingTable | None = None
        self._packed: PackedTable | None = None
        # Random, so that a process does not take the table of an earlier hub for the current one.
        self._version = secrets.randbits(48)
        self._snapshot = ClusterSnapshot()
        # By incarnation: a process that ends slowly may still report while its successor runs.
        self._reports: dict[int, WorkerReport] = {}
        self._ended_incarnations: set[int] = set()
        self._ended: dict[str, dict[str, list[float]]] = {}
        self._listening: dict[int, asyncio.Future[int]] = {}
        self._hand_overs: dict[str, tuple[float, float]] = {}
        self._server: HttpServer | None = None

    async def listen(self, unix_socket: str) -> None:
        """Open the socket that gateway processes connect to."""
        self._server = await serve(
            self._handle,
            refuse=lambda exchange, status, _: exchange.respond(status, b"", close=True),
            limits=ServerLimits(max_body_bytes=_MAX_MESSAGE_BYTES),
            unix_socket=unix_socket,
        )

    def publish(self, table: RoutingTable, snapshot: ClusterSnapshot) -> None:
        """Send this table and snapshot to each process with its next report."""
        if table != self._table:
            self._table, self._packed = table, packed(table)
            self._version += 1
            present = {(item.id, item.started_s) for item in table.replicas}
            pending = self._hand_overs.items()
            self._hand_overs = {
                name: order for name, order in pending if (name, order[0]) in present
            }
        self._snapshot = snapshot

    def expect(self, incarnation: int) -> "asyncio.Future[int]":
        """Completes with the port of the process with that id once it reports one."""
        return self._listening.setdefault(incarnation, asyncio.get_running_loop().create_future())

    def batches(self) -> list[Batch]:
        """Take what all processes counted since the last call."""
        taken, self._batches = self._batches, []
        return taken

    @property
    def open_breakers(self) -> dict[str, tuple[str, float]]:
        """Replicas that some process sends no requests: the reason, and the seconds left."""
        found: dict[str, tuple[str, float]] = {}
        for report in self._reports.values():
            for name, reason in report.open_breakers.items():
                if name not in found or reason[1] > found[name][1]:
                    found[name] = reason
        return found

    @property
    def tier_outcomes(self) -> dict[str, dict[str, int]]:
        """By tier, how many requests ended in which way, over all processes since the start."""
        name = "oserve_tier_requests"
        series = [self._ended.get(name, {})]
        series += [report.metrics.get(name, {}) for report in self._reports.values()]
        found: dict[str, dict[str, int]] = {}
        for labels, numbers in merged({name: item} for item in series).get(name, {}).items():
            tier, outcome = labels.split("\t")
            found.setdefault(tier, {})[outcome] = int(numbers[0])
        return found

    @property
    def counted_until_s(self) -> float:
        """Unix time up to which every process has reported its counts; infinity without processes.

        A process that gets no CPU time reports late what it counted in time.
        """
        return min((item.counts.until_s for item in self._reports.values()), default=math.inf)

    def forget(self, incarnation: int) -> None:
        """A process has ended: drop its outstanding work, keep its metrics in the sum."""
        self._ended_incarnations.add(incarnation)
        self._counted.pop(incarnation, None)
        self._listening.pop(incarnation, None)
        report = self._reports.pop(incarnation, None)
        if report is not None:
            self._ended = merged([self._ended, report.metrics])

    def hand_over(self, replica: str, within_s: float) -> None:
        """Have every process migrate the running requests of a replica within ``within_s``."""
        for item in self._table.replicas if self._table is not None else ():
            if item.id == replica:
                self._hand_overs[replica] = (item.started_s, within_s)

    async def close(self) -> None:
        """Close the socket."""
        if self._server is not None:
            await self._server.close()

    def _handle(self, exchange: Exchange) -> None:
        if exchange.path != MESSAGE_PATH:
            exchange.respond(404, b"", close=True)
            return
        try:
            message = _DECODER.decode(exchange.body)
        except msgspec.DecodeError as error:
            exchange.respond(400, str(error).encode(), close=True)
            return
        match message:
            case WorkerReport():
                exchange.respond(200, msgspec.json.encode(self._reply(message)))
            case OperatorCall():
                call = asyncio.ensure_future(self._answer(exchange, message))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    def _reply(self, report: WorkerReport) -> HubReply:
        self._count(report)
        if report.incarnation not in self._ended_incarnations:
            self._reports[report.incarnation] = report
        listening = self._listening.get(report.incarnation)
        if report.port and listening is not None and not listening.done():
            listening.set_result(report.port)
        others = [r for r in self._reports.values() if r.incarnation != report.incarnation]
        snapshot = msgspec.structs.replace(
            self._snapshot if report.whole else ClusterSnapshot(),
            elsewhere=_outstanding(others),
            metrics=merged([self._ended, *(item.metrics for item in self._reports.values())]),
            queued=sum(other.queued for other in others),
            hand_overs=self._hand_overs,
            tenants=_used(others),
            charged=_charged(others),
        )
        return HubReply(
            version=self._version,
            counted=report.counts.number,
            snapshot=snapshot,
            table=self._packed if report.table != self._version else None,
            whole=report.whole,
        )

    def _count(self, report: WorkerReport) -> None:
        """Take a batch unless it is the last one taken, sent again."""
        if self._counted.get(report.incarnation) == report.counts.number:
            return
        self._counted[report.incarnation] = report.counts.number
        if not report.counts.empty:
            self._batches.append(report.counts)
            del self._batches[:-_MOST_BATCHES]

    async def _answer(self, exchange: Exchange, call: OperatorCall) -> None:
        answer = OperatorAnswer(status=503, body=b"{}")
        if self._operate is not None:
            answer = await self._operate(call)
        exchange.respond(200, msgspec.json.encode(answer))


def _outstanding(reports: list[WorkerReport]) -> dict[str, tuple[float, int]]:
    """Seconds of work and requests per replica, summed over processes."""
    found: dict[str, tuple[float, int]] = {}
    for report in reports:
        for name, (owed_s, count) in report.outstanding.items():
            sum_s, total = found.get(name, (0.0, 0))
            found[name] = (sum_s + owed_s, total + count)
    return found


def _used(reports: list[WorkerReport]) -> dict[str, TenantUse]:
    """What tenants used, summed over processes."""
    found: dict[str, TenantUse] = {}
    for report in reports:
        for name, use in report.tenants.items():
            old = found.get(name)
            found[name] = (
                use
                if old is None
                else TenantUse(
                    old.requests + use.requests,
                    old.tokens + use.tokens,
                    old.inflight + use.inflight,
                )
            )
    return found


def _charged(reports: list[WorkerReport]) -> dict[str, float]:
    """Device-seconds charged, summed over processes."""
    found: dict[str, float] = {}
    for report in reports:
        for name, spent_s in report.charged.items():
            found[name] = found.get(name, 0.0) + spent_s
    return found
