"""The page of a gateway process: its files for everybody, its data for admins."""

from collections.abc import Callable
from typing import Final

from oserve.core import Caller
from oserve.gateway.access.door import admin_needed
from oserve.gateway.http.errors import overloaded, unavailable
from oserve.gateway.http.own_routes import OwnRoutes
from oserve.look.feed import HISTORY_PATH, PageFeed
from oserve.look.files import page_files
from oserve.wire import Exchange

EVENTS: Final = b"/oserve/v1/page/events"

PageRoute = tuple[bytes, bool, Callable[[Exchange, Caller], None]]


class GatewayPageSource:
    """The state as the control loop last published it; see ``look.feed.PageSource``."""

    def __init__(self, own: OwnRoutes) -> None:
        self._own = own

    async def refresh(self) -> None:
        if self._own.refresh is not None:
            await self._own.refresh()

    def state(self) -> bytes:
        return bytes(self._own.runner.snapshot.page)

    async def history(self) -> bytes:
        if self._own.operate is None:
            return b"[]"
        status, body = await self._own.operate(HISTORY_PATH, b"", "", "")
        return body if status == 200 else b"[]"

    def away_s(self) -> float:
        return 0.0 if self._own.away_s is None else self._own.away_s()


def page_routes(own: OwnRoutes, feed: PageFeed) -> dict[bytes, PageRoute]:
    """Method, whether a key is needed, and handler, by path."""

    def events(exchange: Exchange, caller: Caller) -> None:
        if not caller.is_admin:
            raise admin_needed()
        if exchange.method == b"HEAD":
            exchange.respond(200, b"", content_type=b"text/event-stream")
        elif own.operate is None:
            raise unavailable("No control loop operates this gateway")
        elif not feed.join(exchange):
            raise overloaded(
                "The page has as many viewers as gateway.page_viewers allows",
                retry_after_s=10,
                code="too_many_viewers",
            )

    found: dict[bytes, PageRoute] = {EVENTS: (b"GET", True, events)}
    for path, answer in page_files().items():
        found[path] = (b"GET", False, _file(answer))
    return found


def _file(answer: Callable[[Exchange], None]) -> Callable[[Exchange, Caller], None]:
    def answered(exchange: Exchange, caller: Caller) -> None:
        answer(exchange)

    return answered
