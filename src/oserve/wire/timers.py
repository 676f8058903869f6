"""Deadlines on the running event loop: one timer of the loop serves all of them."""

import asyncio
import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from oserve.core.deadlines import Deadlines

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """Calls ``act`` with each key whose deadline has passed; see ``Deadlines`` for its precision.

    ``act`` must not raise. Keys may be set and cancelled within it.
    """

    __slots__ = ("_act", "_deadlines", "_handle", "_loop", "_wake_s")

    def __init__(self, act: Callable[[K], None], *, tick_s: float = 0.05) -> None:
        self._act = act
        self._deadlines: Deadlines[K] = Deadlines(tick_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._wake_s = math.inf

    def set(self, key: K, seconds: float) -> None:
        """Set the deadline of a key to ``seconds`` from now, or move it."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        due_s = loop.time() + seconds
        self._deadlines.set(key, due_s)
        if due_s < self._wake_s:
            self._arm(loop)

    def cancel(self, key: K) -> None:
        """Forget a key; harmless if it has no deadline."""
        self._deadlines.cancel(key)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._handle is not None:
            self._handle.cancel()
        next_s = self._deadlines.next_s
        self._wake_s = math.inf if next_s is None else next_s
        self._handle = None if next_s is None else loop.call_at(next_s, self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        # A loop may call a little early, by the resolution of its clock.
        passed = self._deadlines.due(max(loop.time(), self._wake_s))
        try:
            for key in passed:
                self._act(key)
        finally:
            self._arm(loop)
