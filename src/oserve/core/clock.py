"""The clock protocol, and the virtual clock of tests and simulations.

The shells implement the live clock.
"""

import asyncio
import heapq
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds with an arbitrary origin."""

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class VirtualClock:
    """A clock that only ``advance`` moves; sleepers wake in time order."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sequence = 0

    def now(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sequence += 1
        heapq.heappush(self._sleepers, (self._now_s + max(seconds, 0.0), self._sequence, future))
        await future

    async def advance(self, seconds: float) -> None:
        """Advance the time and wake each sleeper at its deadline."""
        end_s = self._now_s + seconds
        await _settle()
        while self._sleepers and self._sleepers[0][0] <= end_s:
            wake_s, _, future = heapq.heappop(self._sleepers)
            self._now_s = max(self._now_s, wake_s)
            if not future.done():
                future.set_result(None)
            await _settle()
        self._now_s = end_s


async def _settle() -> None:
    """Yield to the event loop until the woken tasks wait again."""
    loop = asyncio.get_running_loop()
    for _ in range(10):
        turn: asyncio.Future[None] = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn
