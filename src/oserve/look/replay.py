"""A past hour as a source of the page: what a server saved every ten seconds, on another clock."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from oserve.look.feed import PageFeed
from oserve.look.files import page_files
from oserve.look.points import MOST_POINTS, POINT_S
from oserve.wire import Exchange, ServerLimits, serve
from oserve.wire.server import HttpServer

_EVENTS = b"/oserve/v1/page/events"


class SavedMoment(NamedTuple):
    """What the page showed at a Unix time: the point of the charts, and all sections, as JSON."""

    at_s: float
    point: bytes
    state: bytes


class ReplaySource:
    """Plays moments from ``start_s`` on, ``speed`` times as fast; see ``feed.PageSource``.

    Earlier moments are the hour before. At the last one it stands still. ``now``: monotonic time.
    """

    def __init__(
        self,
        moments: Sequence[SavedMoment],
        *,
        start_s: float,
        speed: float,
        now: Callable[[], float],
    ) -> None:
        self._moments = moments
        self._times = [item.at_s for item in moments]
        self._start_s, self._speed, self._now = start_s, speed, now
        self._began_s = now()

    @property
    def at_s(self) -> float:
        """The Unix time that is shown."""
        played_s = (self._now() - self._began_s) * self._speed
        return min(self._start_s + played_s, self._times[-1])

    def _place(self) -> int:
        return max(0, bisect_right(self._times, self.at_s) - 1)

    async def refresh(self) -> None:
        """There is nothing to fetch."""

    def state(self) -> bytes:
        """The state at the present moment, with the speed of the replay."""
        return b'{"replay":%g,%b' % (self._speed, self._moments[self._place()].state[1:])

    async def history(self) -> bytes:
        """The points of the hour up to the present moment."""
        end = self._place() + 1
        first_s = self._times[end - 1] - POINT_S * MOST_POINTS
        points = [item.point for item in self._moments[:end] if item.at_s > first_s]
        return b"[" + b",".join(points) + b"]"

    def away_s(self) -> float:
        """Nobody is away in the past."""
        return 0.0


async def serve_replay(source: ReplaySource, *, port: int, most_viewers: int = 10) -> HttpServer:
    """Serve the page of a source on the loopback interface."""
    feed = PageFeed(source, most_viewers=most_viewers)
    files = page_files()

    def handle(exchange: Exchange) -> None:
        path = exchange.path.partition(b"?")[0]
        if exchange.method not in {b"GET", b"HEAD"}:
            exchange.respond(405, b"", headers=((b"allow", b"GET, HEAD"),))
        elif path in files:
            files[path](exchange)
        elif path != _EVENTS:
            exchange.respond(404, b"")
        elif exchange.method == b"HEAD":
            exchange.respond(200, b"", content_type=b"text/event-stream")
        elif not feed.join(exchange):
            exchange.respond(429, b"", headers=((b"retry-after", b"10"),))

    return await serve(
        handle,
        refuse=lambda exchange, status, _: exchange.respond(status, b"", close=True),
        limits=ServerLimits(max_body_bytes=1024, max_connections=100),
        port=port,
    )
