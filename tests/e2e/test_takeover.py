"""The server is killed again and again, and nobody who is served notices."""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from oserve.engines.adoption import read_note
from oserve.engines.group import group_members, start_ticks
from oserve.engines.registry import read_registry

from .test_serving import Served, start, status_of

pytestmark = pytest.mark.engine

KILLS = 10
_LIMIT_S = 300.0
# What is found on the path of modules before vLLM: the emulated engine under vLLM's options.
EMULATED = """
import asyncio, sys
from oserve.sim import EmulatedEngine, EngineSpeed

def said(option):
    return sys.argv[sys.argv.index(option) + 1]

async def main():
    speed = EngineSpeed(ttft_s=0.02, tpot_s=0.01)
    engine = EmulatedEngine(model=said("--served-model-name"), speed=speed, keep_bodies=False)
    await engine.start(unix_socket=said("--uds"))
    await asyncio.Event().wait()

asyncio.run(main())
"""
PLAN = """
id: chunk-{chunk}
workload_types: [{{name: all}}]
replicas:
  - id: stays
    shape: {{precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}}
    devices: [cpu:0]
  - id: changes
    shape: {{precision: fp32, max_num_batched_tokens: {chunk}, max_num_seqs: 16}}
    devices: [cpu:1]
"""
SETTINGS = (
    *("--cpu-slots", "2", "--port", "0", "--set", "cluster.devices=cpu"),
    *("--set", "planning.rates=chats:60x120=1", "--set", "control.mode=advise"),
    *("--set", "control.decision_interval_s=2", "--set", "control.interval_s=0.2"),
    *("--set", "engines.start_method=spawn", "--set", "engines.orphan_grace_s=120"),
    # Emulated engines have no weights to move, and no device may be in two entries here.
    *("--set", "switch.method=restart"),
)
PATH = "/v1/completions"
BODY = {"model": "tiny", "prompt": "go on", "max_tokens": 120, "ignore_eos": True}
STREAM = {**BODY, "stream": True}


@dataclass
class Load:
    """Streams without a break; what went wrong with any."""

    url: str
    served: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.post(self.url + PATH, json=STREAM) as answer:
                        data = await answer.read()
                    if answer.status != 200 or not data.endswith(b"data: [DONE]\n\n"):
                        self.wrong.append(f"{answer.status} {data[-200:]!r}")
                except aiohttp.ClientError as error:
                    self.wrong.append(repr(error))
                self.served += 1


def held(folder: Path) -> list[tuple[str, tuple[str, ...], int]]:
    """Replica, devices and process of each engine in the keeper's registry."""
    registry = read_registry(folder / "keeper.json")
    entries = [] if registry is None else registry.held
    engines = [entry for entry in entries if entry.engine]
    notes = [(read_note(entry.note), entry.pid) for entry in engines]
    return [(note.replica, note.devices, pid) for note, pid in notes if note is not None]


async def watch_devices(folder: Path) -> None:
    """No device is ever in two entries of the registry."""
    while True:
        devices = [device for _, given, _ in held(folder) for device in given]
        assert len(devices) == len(set(devices)), held(folder)
        await asyncio.sleep(0.01)


@asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def until(url: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        async with asyncio.timeout(_LIMIT_S):
            while not true(document := await status_of(session, url)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    return document


def settled(document: dict[str, Any]) -> bool:
    """Both replicas are ready, as the plan has them, and there is no other."""
    alive = {r["id"]: r for r in document["replicas"] if r["phase"] != "gone"}
    well = all(replica["phase"] == "ready" for replica in alive.values())
    if not well or alive.keys() != {"stays", "changes"} or "controller_away_s" in document:
        return False
    chunk = alive["changes"]["shape"]["max_num_batched_tokens"]
    return bool(document["plan_id"] == f"chunk-{chunk}")


def pids(document: dict[str, Any]) -> dict[str, int]:
    return {r["id"]: r["pid"] for r in document["replicas"] if r["phase"] == "ready"}


async def ask(url: str, path: str, body: bytes = b"") -> None:
    """An operator's call that may find nobody there."""
    async with aiohttp.ClientSession() as session, session.post(url + path, data=body) as answer:
        await answer.read()
        assert answer.status in {200, 503}, await answer.text()


Begin = Callable[..., Served]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """`oserve serve` again and again in one state folder; who still runs is ended at the end."""
    begun: list[Served] = []

    def again(*words: str) -> Served:
        begun.append(start(tmp_path, *SETTINGS, *words))
        return begun[-1]

    yield again
    for served in begun:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            served.process.wait(timeout=60)


def kill(served: Served) -> None:
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(timeout=30)


def running(folder: Path) -> set[int]:
    """Everything that a server's keeper holds, and the keeper."""
    registry = read_registry(folder / "keeper.json")
    assert registry is not None
    groups = {entry.pid for entry in registry.held if entry.engine}
    members = {pid for group in groups for pid in group_members(group)}
    return {registry.pid, *(entry.pid for entry in registry.held), *members}


def stop(served: Served) -> None:
    """As a person stops it: nothing that it ever started is left."""
    everything = running(served.folder)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(timeout=60) == 0, served.log()
    assert not [pid for pid in everything if start_ticks(pid)], served.log()
    assert not (served.folder / "keeper.json").exists()


async def test_ten_kills_under_load(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(EMULATED)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{before}")
    draw = random.Random(20)
    chunks = itertools.cycle((512, 1024))
    served = begin()
    first = PLAN.format(chunk=512).encode()
    await ask(served.url, "/oserve/v1/switch", first)
    document = await until(served.url, lambda d: settled(d) and d["plan_id"] == "chunk-512")
    load = Load(served.url)
    async with background(load.run(), load.run(), watch_devices(tmp_path)):
        for number in range(KILLS):
            seen, plan = pids(document), document["plan_id"]
            wished = PLAN.format(chunk=next(chunks)) if number % 3 else ""
            path = "/oserve/v1/switch" if wished else "/oserve/v1/plan"
            call = asyncio.ensure_future(ask(served.url, path, wished.encode()))
            await asyncio.sleep(draw.choice((0.0, 0.1, 1.0, 3.0)) * draw.random())
            kill(served)
            await call
            served = await asyncio.to_thread(begin)
            assert served.url == load.url
            document = await until(served.url, settled)
            now = pids(document)
            assert document["plan_id"] in {plan, wished.split()[1] if wished else plan}
            assert now["stays"] == seen["stays"]
            assert document["plan_id"] != plan or now["changes"] == seen["changes"]
            assert not load.wrong, (number, load.wrong, served.log())
    assert load.served > KILLS
    stop(served)


async def test_real_engines_outlive_their_server_but_not_for_long(
    begin: Begin, tmp_path: Path
) -> None:
    words = ("--set", "engines.start_method=zygote")
    served = begin(*words)
    first = await until(served.url, lambda d: all(r["phase"] == "ready" for r in d["replicas"]))
    load = Load(served.url)
    async with background(load.run(), watch_devices(tmp_path)):
        kill(served)
        count = load.served
        async with asyncio.timeout(_LIMIT_S):
            while load.served < count + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        hasty = ("--set", "engines.orphan_grace_s=1")
        served = await asyncio.to_thread(begin, *words, *hasty)
        again = await until(served.url, lambda d: "controller_away_s" not in d)
    assert pids(again) == pids(first)
    assert not load.wrong, (load.wrong, served.log())
    everything = running(tmp_path)
    assert set(pids(again).values()) < everything
    kill(served)
    async with asyncio.timeout(_LIMIT_S):
        while [pid for pid in everything if start_ticks(pid)]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert not (tmp_path / "keeper.json").exists()
