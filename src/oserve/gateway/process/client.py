"""The hub as a gateway process sees it."""

import asyncio
import os
import time

import msgspec

from oserve.control.dispatch import events as on
from oserve.gateway.access.door import Door
from oserve.gateway.process.home import localised
from oserve.gateway.process.hub_lines import HubLine
from oserve.gateway.process.messages import (
    GatewayHome,
    HubMessage,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    ProcessMessage,
    WorkerReport,
)
from oserve.gateway.process.outbox import RecordOutbox
from oserve.gateway.process.sent_table import Hatches, received
from oserve.gateway.process.spending import SpendingOutbox, by_flow, by_name
from oserve.gateway.runner import RequestRunner

SYNC_INTERVAL_S = 0.1
# The timeout of a report.
_SYNC_LIMIT_S = 5.0
# A busy server may answer late; a hub silent for longer than this counts as out of reach.
_AWAY_S = 1.0
# Documents of a large cluster are too long for every report. They are read when somebody asks for
# them, and this often, so that they are there while no server is.
_DOCUMENTS_S = 5.0
_DOCUMENTS_ELSEWHERE_S = 60.0
# From another node one report in ten has all counters: a process that is killed loses no more.
_METRICS_REPORTS = 10
# The hub has this long for each process on another node, so that many cost it no more than few.
_SHARE_S = 0.008

_DECODER: msgspec.json.Decoder[HubMessage] = msgspec.json.Decoder(HubMessage)


class HubClient:
    """Reports to the hub and applies its replies. Set ``port`` once the process listens.

    ``home``: of a process on another node. ``outbox``: records that go with the reports. ``door``:
    gets the keys that the hub sends. ``shares``: there are other processes, whose tenants share
    limits with those of this one.
    """

    def __init__(
        self,
        hub: HubLine,
        runner: RequestRunner,
        incarnation: int | None = None,
        *,
        home: GatewayHome | None = None,
        outbox: RecordOutbox | None = None,
        door: Door | None = None,
        shares: bool = True,
    ) -> None:
        self._shares = shares
        self._door = door
        self._keys = ""
        self._spending = SpendingOutbox()
        self._heard = 0
        self._hub = hub
        self._home = home
        self._outbox = outbox
        self._without_metrics = _METRICS_REPORTS
        self._hatches: Hatches = {}
        self._documents_s = _DOCUMENTS_S if home is None else _DOCUMENTS_ELSEWHERE_S
        self._last_reply_s = time.monotonic()
        self.port = 0
        self._incarnation = incarnation or os.getpid()
        self._runner = runner
        self._version = 0
        self._whole_s = -_DOCUMENTS_S
        # Replies are applied in the order of their reports: state never goes back in time.
        self._lock = asyncio.Lock()

    async def sync(self, *, whole: bool = True) -> None:
        """One report and its reply; raises ConnectionError if the hub does not answer.

        ``whole``: with the documents of the cluster, which otherwise come every few seconds.
        """
        async with self._lock:
            sums = whole
            whole = whole or time.monotonic() - self._whole_s >= self._documents_s
            report = self._report(whole=whole, sums=sums)
            reply = await self._ask(report, _SYNC_LIMIT_S)
            if isinstance(reply, HubReply):
                self._without_metrics = self._without_metrics + 1 if report.metrics is None else 0
                self._apply(reply)

    @property
    def interval_s(self) -> float:
        """Seconds between two reports."""
        many = 0 if self._home is None else self._runner.snapshot.processes
        return max(SYNC_INTERVAL_S, _SHARE_S * many)

    def _report(self, *, whole: bool, sums: bool) -> WorkerReport:
        runner = self._runner
        first_record, records = (0, []) if self._outbox is None else self._outbox.next()
        uses, charges = (
            runner.tenants.limits.take_uses(),
            runner.machine.waiting.fair.take_charges(),
        )
        if self._shares:
            self._spending.add(uses, by_name(charges))
        metrics = None
        if self._home is None or sums or self._without_metrics >= _METRICS_REPORTS - 1:
            metrics = runner.metrics.snapshot()
        return WorkerReport(
            incarnation=self._incarnation,
            counts=runner.estimator.tally.take(time.time()),
            outstanding={
                name: work for name, work in runner.outstanding().items() if work != (0.0, 0)
            },
            metrics=metrics,
            sent_s=time.time(),
            first_record=first_record,
            records=records,
            queued=runner.queued,
            table=self._version,
            port=self.port,
            open_breakers=runner.open_breakers(),
            whole=whole,
            sums=sums,
            keeps_hatches=self._home is not None,
            tenants=runner.tenants.limits.loads(runner.machine.waiting.owned)
            if self._shares
            else {},
            spent=self._spending.take(),
            heard=self._heard,
            keys=None if self._door is None else self._keys,
        )

    def _apply(self, reply: HubReply) -> None:
        self._last_reply_s = time.monotonic()
        if self._door is not None and reply.keys is not None:
            self._door.use(reply.keys)
            self._keys = reply.keys_version
        self._runner.estimator.tally.acknowledge(reply.counted)
        if self._outbox is not None:
            self._outbox.acknowledge(reply.recorded)
        snapshot = reply.snapshot
        if reply.whole:
            self._whole_s = self._last_reply_s
        else:
            last = self._runner.snapshot
            snapshot = msgspec.structs.replace(
                snapshot,
                status=last.status,
                switches=last.switches,
                page=last.page,
                gauges=last.gauges,
                counters=last.counters,
            )
        if not reply.snapshot.metrics:
            snapshot = msgspec.structs.replace(snapshot, metrics=self._runner.snapshot.metrics)
        self._runner.apply(snapshot)
        self._spending.confirm(reply.spent)
        spending = reply.spending
        if spending.number and spending.number != self._heard:
            self._heard = spending.number
            self._runner.tenants.limits.used_elsewhere(spending.uses, self._last_reply_s)
            self._runner.report(on.ChargedElsewhere(by_flow(spending.charges)))
        table = None if reply.table is None else reply.table.unpacked()
        if reply.sent_table:
            try:
                known = self._hatches | reply.hatches
                table, self._hatches = received(reply.sent_table, known)
            except ValueError as error:
                # The next report asks for all of it.
                self._version, self._hatches = 0, {}
                raise ConnectionError(f"the table cannot be read: {error}") from None
        if table is not None:
            self._runner.update(localised(table, self._home))
        self._version = reply.version

    def away_s(self) -> float:
        """Seconds for which the hub has been unreachable; 0 while it answers."""
        silent_s = time.monotonic() - self._last_reply_s
        return silent_s if silent_s > _AWAY_S else 0.0

    async def operate(
        self, path: str, body: bytes, actor: str = "", source: str = ""
    ) -> tuple[int, bytes]:
        """Forward an operator's call; raises ConnectionError if the hub does not answer."""
        call = OperatorCall(path=path, body=body, actor=actor, source=source)
        answer = await self._ask(call, None)
        if isinstance(answer, OperatorAnswer):
            return answer.status, answer.body
        raise ConnectionError("the hub answered with a message of another type")

    async def _ask(self, message: ProcessMessage, limit_s: float | None) -> HubMessage:
        try:
            return _DECODER.decode(await self._hub.ask(msgspec.json.encode(message), limit_s))
        except (OSError, msgspec.DecodeError) as error:
            raise ConnectionError(f"the hub does not answer: {error}") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._hub.close()
