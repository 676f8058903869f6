"""Work in the background that is done whenever it is due, and whose faults do not end it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oserve.core import Clock

_log = logging.getLogger("oserve.nodes")


class DueWork:
    """Does ``work`` once for all that has made it due until then, and again when it is due again.

    ``settle_s``: it begins so long after it became due, since what makes it due comes in bursts.
    ``every_s``: it is due by itself so long after it was done last. A fault that nobody foresaw is
    logged as ``fault``, and the work is due again after ``again_s``.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[None]],
        clock: Clock,
        *,
        fault: str,
        again_s: float = 30.0,
        settle_s: float = 0.0,
        every_s: float | None = None,
    ) -> None:
        self._work = work
        self._clock = clock
        self._fault = fault
        self._again_s = again_s
        self._settle_s = settle_s
        self._every_s = every_s
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._busy = False

    @property
    def idle(self) -> bool:
        """Whether it is neither under way nor due."""
        return not self._busy and not self._due.is_set()

    def begin(self) -> None:
        """It is due, and is done from now on."""
        self._due.set()
        if self._task is None:
            self._task = asyncio.create_task(self.run())

    def refresh(self) -> None:
        """It is due."""
        self._due.set()

    async def close(self) -> None:
        """Do it no more; what is under way is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def run(self) -> None:
        """Do it whenever it is due, until cancelled: for who has a task already."""
        while True:
            await self._wait()
            self._busy = True
            if self._settle_s:
                await self._clock.sleep(self._settle_s)
            self._due.clear()
            try:
                await self._work()
            # What nobody foresaw must end neither this work nor the server.
            except Exception:
                _log.exception("%s; tried again in %g s", self._fault, self._again_s)
                await self._clock.sleep(self._again_s)
                self._due.set()
            self._busy = False

    async def _wait(self) -> None:
        """Until it is due."""
        if self._every_s is None or self._due.is_set():
            await self._due.wait()
            return
        waits = [
            asyncio.ensure_future(self._due.wait()),
            asyncio.ensure_future(self._clock.sleep(self._every_s)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
