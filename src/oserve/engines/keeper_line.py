"""A connection as a keeper sees it, and whose the keeper is."""

import asyncio
import logging

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
        self.refused = False
        self.task = asyncio.current_task()
        self.watching: asyncio.Task[None] | None = None

    def send(self, event: KeeperEvent) -> None:
        if not self.writer.is_closing():
            self.writer.write(encoded(event))

    async def end_if_silent(self, clock: Clock, limit_s: float) -> None:
        """Break it when nothing has come for so long."""
        self.watch = LineWatch(clock.now(), limit_s)
        while not self.watch.is_lost(clock.now()):
            await clock.sleep(PING_S)
        _log.warning("nothing has been heard of the server for %g s", limit_s)
        self.writer.transport.abort()
