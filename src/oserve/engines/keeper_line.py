"""A connection as a keeper sees it: how long it is silent, and whose the keeper is."""

import asyncio
import logging
from collections.abc import Callable

from oserve.core import Clock
from oserve.engines.keeper_messages import KeeperEvent, ServerHello, ServerRefused, encoded
from oserve.engines.line_watch import PING_S, LineWatch

_log = logging.getLogger("oserve.keeper")


def refusal_of(
    hello: ServerHello, owned: ServerHello | None, *, served: bool
) -> ServerRefused | None:
    """Why a server cannot have the keeper; ``None`` if it can.

    ``owned``: of the server that has it, or has left processes there; ``served``: it is connected.
    Two servers that took the keeper from each other by turns would end every engine.
    """
    if owned is None or not hello.owner or not owned.owner or hello.owner == owned.owner:
        return None
    return ServerRefused(title=owned.title, grace_s=0.0 if served else owned.grace_s)


class KeeperLine:
    """A connection of a server or a guest."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.watch: LineWatch | None = None
        self.silent = False
        self.refused = False
        self.task = asyncio.current_task()
        self.watching: asyncio.Task[None] | None = None

    def send(self, event: KeeperEvent) -> None:
        if not self.writer.is_closing():
            self.writer.write(encoded(event))

    async def watch_silence(
        self, clock: Clock, limit_s: float, fell_silent: Callable[["KeeperLine"], None]
    ) -> None:
        """Tell when nothing has come for so long.

        The connection stays: breaking it would cost a server that was held up all nodes at once.
        """
        self.watch = LineWatch(clock.now(), limit_s)
        while True:
            if self.watch.is_lost(clock.now()) and not self.silent:
                _log.warning("nothing has been heard of the server for %g s", limit_s)
                self.silent = True
                fell_silent(self)
            await clock.sleep(PING_S)
