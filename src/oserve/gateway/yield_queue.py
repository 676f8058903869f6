"""Work that may hold up the event loop, a piece a turn."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from oserve.core.faults import fault

_log = logging.getLogger("oserve.gateway")


class YieldQueue:
    """Pieces of work in order; each waits until the loop has gone round once more."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()

    def __call__(self, work: Callable[[], None]) -> None:
        """Do a piece of work in its turn."""
        self._work.append(work)
        if len(self._work) == 1:
            asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        try:
            self._work[0]()
        except Exception as error:  # the next piece is another request's
            _log.error("a piece of work failed: %s", fault(error))
        finally:
            self._work.popleft()
            if self._work:
                asyncio.get_running_loop().call_soon(self._take)
