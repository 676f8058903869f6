"""A gateway process: ``python -m oserve.gateway.process.worker``, held by the keeper.

Its orders come as one JSON line on standard input; it ends when that closes, so it cannot outlive
the keeper. What it serves it learns from the hub; while no hub answers it goes on as it is.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from oserve.gateway.http.server import Gateway
from oserve.gateway.process.collection import rare_collections
from oserve.gateway.process.hub import SYNC_INTERVAL_S, HubClient
from oserve.gateway.records import RecordStore
from oserve.gateway.settings import GatewaySettings
from oserve.workload.output import OutputEstimator


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a gateway process must know at its start."""

    process: int
    hub: str
    models: tuple[str, ...]
    api_keys: list[str]
    settings: GatewaySettings
    estimator: dict[str, Any] | None = None


async def _run(orders: WorkerConfig) -> None:
    settings = orders.settings
    records = RecordStore(Path(settings.records_file), max_records=settings.max_records)
    gateway = Gateway(
        settings,
        models=orders.models,
        api_keys=frozenset(orders.api_keys),
        records=records,
        estimator=None if orders.estimator is None else OutputEstimator.restored(orders.estimator),
    )
    client = HubClient(orders.hub, gateway.runner)
    gateway.refresh = client.sync
    gateway.away_s = client.away_s
    gateway.operate = client.operate
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    # Ctrl-C reaches the whole terminal group; the server tells us when to end.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(sys.stdin.fileno(), _watch_input, ended)
    # The server may be killed while this starts: then the next one is waited for.
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
        # The last counts.
        await _synced(client)
        await client.close()


async def _synced(client: HubClient) -> bool:
    """One exchange; a hub that does not answer leaves the last table in force."""
    try:
        await client.sync()
    except ConnectionError:
        return False
    return True


def _watch_input(ended: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        ended.set()


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    rare_collections()
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    uvloop.run(_run(orders))


if __name__ == "__main__":
    main()
