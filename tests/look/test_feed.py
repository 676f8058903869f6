"""The page's stream: who may watch, how many, and what becomes of those that do not read."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from gateway.conftest import until
from look.scene import Fleet, FleetSource
from oserve.gateway.http.server import Gateway
from oserve.gateway.settings import GatewaySettings
from oserve.look import feed as feeds
from oserve.look.deltas import DeltaBudget
from oserve.look.feed import PageFeed
from oserve.wire import Exchange

EVENTS = "/oserve/v1/page/events"


class Wire:
    """A connection that keeps what is written to it."""

    def __init__(self) -> None:
        self.sent = b""
        self.peer = "127.0.0.1"
        self.ended = False

    def send(self, data: bytes) -> None:
        self.sent += data

    def finished(self, *, close: bool) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    @property
    def events(self) -> list[dict[str, Any]]:
        parts = self.sent.partition(b"\r\n\r\n")[2].split(b"\n\n")[:-1]
        return [json.loads(part.removeprefix(b"data: ")) for part in parts]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def viewer() -> tuple[Wire, Exchange]:
    wire = Wire()
    exchange = Exchange(wire)
    exchange.method = b"GET"
    return wire, exchange


def made(most: int = 50) -> tuple[Fleet, FleetSource, PageFeed, Clock]:
    fleet = Fleet()
    fleet.advance(100.0)
    source, clock = FleetSource(fleet), Clock()
    # Ticks are the test's.
    return fleet, source, PageFeed(source, most_viewers=most, tick_s=1e9, now=clock), clock


async def joined(feed: PageFeed) -> tuple[Wire, Exchange]:
    wire, exchange = viewer()
    assert feed.join(exchange)
    await until(lambda: wire.sent)
    return wire, exchange


async def test_a_viewer_gets_the_state_and_the_hour_and_then_what_changed() -> None:
    fleet, _, feed, _ = made()
    wire, _ = await joined(feed)
    (hello,) = wire.events
    assert hello["hello"]
    assert len(hello["points"]) == 10
    assert hello["sections"]["now"]["model"] == "example-70b"
    await feed.tick()
    fleet.advance(1.0)
    await feed.tick()
    changed = wire.events[-1]["sections"]
    assert "now" in changed
    assert "devices" not in changed
    feed.close()


async def test_all_viewers_get_the_same_bytes() -> None:
    fleet, _, feed, _ = made()
    wires = [(await joined(feed))[0] for _ in range(3)]
    before = [len(wire.sent) for wire in wires]
    fleet.advance(10.0)
    await feed.tick()
    assert len({wire.sent[at:] for wire, at in zip(wires, before, strict=True)}) == 1
    feed.close()


async def test_there_are_no_more_viewers_than_allowed() -> None:
    _, _, feed, _ = made(2)
    _, first = await joined(feed)
    await joined(feed)
    _, third = viewer()
    assert not feed.join(third)
    assert first.on_disconnect is not None
    first.on_disconnect()
    assert feed.viewers == 1
    assert feed.join(third)
    feed.close()


async def test_a_viewer_that_does_not_read_is_skipped_and_then_dropped() -> None:
    _, _, feed, clock = made()
    slow, exchange = await joined(feed)
    quick, _ = await joined(feed)
    assert exchange.on_pause is not None
    exchange.on_pause(True)
    held = len(slow.sent)
    await feed.tick()
    assert len(slow.sent) == held
    clock.now_s += feeds.STALL_S + 1.0
    await feed.tick()
    assert slow.ended
    assert (feed.viewers, quick.ended) == (1, False)
    feed.close()


async def test_a_stream_ends_and_the_page_asks_for_another() -> None:
    _, _, feed, clock = made()
    wire, _ = await joined(feed)
    clock.now_s += feeds.STREAM_S - 1.0
    await feed.tick()
    assert not wire.ended
    clock.now_s += 2.0
    await feed.tick()
    assert wire.ended
    assert feed.viewers == 0
    again, _ = await joined(feed)
    assert again.events[0]["hello"]
    feed.close()


async def test_a_viewer_that_reads_again_gets_the_whole_state() -> None:
    fleet, _, feed, _ = made()
    wire, exchange = await joined(feed)
    assert exchange.on_pause is not None
    exchange.on_pause(True)
    fleet.advance(20.0)
    await feed.tick()
    exchange.on_pause(False)
    await feed.tick()
    again = wire.events[-1]
    assert again["hello"]
    assert again["points"][-1]["at_s"] == fleet.history.points[-1].at_s
    feed.close()


async def test_while_the_controller_is_away_the_page_says_so_and_stays() -> None:
    _, source, feed, clock = made()
    wire, _ = await joined(feed)
    source.away = 12.3
    await feed.tick()
    assert wire.events[-1]["away_s"] == 12.3
    # Who comes meanwhile sees what is known.
    clock.now_s += 60.0
    late, _ = await joined(feed)
    assert late.events[0]["away_s"] == 12.3
    assert len(late.events[0]["points"]) == 10
    feed.close()


async def test_the_hour_is_known_to_who_comes_while_the_controller_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "REMEMBER_S", 0.0)
    _, source, feed, clock = made()
    feed.remember()
    await until(lambda: len(feed._points) == 10)
    source.away = 30.0
    clock.now_s += 60.0
    wire, _ = await joined(feed)
    assert len(wire.events[0]["points"]) == 10
    feed.close()


async def test_a_fault_costs_one_event_and_not_the_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet()
    source = FleetSource(fleet)
    feed = PageFeed(source, most_viewers=1, tick_s=0.0)
    wire, _ = await joined(feed)
    faults = [RuntimeError("boom")]

    async def refresh() -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(source, "refresh", refresh)
    await until(lambda: not faults)
    count = len(wire.events)
    await until(lambda: len(wire.events) > count)
    assert "an event of the page failed" in caplog.text
    feed.close()


async def test_without_viewers_nothing_runs() -> None:
    fleet = Fleet()
    feed = PageFeed(FleetSource(fleet), most_viewers=1, tick_s=0.0)
    wire, exchange = await joined(feed)
    assert exchange.on_disconnect is not None
    exchange.on_disconnect()
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert feed.viewers == 0
    assert not wire.ended


# -- through the gateway --------------------------------------------------------------------------
@asynccontextmanager
async def served(**fields: Any) -> AsyncIterator[tuple[Gateway, str, aiohttp.ClientSession]]:
    keys = fields.pop("api_keys", frozenset())
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, **fields)
    gateway = Gateway(settings, models=("m",), api_keys=keys)
    fleet = Fleet()
    fleet.advance(100.0)
    source = FleetSource(fleet)

    async def operate(path: str, body: bytes, actor: str, peer: str) -> tuple[int, bytes]:
        return 200, await source.history()

    gateway.operate = operate

    gateway.runner.apply(
        msgspec.structs.replace(gateway.runner.snapshot, page=msgspec.Raw(source.state()))
    )
    url = f"http://127.0.0.1:{await gateway.listen()}"
    try:
        async with aiohttp.ClientSession() as session:
            yield gateway, url, session
    finally:
        await gateway.close()


async def test_the_page_is_public_and_its_policy_allows_its_own_script_only() -> None:
    async with served(api_keys=frozenset({"k" * 30})) as (_, url, session):
        async with session.get(url + "/oserve/") as answer:
            assert answer.status == 200
            policy = answer.headers["content-security-policy"]
            text = await answer.text()
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        assert "example-70b" not in text
        async with session.get(url + "/oserve", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["location"]) == (308, "/oserve/")


async def test_data_needs_an_admin_key() -> None:
    key = "k" * 30
    async with served(api_keys=frozenset({key})) as (_, url, session):
        async with session.get(url + EVENTS) as answer:
            assert answer.status == 401
        async with session.get(url + EVENTS, headers={"authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200
            assert b'"hello":true' in await answer.content.readuntil(b"\n\n")


async def test_too_many_viewers_are_told_to_come_again() -> None:
    async with served(page_viewers=1) as (_, url, session), session.get(url + EVENTS) as first:
        assert first.status == 200
        async with session.get(url + EVENTS) as answer:
            assert answer.status == 429
            assert answer.headers["retry-after"] == "10"


async def test_a_client_that_reads_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "STALL_S", 0.0)
    async with served() as (gateway, url, session):
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /oserve/v1/page/events HTTP/1.1\r\nhost: a\r\n\r\n")
        await until(lambda: gateway.feed.viewers == 1)
        snapshot = gateway.runner.snapshot
        gateway.feed._budget = DeltaBudget(1 << 30)
        # More than socket buffers hold.
        for turn in range(400):
            big = b'{"names":["%d%b"]}' % (turn, b"x" * 60_000)

            gateway.runner.apply(msgspec.structs.replace(snapshot, page=msgspec.Raw(big)))
            await gateway.feed.tick()
            await asyncio.sleep(0)
            if gateway.feed.viewers == 0:
                break
        assert gateway.feed.viewers == 0
        writer.close()
        del reader
        async with session.get(url + "/live") as answer:
            assert answer.status == 200
