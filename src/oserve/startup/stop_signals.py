"""The signals that end a server."""

import asyncio
import signal


class StopSignals:
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
