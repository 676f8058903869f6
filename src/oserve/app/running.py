"""A server from its start to its end: signals, readiness, the grace of running requests."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

from oserve.app.serve import OServeServer


async def serve_until_stopped(server: OServeServer, *, announce: Callable[[int], None]) -> int:
    """Run until Ctrl-C or SIGTERM; returns the exit status.

    A second Ctrl-C ends without waiting for running requests.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    presses = 0

    def _on_signal() -> None:
        nonlocal presses
        presses += 1
        stop.set()
        if presses > 1:
            for task in asyncio.all_tasks(loop):
                if task.get_name() == "grace":
                    task.cancel()

    # A terminal that closes ends the server, unless it was started to survive that.
    closed = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *closed):
        loop.add_signal_handler(number, _on_signal)
    running: asyncio.Task[None] | None = None
    status = 0
    try:
        port = await server.start()
        running = asyncio.create_task(server.run())
        ready = asyncio.create_task(server.ready.wait())
        stopped = asyncio.create_task(stop.wait())
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
        closing = asyncio.create_task(server.close(), name="grace")
        with contextlib.suppress(asyncio.CancelledError):
            await closing
    return status
