"""A queue of long work, one piece per turn of the event loop."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from oserve.core.faults import fault

_log = logging.getLogger("oserve.gateway")


class YieldQueue:
    """Runs pieces of work in order, one per turn of the event loop."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()

    def __call__(self, work: Callable[[], None]) -> None:
        """Queue a piece of work."""
        self._work.append(work)
        if len(self._work) == 1:
            asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        try:
            self._work[0]()
        except Exception as error:  # the next piece belongs to another request
            _log.error("a piece of work failed: %s", fault(error))
        finally:
            self._work.popleft()
            if self._work:
                asyncio.get_running_loop().call_soon(self._take)
