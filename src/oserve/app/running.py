"""Runs a server: signals, readiness, and the grace period of running requests."""

import asyncio
import contextlib
from collections.abc import Callable

from oserve.app.server import OServeServer
from oserve.startup.stop_signals import StopSignals


async def serve_until_stopped(server: OServeServer, *, announce: Callable[[int], None]) -> int:
    """Run until Ctrl-C or SIGTERM; returns the exit status.

    ``announce`` gets the port once the server is ready. A second Ctrl-C ends the server without
    waiting for running requests.
    """
    signals = StopSignals()
    signals.install()
    running: asyncio.Task[None] | None = None
    status = 0
    try:
        port = await server.start()
        running = asyncio.create_task(server.run())
        ready = asyncio.create_task(server.ready.wait())
        stopped = asyncio.create_task(signals.stop.wait())
        await asyncio.wait({running, ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            announce(port)
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        ready.cancel()
        stopped.cancel()
    finally:
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        signals.closing = asyncio.create_task(server.close())
        with contextlib.suppress(asyncio.CancelledError):
            await signals.closing
    return status
