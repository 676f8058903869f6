"""The hub: where gateway processes meet the control loop.

Each gateway process posts what it has outstanding, its counters and what it counted of arrivals,
and gets back the routing table, the outstanding work of the others and the sum of all counters: one
small exchange over a Unix socket several times a second. Counts have numbers and are sent until
they are acknowledged, so that none is lost or taken twice. While no hub answers, what a process
heard last stays in force; the hub of the next server hears of it at its next exchange.
"""

import asyncio
import math
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.gateway.metrics import merged
from oserve.gateway.runner import RequestRunner
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import Server

SYNC_INTERVAL_S = 0.1
# An exchange not over by then has failed.
_SYNC_LIMIT_S = 5.0
# The hub of a server that thinks hard may answer late.
_AWAY_S = 1.0
# Counts that nobody takes are given up past so many batches.
_MOST_BATCHES = 10_000
# Histograms of every type and replica are a few KiB; a counter update is far below this.
_MAX_REPORT_BYTES = 4 * 1024 * 1024


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway process tells the hub. ``table`` is the version it has.

    ``incarnation`` is its process id. ``port``: where it listens; 0 before. ``set_aside``: replicas
    that it gives no requests now: why, and for how many seconds more.
    """

    incarnation: int
    counts: Batch
    outstanding: dict[str, tuple[float, int]]
    metrics: dict[str, dict[str, list[float]]]
    queued: int
    table: int
    port: int = 0
    set_aside: dict[str, tuple[str, float]] = {}


class HubReply(msgspec.Struct, frozen=True, kw_only=True):
    """What it hears back; ``table`` only when it is newer than the one it has.

    ``counted`` is the number of the batch that was taken.
    """

    version: int
    counted: int
    snapshot: ClusterSnapshot
    table: RoutingTable | None = None


Operate = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""An operator's call: its path and body, answered by a status and a body."""


class Hub:
    """Holds the current table and snapshot, and the latest report of each process.

    ``operate`` answers operators' calls that gateway processes pass on.
    """

    def __init__(self, operate: Operate | None = None) -> None:
        self._operate = operate
        self._calls: set[asyncio.Task[None]] = set()
        self._batches: list[Batch] = []
        self._counted: dict[int, int] = {}
        self._table: RoutingTable | None = None
        # A process that comes from another hub must not take its old table for the one here.
        self._version = secrets.randbits(48)
        self._snapshot = ClusterSnapshot()
        # By incarnation, since one that ends slowly may still report beside the next.
        self._reports: dict[int, WorkerReport] = {}
        self._forgotten: set[int] = set()
        self._ended: dict[str, dict[str, list[float]]] = {}
        self._listening: dict[int, asyncio.Future[int]] = {}
        self._hand_overs: dict[str, tuple[float, float]] = {}
        self._server: Server | None = None

    async def listen(self, unix_socket: str) -> None:
        """Open the socket that gateway processes talk to."""
        self._server = await serve(
            self._handle,
            refuse=lambda exchange, status, _: exchange.respond(status, b"", close=True),
            limits=ServerLimits(max_body_bytes=_MAX_REPORT_BYTES),
            unix_socket=unix_socket,
        )

    def publish(self, table: RoutingTable, snapshot: ClusterSnapshot) -> None:
        """Make a table and a snapshot current."""
        if table != self._table:
            self._table = table
            self._version += 1
            present = {(item.id, item.started_s) for item in table.replicas}
            orders = self._hand_overs.items()
            self._hand_overs = {name: told for name, told in orders if (name, told[0]) in present}
        self._snapshot = snapshot

    def expect(self, incarnation: int) -> "asyncio.Future[int]":
        """The port of the gateway process of that id, once it listens there and has told."""
        return self._listening.setdefault(incarnation, asyncio.get_running_loop().create_future())

    def batches(self) -> list[Batch]:
        """What all processes counted since the last call."""
        taken, self._batches = self._batches, []
        return taken

    @property
    def set_aside(self) -> dict[str, tuple[str, float]]:
        """Replicas that a gateway process gives no requests: why, and for how many seconds more."""
        found: dict[str, tuple[str, float]] = {}
        for report in self._reports.values():
            for name, told in report.set_aside.items():
                if name not in found or told[1] > found[name][1]:
                    found[name] = told
        return found

    @property
    def counted_until_s(self) -> float:
        """Unix time up to which all processes have told what they counted; infinity if none runs.

        A process that the machine leaves no time reports late what it counted in time.
        """
        return min((item.counts.until_s for item in self._reports.values()), default=math.inf)

    def forget(self, incarnation: int) -> None:
        """A gateway process ended: its outstanding work is gone; its counters stay counted."""
        self._forgotten.add(incarnation)
        self._counted.pop(incarnation, None)
        self._listening.pop(incarnation, None)
        report = self._reports.pop(incarnation, None)
        if report is not None:
            self._ended = merged([self._ended, report.metrics])

    def hand_over(self, replica: str, within_s: float) -> None:
        """Have every process let a replica's running requests go on elsewhere."""
        for item in self._table.replicas if self._table is not None else ():
            if item.id == replica:
                self._hand_overs[replica] = (item.started_s, within_s)

    async def close(self) -> None:
        """Close the socket."""
        if self._server is not None:
            await self._server.close()

    def _handle(self, exchange: Exchange) -> None:
        if exchange.path != b"/sync":
            call = asyncio.ensure_future(self._answer(exchange))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            return
        report = msgspec.json.decode(exchange.body, type=WorkerReport)
        self._count(report)
        if report.incarnation not in self._forgotten:
            self._reports[report.incarnation] = report
        listening = self._listening.get(report.incarnation)
        if report.port and listening is not None and not listening.done():
            listening.set_result(report.port)
        others = [r for r in self._reports.values() if r.incarnation != report.incarnation]
        elsewhere: dict[str, tuple[float, int]] = {}
        for other in others:
            for name, (owed_s, count) in other.outstanding.items():
                sum_s, total = elsewhere.get(name, (0.0, 0))
                elsewhere[name] = (sum_s + owed_s, total + count)
        snapshot = msgspec.structs.replace(
            self._snapshot,
            elsewhere=elsewhere,
            metrics=merged([self._ended, *(item.metrics for item in self._reports.values())]),
            queued=sum(other.queued for other in others),
            hand_overs=self._hand_overs,
        )
        newer = self._table if report.table != self._version else None
        reply = HubReply(
            version=self._version, counted=report.counts.number, snapshot=snapshot, table=newer
        )
        exchange.respond(200, msgspec.json.encode(reply))

    def _count(self, report: WorkerReport) -> None:
        """Take a batch unless it is the one that was taken last."""
        if self._counted.get(report.incarnation) == report.counts.number:
            return
        self._counted[report.incarnation] = report.counts.number
        if not report.counts.empty:
            self._batches.append(report.counts)
            del self._batches[:-_MOST_BATCHES]

    async def _answer(self, exchange: Exchange) -> None:
        status, body = 503, b"{}"
        if self._operate is not None:
            status, body = await self._operate(exchange.path.decode("latin-1"), exchange.body)
        exchange.respond(status, body)


class HubClient:
    """A gateway process' side. Set ``port`` once it listens."""

    def __init__(
        self, unix_socket: str, runner: RequestRunner, incarnation: int | None = None
    ) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(unix_socket))
        self._heard_s = time.monotonic()
        self.port = 0
        self._incarnation = incarnation or os.getpid()
        self._runner = runner
        self._version = 0
        # Replies are taken in the order they were given, so that nothing goes back in time.
        self._lock = asyncio.Lock()

    async def sync(self) -> None:
        """One exchange; raises ConnectionError when the hub is gone."""
        async with self._lock:
            try:
                await self._sync()
            except (aiohttp.ClientError, OSError) as error:
                raise ConnectionError(f"the hub does not answer: {error}") from None

    async def _sync(self) -> None:
        runner = self._runner
        report = WorkerReport(
            incarnation=self._incarnation,
            counts=runner.estimator.tally.take(time.time()),
            outstanding=runner.outstanding(),
            metrics=runner.metrics.snapshot(),
            queued=runner.queued,
            table=self._version,
            port=self.port,
            set_aside=runner.set_aside(),
        )
        body: Any = msgspec.json.encode(report)
        limit = aiohttp.ClientTimeout(total=_SYNC_LIMIT_S)
        async with self._session.post("http://hub/sync", data=body, timeout=limit) as answer:
            reply = msgspec.json.decode(await answer.read(), type=HubReply)
        self._heard_s = time.monotonic()
        self._version = reply.version
        runner.estimator.tally.acknowledge(reply.counted)
        runner.tell(reply.snapshot)
        if reply.table is not None:
            runner.update(reply.table)

    def away_s(self) -> float:
        """For how long the hub has not answered, seconds; 0 while it does."""
        silent_s = time.monotonic() - self._heard_s
        return silent_s if silent_s > _AWAY_S else 0.0

    async def operate(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Pass an operator's call on; raises ConnectionError when the hub is gone."""
        try:
            async with self._session.post("http://hub" + path, data=body) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionError(f"the hub does not answer: {error}") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._session.close()
