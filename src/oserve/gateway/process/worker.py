"""A gateway process: ``python -m oserve.gateway.process.worker``, held by the keeper.

It reads its ``GatewayWorkerConfig`` as one JSON line from standard input and ends when that closes,
so it cannot outlive the keeper. The hub sends it the routing table; while no hub answers, it serves
on with the last one.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from oserve.gateway.http.server import Gateway
from oserve.gateway.process.client import SYNC_INTERVAL_S, HubClient
from oserve.gateway.process.collection import rare_collections
from oserve.gateway.process.messages import GatewayWorkerConfig
from oserve.gateway.records import RecordStore
from oserve.workload.output import OutputEstimator


async def _run(config: GatewayWorkerConfig) -> None:
    settings = config.settings
    records = RecordStore(Path(settings.records_file), max_records=settings.max_records)
    gateway = Gateway(
        settings,
        models=config.models,
        api_keys=frozenset(config.api_keys),
        keys_file=Path(config.keys_file),
        records=records,
        estimator=None if config.estimator is None else OutputEstimator.restored(config.estimator),
    )
    client = HubClient(config.hub, gateway.runner, shares=settings.processes > 1)
    gateway.refresh = client.sync
    gateway.away_s = client.away_s
    gateway.operate = client.operate
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    # Ctrl-C reaches every process of the terminal; the server alone decides when this one ends.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(sys.stdin.fileno(), _end_at_eof, ended)
    # The server may be killed while this starts: then wait for the hub of the next one.
    while not await _synced(client) and not ended.is_set():  # noqa: ASYNC110
        await asyncio.sleep(SYNC_INTERVAL_S)
    client.port = await gateway.listen()
    try:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), SYNC_INTERVAL_S)
            await _synced(client)
    finally:
        await gateway.close()
        # Report the last counts.
        await _synced(client)
        await client.close()


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
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=GatewayWorkerConfig)
    uvloop.run(_run(config))


if __name__ == "__main__":
    main()
