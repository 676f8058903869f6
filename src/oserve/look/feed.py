"""The event stream of the page: one event a second for all viewers, whose number is bounded.

A viewer gets the whole state and the last hour when it comes, then what changed. One that does not
read is skipped while its send buffer is full, and dropped after ``STALL_S``; one that reads again
gets the whole state anew. Without viewers no events are made.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

import msgspec

from oserve.core.faults import fault
from oserve.look.deltas import DeltaBudget, event, sections_of
from oserve.look.points import MOST_POINTS
from oserve.wire import Exchange

_log = logging.getLogger("oserve.look")

TICK_S: Final = 1.0
HISTORY_PATH: Final = "/oserve/v1/page/history"
"""Where a gateway process asks its control loop for the last hour; not for clients."""

STALL_S: Final = 10.0
"""How long a viewer may leave its send buffer full."""

STREAM_S: Final = 600.0
"""A stream ends after so long, and the page asks for another one.

Events are small, so buffers of the network would take them for a viewer that reads nothing for
hours; such a one does not come again.
"""

REMEMBER_S: Final = 60.0
"""How often the last hour is fetched while nobody watches."""

# Viewers that come back at once after a restart share one history.
_FRESH_S: Final = 5.0
_HEADERS: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
_POINTS: Final = msgspec.json.Decoder(list[msgspec.Raw])


class PageSource(Protocol):
    """Where the state comes from."""

    async def refresh(self) -> None:
        """Fetch the state; OSError: it is out of reach."""
        ...

    def state(self) -> bytes:
        """The last state: a JSON object of sections."""
        ...

    async def history(self) -> bytes:
        """The points of the last hour as a JSON array; OSError: it is out of reach."""
        ...

    def away_s(self) -> float:
        """Seconds for which the controller has been out of reach; 0 while it answers."""
        ...


class _Viewer:
    __slots__ = ("began_s", "exchange", "paused_s", "whole")

    def __init__(self, exchange: Exchange, began_s: float) -> None:
        self.exchange = exchange
        self.began_s = began_s
        self.paused_s: float | None = None
        # Has not been sent the whole state.
        self.whole = False


class PageFeed:
    """Streams one source to at most ``most_viewers``. ``now``: monotonic time in seconds."""

    def __init__(
        self,
        source: PageSource,
        *,
        most_viewers: int,
        tick_s: float = TICK_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._most = most_viewers
        self._tick_s = tick_s
        self._now = now
        self._viewers: dict[Exchange, _Viewer] = {}
        self._budget = DeltaBudget()
        self._points: deque[msgspec.Raw] = deque(maxlen=MOST_POINTS)
        self._point = b""
        self._fetched_s: float | None = None
        self._fetching = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False

    @property
    def viewers(self) -> int:
        """How many there are."""
        return len(self._viewers)

    def join(self, exchange: Exchange) -> bool:
        """Begin to answer with events; ``False``: there are too many viewers."""
        if len(self._viewers) >= self._most:
            return False
        viewer = self._viewers[exchange] = _Viewer(exchange, self._now())

        def left() -> None:
            self._viewers.pop(exchange, None)

        def paused(is_paused: bool) -> None:
            viewer.paused_s = self._now() if is_paused else None
            # What it has missed is not kept.
            viewer.whole = viewer.whole and not is_paused

        exchange.on_disconnect, exchange.on_pause = left, paused
        self._spawn(self._welcome(viewer))
        if not self._running:
            self._running = True
            self._spawn(self._run())
        return True

    def remember(self) -> None:
        """Keep the last hour at hand, for who comes while the controller is away."""
        self._spawn(self._remember())

    async def _remember(self) -> None:
        while True:
            await asyncio.sleep(REMEMBER_S)
            if not self._viewers:
                await self._fetch()

    def close(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()
        for exchange in list(self._viewers):
            exchange.finish(close=True)
        self._viewers.clear()

    # -- events ---------------------------------------------------------------------------------
    async def _welcome(self, viewer: _Viewer) -> None:
        try:
            await self._fetch()
            viewer.exchange.start(200, _HEADERS, self._hello(), close=True)
            viewer.whole = viewer.paused_s is None
        except BaseException:  # a viewer without a welcome would never be sent anything
            self._drop(viewer)
            raise

    async def _run(self) -> None:
        try:
            while self._viewers:
                await asyncio.sleep(self._tick_s)
                try:
                    await self.tick()
                except Exception as error:  # an unforeseen fault costs one event, not the stream
                    _log.error("an event of the page failed: %s", fault(error))
        finally:
            self._running = False
            self._fetched_s = None

    async def tick(self) -> None:
        """Send what changed, and drop who does not read."""
        with contextlib.suppress(OSError):
            await self._source.refresh()
        sections = self._known()
        if (point := sections.get("point")) is not None and bytes(point) != self._point:
            self._point = bytes(point)
            self._points.append(point)
        now_s = self._now()
        changed = self._budget.next(sections)
        data = event({"sections": changed, "away_s": round(self._source.away_s(), 1)})
        hello = b""
        for viewer in list(self._viewers.values()):
            if now_s - viewer.began_s > STREAM_S:
                self._viewers.pop(viewer.exchange, None)
                viewer.exchange.finish(close=True)
            elif viewer.paused_s is not None:
                if now_s - viewer.paused_s > STALL_S:
                    self._drop(viewer)
            elif viewer.whole:
                viewer.exchange.write(data)
            elif viewer.exchange.started:
                hello = hello or self._hello()
                viewer.whole = True
                viewer.exchange.write(hello)

    def _drop(self, viewer: _Viewer) -> None:
        self._viewers.pop(viewer.exchange, None)
        viewer.exchange.abort()

    def _hello(self) -> bytes:
        sections = self._known()
        self._budget.shown(sections)
        return event(
            {
                "hello": True,
                "sections": sections,
                "points": list(self._points),
                "away_s": round(self._source.away_s(), 1),
            }
        )

    def _known(self) -> dict[str, msgspec.Raw]:
        try:
            return sections_of(self._source.state())
        except msgspec.DecodeError as error:
            _log.error("the state of the page cannot be read: %s", error)
            return {}

    async def _fetch(self) -> None:
        """Bring state and history up to date, once for all who come at the same time."""
        async with self._fetching:
            if self._fetched_s is not None and self._now() - self._fetched_s < _FRESH_S:
                return
            # While the controller is away, what is known must do.
            with contextlib.suppress(OSError, msgspec.DecodeError):
                await self._source.refresh()
                found = _POINTS.decode(await self._source.history())
                self._points = deque(found, maxlen=MOST_POINTS)
                self._point = bytes(found[-1]) if found else b""
            self._fetched_s = self._now()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the page's stream failed: %s", fault(error))
