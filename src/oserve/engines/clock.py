"""The real clock."""

import asyncio
import time


class LiveClock:
    """Monotonic seconds of this machine."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
