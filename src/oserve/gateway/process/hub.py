"""The hub: where gateway processes and the control loop exchange state.

Several times a second each gateway process reports its outstanding work, its metrics and the
arrivals it counted. The hub replies with the routing table, the outstanding work of the other
processes and the sum of all metrics. Batches of counts are numbered and sent until the hub
acknowledges them, so no count is lost or added twice. While no hub answers, a process serves on
with the last reply; it then reports to the hub of the next server.

Processes beside the server connect to the hub; those on other nodes are called (``hub_call``), and
their request records come with their reports.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.gateway.process.messages import (
    MESSAGE_PATH,
    PROCESS_MESSAGES,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    WorkerReport,
)
from oserve.gateway.process.outbox import RecordInbox
from oserve.gateway.process.packed_table import PackedTable, packed
from oserve.gateway.process.reports import MetricSums, ProcessView, ReportBook
from oserve.gateway.process.sent_table import SentTable
from oserve.gateway.process.shared_keys import SharedKeys
from oserve.gateway.process.spending import SpendingExchange
from oserve.gateway.records import RecordSink
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer

# Batches that the control loop does not take are dropped beyond this number, oldest first.
_MOST_BATCHES = 10_000
# Histograms of every type and replica are a few KiB; an operator's plan is smaller than a MiB.
_MOST_SENT = 8
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_log = logging.getLogger("oserve.gateway")

OperatorCallHandler = Callable[[OperatorCall], Awaitable[OperatorAnswer]]


class Hub:
    """Holds the current table and snapshot, and the latest report of each process.

    ``operate`` answers the operators' calls that gateway processes pass on. ``records`` takes the
    request records of processes on other nodes, which get ``keys``. ``now``, ``unix``: monotonic
    and Unix time (s).
    """

    def __init__(
        self,
        operate: OperatorCallHandler | None = None,
        records: RecordSink | None = None,
        keys: SharedKeys | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._operate = operate
        self._records = records
        self._keys = keys
        self._now = now
        self._unix = unix
        self._calls: set[asyncio.Task[None]] = set()
        self._batches: list[Batch] = []
        self._counted: dict[int, int] = {}
        self._table: RoutingTable | None = None
        self._packed: PackedTable | None = None
        # By version: what processes on other nodes know by the table that they use.
        self._sent: OrderedDict[int, SentTable] = OrderedDict()
        # Random, so that a process does not take the table of an earlier hub for the current one.
        self._version = secrets.randbits(48)
        self._snapshot = ClusterSnapshot()
        self._book = ReportBook()
        self._inbox = RecordInbox()
        self._spending = SpendingExchange()
        self._shifted: dict[str, int] = {}
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
        self._book.expire(self._now())
        return self._book.open_breakers

    def metrics(self) -> MetricSums:
        """The sums over all processes since the start."""
        self._book.expire(self._now())
        return self._book.metrics()

    @property
    def tier_outcomes(self) -> dict[str, dict[str, int]]:
        """By tier, how many requests ended in which way, over all processes since the start."""
        found: dict[str, dict[str, int]] = {}
        for labels, numbers in self.metrics().get("oserve_tier_requests", {}).items():
            tier, outcome = labels.split("\t")
            found.setdefault(tier, {})[outcome] = int(numbers[0])
        return found

    @property
    def counted_until_s(self) -> float:
        """See ``ReportBook.counted_until_s``."""
        self._book.expire(self._now())
        return self._book.counted_until_s

    def view(self, incarnation: int) -> ProcessView | None:
        """What is known of a process; ``None`` before its first report."""
        return self._book.view(incarnation, self._now())

    def forget(self, incarnation: int) -> None:
        """A process has ended: drop its outstanding work, keep its metrics in the sum."""
        self._book.forget(incarnation)
        self._inbox.forget(incarnation)
        self._spending.forget(incarnation)
        self._counted.pop(incarnation, None)
        self._listening.pop(incarnation, None)

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
            message = PROCESS_MESSAGES.decode(exchange.body)
        except msgspec.DecodeError as error:
            exchange.respond(400, str(error).encode(), close=True)
            return
        match message:
            case WorkerReport():
                exchange.respond(200, msgspec.json.encode(self.reply(message)))
            case OperatorCall():
                call = asyncio.ensure_future(self._answer(exchange, message))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    def reply(self, report: WorkerReport, node: str = "") -> HubReply:
        """The answer to a report; ``node``: where the process runs, if not beside the server."""
        behind_s = self._book.take(report, node, self._now(), self._unix())
        if node and self._shifted.get(node, 0) != behind_s:
            self._shifted[node] = behind_s
            _log.warning("the clock of node %s differs by %d s; counts are shifted", node, behind_s)
        self._count(report, behind_s)
        self._take_records(report, behind_s)
        listening = self._listening.get(report.incarnation)
        if report.port and listening is not None and not listening.done():
            listening.set_result(report.port)
        elsewhere, queued = self._book.elsewhere(report.incarnation)
        snapshot = msgspec.structs.replace(
            self._snapshot if report.whole else ClusterSnapshot(),
            elsewhere=elsewhere,
            metrics=self._book.metrics() if report.sums else {},
            queued=queued,
            processes=self._book.processes,
            hand_overs=self._hand_overs,
            position=self._book.position(report.incarnation),
            tenants=self._book.tenants_elsewhere(report.incarnation),
        )
        changed = self._packed if report.table != self._version else None
        sent = self._sent_as(changed) if changed is not None and report.keeps_hatches else None
        known = self._sent.get(report.table)
        keys = None
        if self._keys is not None and report.keys is not None:
            keys = self._keys.newer(report.keys, self._now())
        return HubReply(
            version=self._version,
            counted=report.counts.number,
            recorded=self._inbox.taken(report.incarnation),
            snapshot=snapshot,
            table=changed if sent is None else None,
            sent_table=b"" if sent is None else sent.text,
            hatches={} if sent is None else sent.missing(known.hatches if known else ()),
            whole=report.whole,
            spent=report.spent.number,
            spending=self._spending.take(
                report.incarnation, report.spent, report.heard, self._now()
            ),
            keys=keys,
            keys_version="" if keys is None or self._keys is None else self._keys.version,
        )

    def _sent_as(self, table: PackedTable) -> SentTable:
        found = self._sent.get(self._version)
        if found is None:
            found = self._sent[self._version] = SentTable(table)
            if len(self._sent) > _MOST_SENT:
                self._sent.popitem(last=False)
        return found

    def _count(self, report: WorkerReport, behind_s: int) -> None:
        """Take a batch unless it is the last one taken, sent again."""
        if self._counted.get(report.incarnation) == report.counts.number:
            return
        self._counted[report.incarnation] = report.counts.number
        if not report.counts.empty:
            self._batches.append(report.counts.shifted(behind_s))
            del self._batches[:-_MOST_BATCHES]

    def _take_records(self, report: WorkerReport, behind_s: int) -> None:
        if not report.records:
            return
        for record in self._inbox.fresh(report.incarnation, report.first_record, report.records):
            if self._records is not None:
                moved = msgspec.structs.replace(record, arrival_s=record.arrival_s + behind_s)
                self._records.put(moved)

    async def _answer(self, exchange: Exchange, call: OperatorCall) -> None:
        exchange.respond(200, msgspec.json.encode(await self.operated(call)))

    async def operated(self, call: OperatorCall) -> OperatorAnswer:
        """The answer to an operator's call."""
        if self._operate is None:
            return OperatorAnswer(status=503, body=b"{}")
        try:
            return await self._operate(call)
        # An unforeseen fault must not leave the caller without an answer.
        except Exception as error:
            _log.exception("an operator's call of %s failed", call.path)
            reason = f"a fault of the server, see its log: {type(error).__name__}"
            return OperatorAnswer(
                status=500, body=msgspec.json.encode({"error": {"message": reason}})
            )
