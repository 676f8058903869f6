"""A keeper's end of a connection, and how long it has been silent."""

import asyncio
import logging
from collections.abc import Callable

from oserve.core import Clock
from oserve.engines.keeper_messages import KeeperEvent, encoded
from oserve.engines.line_watch import PING_S, LineWatch

_log = logging.getLogger("oserve.keeper")


class KeeperLine:
    """A connection of a server or a guest."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.watch: LineWatch | None = None
        self.silent = False
        self.task = asyncio.current_task()
        self.watching: asyncio.Task[None] | None = None

    def send(self, event: KeeperEvent) -> None:
        if not self.writer.is_closing():
            self.writer.write(encoded(event))

    async def watch_silence(
        self, clock: Clock, limit_s: float, fell_silent: Callable[["KeeperLine"], None]
    ) -> None:
        """Tell when nothing has come for so long. It stays: the server may only be held up."""
        self.watch = LineWatch(clock.now(), limit_s)
        while True:
            if self.watch.is_lost(clock.now()) and not self.silent:
                _log.warning("nothing has been heard of the server for %g s", limit_s)
                self.silent = True
                fell_silent(self)
            await clock.sleep(PING_S)
