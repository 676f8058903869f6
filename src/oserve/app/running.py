"""Runs a server: signals, readiness, and the grace period of running requests."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

from oserve.app.server import OServeServer


class _StopSignals:
    """``stop`` is set by the first signal; the second also cancels ``closing``."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.closing: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Handle SIGINT, SIGTERM, and SIGHUP unless the process was started to survive it."""
        closed = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
        for number in (signal.SIGINT, signal.SIGTERM, *closed):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.stop.is_set() and self.closing is not None:
            self.closing.cancel()
        self.stop.set()


async def serve_until_stopped(server: OServeServer, *, announce: Callable[[int], None]) -> int:
    """Run until Ctrl-C or SIGTERM; returns the exit status.

    ``announce`` gets the port once the server is ready. A second Ctrl-C ends the server without
    waiting for running requests.
    """
    signals = _StopSignals()
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
