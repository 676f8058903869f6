"""The hub as a gateway process sees it."""

import asyncio
import os
import time

import msgspec

from oserve.gateway.process.messages import (
    MESSAGE_PATH,
    HubMessage,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    ProcessMessage,
    WorkerReport,
)
from oserve.gateway.runner import RequestRunner
from oserve.wire import UpstreamPool
from oserve.wire.client import post

SYNC_INTERVAL_S = 0.1
# The timeout of a report.
_SYNC_LIMIT_S = 5.0
# A busy server may answer late; a hub silent for longer than this counts as out of reach.
_AWAY_S = 1.0
# Documents of a large cluster are too long for every report. They are read when somebody asks for
# them, and this often, so that they are there while no server is.
_DOCUMENTS_S = 5.0

_DECODER: msgspec.json.Decoder[HubMessage] = msgspec.json.Decoder(HubMessage)


class HubClient:
    """Reports to the hub and applies its replies. Set ``port`` once the process listens.

    ``shares``: there are other processes, whose tenants share limits with those of this one.
    """

    def __init__(
        self,
        unix_socket: str,
        runner: RequestRunner,
        incarnation: int | None = None,
        *,
        shares: bool = True,
    ) -> None:
        self._shares = shares
        self._hub = UpstreamPool(unix_socket=unix_socket)
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
            whole = whole or time.monotonic() - self._whole_s >= _DOCUMENTS_S
            reply = await self._ask(self._report(whole=whole), _SYNC_LIMIT_S)
            if isinstance(reply, HubReply):
                self._apply(reply)

    def _report(self, *, whole: bool) -> WorkerReport:
        runner = self._runner
        return WorkerReport(
            incarnation=self._incarnation,
            counts=runner.estimator.tally.take(time.time()),
            outstanding=runner.outstanding(),
            metrics=runner.metrics.snapshot(),
            queued=runner.queued,
            table=self._version,
            port=self.port,
            open_breakers=runner.open_breakers(),
            whole=whole,
            tenants=runner.tenants.limits.use() if self._shares else {},
            charged=runner.charged() if self._shares else {},
        )

    def _apply(self, reply: HubReply) -> None:
        self._last_reply_s = time.monotonic()
        self._version = reply.version
        self._runner.estimator.tally.acknowledge(reply.counted)
        snapshot = reply.snapshot
        if reply.whole:
            self._whole_s = self._last_reply_s
        else:
            last = self._runner.snapshot
            snapshot = msgspec.structs.replace(
                snapshot,
                status=last.status,
                switches=last.switches,
                gauges=last.gauges,
                counters=last.counters,
            )
        self._runner.apply(snapshot)
        if reply.table is not None:
            self._runner.update(reply.table.unpacked())

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
            _, body = await post(
                self._hub, MESSAGE_PATH, msgspec.json.encode(message), timeout_s=limit_s
            )
            return _DECODER.decode(body)
        except (OSError, msgspec.DecodeError) as error:
            raise ConnectionError(f"the hub does not answer: {error}") from None

    async def close(self) -> None:
        """Close the connection."""
        self._hub.close_idle()
