"""The page in a real browser: while a switch goes on, over a restart, in the dark and on a phone.

With the environment variable OSERVE_PICTURES, a folder, the pictures that it takes stay there.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from PIL import Image

import browser
from look.scene import Fleet, FleetSource
from oserve.gateway.http.server import Gateway
from oserve.gateway.settings import GatewaySettings
from oserve.look import files
from oserve.look.files import charts_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=f"no browser: {browser.missing()}"),
]
SHOWN = "document.documentElement.dataset.shown"
CHARTS = "document.documentElement.dataset.charts"
KEY = "k" * 32


class Server:
    """A gateway with a made-up controller, on a thread; ``port`` 0 takes a free one."""

    def __init__(self, fleet: Fleet, *, port: int = 0, keys: frozenset[str] = frozenset()) -> None:
        self.source = FleetSource(fleet)
        self.fleet = fleet
        self._keys = keys
        self._ready, self._ended = threading.Event(), threading.Event()
        self.port = port
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(30.0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/oserve/"

    async def _serve(self) -> None:

        settings = GatewaySettings(port=self.port, shutdown_grace_s=0.0)
        gateway = Gateway(settings, models=("m",), api_keys=self._keys)

        async def refresh() -> None:
            if self.source.away:
                raise ConnectionError("away")
            page = msgspec.Raw(self.source.state())
            gateway.runner.apply(msgspec.structs.replace(gateway.runner.snapshot, page=page))

        async def operate(path: str, body: bytes, actor: str, peer: str) -> tuple[int, bytes]:
            return 200, await self.source.history()

        gateway.refresh, gateway.operate = refresh, operate
        gateway.away_s = self.source.away_s
        gateway.feed._tick_s = 0.1
        self.port = await gateway.listen()
        self._ready.set()
        while not self._ended.is_set():  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.02)
        await gateway.close()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(30.0)


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def make(fleet: Fleet, **fields: Any) -> Server:
        servers.append(Server(fleet, **fields))
        return servers[-1]

    yield make
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    with browser.browsing() as found:
        yield found


def hour() -> Fleet:
    fleet = Fleet()
    fleet.advance(3600.0)
    return fleet


def opened(tab: browser.Browser, server: Server) -> None:
    tab.look_like(dark=False, width=1280, height=900)
    tab.open(server.url)
    tab.until(SHOWN, "the first event")


def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("OSERVE_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_switch_is_seen_while_it_happens(
    tab: browser.Browser, serve: Serve, tmp_path: Path
) -> None:
    fleet = hour()
    server = serve(fleet)
    opened(tab, server)
    tab.log()  # of other tests
    assert "Serving: 12 replicas ready" in tab.text("#sentence")
    assert "No switch" in tab.text("#switches")
    if charts_version():
        tab.until(CHARTS, "the charts")
    fleet.begin_switch()
    tab.until("document.body.innerText.includes('under way: prepare')", "the first phase")
    seen = ["prepare"]
    while seen[-1] != "done":
        fleet.at_s += 2.5
        seen.append(fleet.next_phase())
        if seen[-1] != "done":
            tab.until(f"document.body.innerText.includes('under way: {seen[-1]}')", seen[-1])
        if seen[-1] == "copy":
            tab.until("document.querySelectorAll('.cell.standby').length", "a hatched device")
            assert "receives its weights" in tab.text("#replicas")
            _pictures(tab, pictures(tmp_path))
    assert seen[1:] == ["start", "copy", "verify", "commit", "drain", "done"]
    tab.until("document.querySelector('#switches').innerText.includes('387')", "what it brought")
    row = tab.text("#switches tbody tr")
    assert "done in" in row
    assert "394 in 15 min" in row
    assert "2.7 GB" in row
    assert tab.log() == []


def _pictures(tab: browser.Browser, folder: Path) -> None:
    for name, dark, width in (("light", False, 1280), ("dark", True, 1280), ("narrow", False, 390)):
        tab.look_like(dark=dark, width=width, height=900)
        tab.until("new Promise(done => setTimeout(() => done(true), 400))", "a redrawn page")
        tab.screenshot(folder / f"page-{name}.png")
        size = tab.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert size[0] <= size[1], f"{name}: wider than the window"
    tab.look_like(dark=False, width=1100, height=900)
    tab.until("new Promise(done => setTimeout(() => done(true), 400))", "a redrawn page")
    picture = folder / "page.png"
    tab.screenshot(picture, x=0, y=0, width=1100, height=1180, scale=0.75)
    # For the docs: few colours make it small.
    Image.open(picture).quantize(48).save(picture, optimize=True)
    tab.look_like(dark=False, width=1280, height=900)


def test_it_does_not_wait_for_the_charts(tab: browser.Browser, serve: Serve) -> None:
    server = serve(hour())
    opened(tab, server)
    loads = tab.run(
        "return performance.getEntriesByType('resource').map(e => [e.name, e.startTime])"
    )
    charts = [at for name, at in loads if "charts.js" in name]
    assert all(at > float(tab.run(f"return {SHOWN}")) - 1 for at in charts)


def test_it_survives_a_restart_and_has_the_last_hour(tab: browser.Browser, serve: Serve) -> None:
    fleet = hour()
    first = serve(fleet)
    opened(tab, first)
    tab.until("P.length === 360", "an hour of points")
    first.end()
    tab.until("!document.querySelector('#bar').hidden", "the bar")
    assert "No connection to the gateway" in tab.text("#bar")
    fleet.advance(20.0)
    serve(fleet, port=first.port)
    tab.until("document.querySelector('#bar').hidden", "the page goes on")
    at_s = fleet.history.points[-1].at_s
    tab.until(f"P.length === 360 && P[359].at_s === {at_s}", "the hour, up to now")


def test_the_controller_is_away(tab: browser.Browser, serve: Serve) -> None:
    server = serve(hour())
    opened(tab, server)
    server.source.away = 7.2
    tab.until("!document.querySelector('#bar').hidden", "the bar")
    assert "Controller away for 7 s" in tab.text("#bar")
    server.source.away = 0.0
    tab.until("document.querySelector('#bar').hidden", "it is back")


def test_a_key_is_asked_for_and_stays_in_the_tab(tab: browser.Browser, serve: Serve) -> None:
    server = serve(hour(), keys=frozenset({KEY}))
    tab.open(server.url)
    tab.until("!document.querySelector('#ask').hidden", "the form")
    assert "example-70b" not in tab.text("body")
    for key, outcome in (("wrong", "#refused.innerText"), (KEY, SHOWN)):
        tab.run(f"document.querySelector('#key').value = '{key}'")
        tab.key("Enter") if key != KEY else tab.run(
            "document.querySelector('#form button').click()"
        )
        if key == KEY:
            tab.until(outcome, "the page")
        else:
            tab.until("document.querySelector('#refused').innerText", "a refusal")
    assert tab.run("return [localStorage.length, document.cookie, sessionStorage.length]") == [
        0,
        "",
        1,
    ]
    tab.run("sessionStorage.clear()")


def test_by_keyboard_to_the_numbers_of_a_decision(tab: browser.Browser, serve: Serve) -> None:
    server = serve(hour())
    opened(tab, server)
    for _ in range(40):
        tab.key("Tab")
        if tab.run("return Boolean(document.activeElement.closest('#decisions'))"):
            break
    tab.key("Enter")
    assert tab.run("return document.querySelector('#decisions details').open")
    assert "31 requests" in tab.text("#decisions details")
    # It stays open while events come.
    server.fleet.advance(10.0)
    tab.until("P.at(-1).at_s === S.now.at_s", "another point")
    assert tab.run("return document.querySelector('#decisions details').open")


def test_without_plotly_it_says_what_to_install(
    tab: browser.Browser, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(files, "charts_version", lambda: "")
    files.page_html.cache_clear()
    try:
        opened(tab, serve(hour()))
        tab.until("document.body.innerText.includes('oserve[page]')", "what to install")
        assert "TTFT P50" in tab.text("#limits")
    finally:
        files.page_html.cache_clear()
