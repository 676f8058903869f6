"""A gateway process: ``python -m oserve.gateway.process.worker``, held by a keeper.

It reads its ``GatewayWorkerConfig`` as one JSON line from standard input and ends when that closes,
so it cannot outlive the keeper. The hub sends it the routing table; while no hub answers, it serves
on with the last one. On another node than the server it does so for a limited time.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvloop

from oserve.gateway.http.server import Gateway
from oserve.gateway.process.client import SYNC_INTERVAL_S, HubClient
from oserve.gateway.process.collection import rare_collections
from oserve.gateway.process.hub_lines import CalledLine, HubLine, SocketLine
from oserve.gateway.process.messages import GatewayHome, GatewayWorkerConfig
from oserve.gateway.process.outbox import RecordOutbox
from oserve.gateway.records import RecordStore
from oserve.gateway.settings import GatewaySettings
from oserve.workload.output import OutputEstimator

_GATEWAY_WORKER_CONFIG_DECODER = msgspec.json.Decoder(GatewayWorkerConfig)

_log = logging.getLogger("oserve.gateway")


async def _run(config: GatewayWorkerConfig) -> None:
    settings = config.settings
    outbox = None if config.home is None else RecordOutbox()
    gateway = Gateway(
        settings,
        models=config.models,
        api_keys=frozenset(config.api_keys),
        keys_file=Path(config.keys_file) if config.keys_file else None,
        records=_store(settings) if outbox is None else outbox,
        estimator=None if config.estimator is None else OutputEstimator.restored(config.estimator),
    )
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    # Ctrl-C reaches every process of the terminal; the server alone decides when this one ends.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(sys.stdin.fileno(), _end_at_eof, ended)
    async with _line(config) as line:
        client = HubClient(
            line,
            gateway.runner,
            config.incarnation or None,
            home=config.home,
            outbox=outbox,
            # The keys are there before the port opens.
            door=None if config.home is None else gateway.door,
            shares=settings.processes > 1 or settings.placement != "server",
        )
        gateway.refresh = client.sync
        gateway.away_s = client.away_s
        gateway.operate = client.operate
        # The server may be killed while this starts: then wait for the hub of the next one.
        while not await _synced(client) and not ended.is_set():  # noqa: ASYNC110
            await asyncio.sleep(SYNC_INTERVAL_S)
        client.port = await gateway.listen()
        alone = Alone(config.home)
        try:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), client.interval_s)
                await _synced(client)
                if alone.too_long(client.away_s()):
                    break
        finally:
            await _leave(gateway, client, outbox)


def _store(settings: GatewaySettings) -> RecordStore:
    return RecordStore(Path(settings.records_file), max_records=settings.max_records)


async def _leave(gateway: Gateway, client: HubClient, outbox: RecordOutbox | None) -> None:
    """End running requests within their grace, and report to the last."""
    closing = asyncio.ensure_future(gateway.close())
    while not closing.done():
        await _synced(client)
        await asyncio.wait({closing}, timeout=SYNC_INTERVAL_S)
    closing.result()
    # The last counts, and the records that are left.
    while await _synced(client) and outbox is not None and not outbox.empty:
        pass
    await client.close()


class Alone:
    """Watches the time that a process on another node serves without the hub, and tells of it."""

    def __init__(self, home: GatewayHome | None) -> None:
        self._home = home
        self._told = False

    def too_long(self, away_s: float) -> bool:
        """Whether it has served alone for longer than it may."""
        if self._home is None:
            return False
        if bool(away_s) != self._told:
            self._told = bool(away_s)
            if away_s:
                _log.warning(
                    "the server is out of reach: this gateway serves on by the last routing table, "
                    "for at most %.0f s",
                    self._home.alone_s,
                )
            else:
                _log.info("the server is in reach again")
        if away_s <= self._home.alone_s:
            return False
        _log.error("the server has been out of reach for %.0f s: this gateway ends", away_s)
        return True


@contextlib.asynccontextmanager
async def _line(config: GatewayWorkerConfig) -> AsyncIterator[HubLine]:
    """The way to the hub; on another node, in a folder of the process's own."""
    if config.home is None:
        yield SocketLine(config.hub)
        return
    folder = Path(config.hub).parent
    # One that was killed has left it.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    line = CalledLine()
    try:
        await line.listen(config.hub)
        yield line
    finally:
        await line.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _synced(client: HubClient) -> bool:
    """One report. If the hub does not answer, the last routing table stays in force."""
    try:
        await client.sync(whole=False)
    except ConnectionError:
        return False
    return True


def _end_at_eof(ended: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        ended.set()


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    rare_collections()
    config = _GATEWAY_WORKER_CONFIG_DECODER.decode(sys.stdin.buffer.readline())
    uvloop.run(_run(config))


if __name__ == "__main__":
    main()
