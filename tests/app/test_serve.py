"""`oserve serve` as a process, in front of an emulated engine; and the other commands."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

from oserve.cli import app
from oserve.core import OServeError
from oserve.engines.registry import read_registry
from oserve.sim import EmulatedEngine, EngineSpeed

BODY = {"model": "emulated", "prompt": "hello there", "max_tokens": 5}
# Nothing here takes that long, on a busy machine either.
_LIMIT_S = 300.0


@dataclass
class Served:
    process: asyncio.subprocess.Process
    engine: EmulatedEngine
    url: str
    folder: Path
    engine_url: str


async def free_port() -> int:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    started: list[Served] = []

    async def start(*words: str, speed: EngineSpeed | None = None, engine_port: int = 0) -> Served:
        engine = EmulatedEngine(speed=speed)
        port = engine_port or await engine.start()
        engine_url = f"http://127.0.0.1:{port}"
        plan = tmp_path / "plan.yaml"
        plan.write_text(f"replicas: [{{id: one, attach: {{url: '{engine_url}'}}}}]")
        port = await free_port()
        if "--port" in words:
            port = int(words[words.index("--port") + 1])
        command = ["-m", "oserve.cli", "serve", "--plan", str(plan), "--port", str(port)]
        command += ["--served-model-name", "emulated", "--state-dir", str(tmp_path / "state")]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *words, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        seen = b""
        async with asyncio.timeout(_LIMIT_S):
            while b"Ready on" not in seen:
                line = await process.stderr.readline()
                assert line, seen.decode()
                seen += line
        served = Served(process, engine, f"http://127.0.0.1:{port}", tmp_path, engine_url)
        started.append(served)
        return served

    yield start
    for served in started:
        if served.process.returncode is None:
            served.process.terminate()
            await served.process.communicate()
        await served.engine.stop()


async def post(session: aiohttp.ClientSession, url: str) -> int:
    async with session.post(url + "/v1/completions", json=BODY) as answer:
        await answer.read()
        return answer.status


async def counted(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    name = 'oserve_requests_total{status="completed"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def gateways(served: Served) -> set[int]:
    """Process ids of the gateway processes that run."""
    registry = read_registry(served.folder / "state" / "keeper.json")
    assert registry is not None
    return {entry.pid for entry in registry.held if not entry.engine and entry.pid}


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Ask again and again, without taking the processor from who is asked."""
    async with asyncio.timeout(_LIMIT_S):
        while not await condition():  # noqa: ASYNC110 - it asks another process
            await asyncio.sleep(0.01)


def fresh() -> aiohttp.ClientSession:
    """Each request on a connection of its own, so that every gateway process gets some."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
async def test_serves_counts_and_ends_with_any_number_of_processes(
    serve: Serve, processes: int
) -> None:
    served = await serve("--set", f"gateway.processes={processes}")
    async with fresh() as session:
        codes = [await post(session, served.url) for _ in range(30)]
        assert codes == [200] * 30
        async with session.get(served.url + "/health") as answer:
            assert answer.status == 200
        async with session.get(served.url + "/oserve/v1/status") as answer:
            document = await answer.json()
        assert document["replicas"][0]["phase"] == "ready"
        # Whichever process is asked, sums never go backwards and end at the truth.
        seen = [0.0]

        async def all_counted() -> bool:
            seen.append(await counted(session, served.url))
            return seen[-1] >= 30

        await until(all_counted)
        seen += [await counted(session, served.url) for _ in range(10)]
        assert seen == sorted(seen)
        assert seen[-1] == 30
    served.process.send_signal(signal.SIGINT)
    await served.process.communicate()
    assert served.process.returncode == 0


@pytest.mark.slow
async def test_a_gateway_process_that_dies_is_replaced(serve: Serve) -> None:
    served = await serve("--set", "gateway.processes=2")
    before = gateways(served)
    assert len(before) == 2
    victim = min(before)
    os.kill(victim, signal.SIGKILL)

    async def replaced() -> bool:
        return len(gateways(served) - {victim}) >= 2

    async with fresh() as session:
        await until(replaced)
        for _ in range(20):
            # The one that died may have had connections waiting: those break, no later ones do.
            try:
                assert await post(session, served.url) == 200
            except aiohttp.ClientError:
                continue
        assert await post(session, served.url) == 200


@pytest.mark.slow
async def test_clients_are_served_while_the_server_is_killed_and_comes_back(serve: Serve) -> None:
    served = await serve()
    before = gateways(served)
    async with fresh() as session:
        assert await post(session, served.url) == 200
        served.process.kill()
        await served.process.communicate()
        assert await post(session, served.url) == 200

        async def away() -> object:
            async with session.get(served.url + "/oserve/v1/status") as answer:
                return (await answer.json()).get("controller_away_s", 0.0)

        await until(away)
        shown = await cli("status", "--url", served.url)
        assert "the controller has been down" in shown[1]
        assert await counted(session, served.url) == 2
        code, said = await cli("switch", str(served.folder / "plan.yaml"), "--url", served.url)
        assert code == 2
        assert "unreachable" in said
        engine_port = served.engine_url.rsplit(":", 1)[1]
        again = await serve("--port", served.url.rsplit(":", 1)[1], engine_port=int(engine_port))
        assert gateways(again) == before
        assert await post(session, served.url) == 200

        async def all_counted() -> bool:
            return await counted(session, served.url) >= 3

        await until(all_counted)
        assert await counted(session, served.url) == 3
        async with session.get(served.url + "/oserve/v1/status") as answer:
            assert "controller_away_s" not in await answer.json()
    # There is one server in a state folder.
    third = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oserve.cli", "serve", "--served-model-name", "emulated"),
        *("--plan", str(served.folder / "plan.yaml"), "--port", "0"),
        *("--state-dir", str(served.folder / "state")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await third.communicate()
    assert third.returncode == 2
    assert f"another server uses it (process {again.process.pid})".encode() in told


@pytest.mark.slow
async def test_a_running_request_gets_its_grace_at_the_end(serve: Serve) -> None:
    served = await serve(speed=EngineSpeed(ttft_s=0.5))
    async with fresh() as session:
        call = asyncio.ensure_future(post(session, served.url))

        async def running() -> bool:
            return served.engine.running > 0

        await until(running)
        served.process.send_signal(signal.SIGTERM)
        assert await call == 200
    await served.process.communicate()
    assert served.process.returncode == 0


@pytest.mark.slow
async def test_an_attached_server_that_goes_away_is_told_of(serve: Serve) -> None:
    served = await serve("--set", "engines.health_interval_s=0.05")
    await served.engine.stop()
    async with fresh() as session:

        async def told() -> bool:
            async with session.get(served.url + "/health") as answer:
                assert answer.status in {200, 503}
                return answer.status == 503

        await until(told)


@pytest.mark.slow
async def test_status_command(serve: Serve, tmp_path: Path) -> None:
    served = await serve()
    runner = CliRunner()
    words = ["status", "--url", served.url]
    shown = await asyncio.to_thread(runner.invoke, app, words)
    assert shown.exit_code == 0
    assert "serving" in shown.stdout
    assert "one" in shown.stdout
    raw = await asyncio.to_thread(runner.invoke, app, [*words, "--json"])
    document: dict[str, Any] = json.loads(raw.stdout)
    replica = document["replicas"][0]
    assert set(replica) >= {"id", "shape", "devices", "phase", "running", "waiting"}
    assert set(document) >= {"replicas", "plan_id", "routing_shares"}


@pytest.mark.slow
async def test_a_taken_port_is_told(serve: Serve) -> None:
    served = await serve()
    port = served.url.rsplit(":", 1)[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oserve.cli", "serve", "--port", port),
        *("--plan", str(served.folder / "plan.yaml"), "--served-model-name", "x"),
        *("--state-dir", str(served.folder / "other")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, told = await process.communicate()
    assert process.returncode == 2
    assert b"cannot listen" in told
    assert b"Traceback" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve"], "no model"),
        (["serve", "m", "--plan", "none.yaml"], "cannot read"),
        (["serve", "m", "--set", "gateway.prot=1"], "gateway.prot"),
        (["validate", "--config", "none.yaml"], "cannot read"),
        (["status", "--url", "http://127.0.0.1:9"], "no answer"),
    ],
)
def test_bad_words_are_told(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, OServeError)
    assert told in str(result.exception)


def test_validate_and_dry_run_start_nothing(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("replicas: [{id: a, devices: ['cpu:0']}, {id: b, devices: ['cpu:1']}]")
    words = ["--plan", str(plan), "--cpu-slots", "2", "--set", "cluster.devices=cpu"]
    checked = CliRunner().invoke(app, ["validate", "--model", "m", *words])
    assert checked.stdout.startswith("ok: 2 replicas on 2 devices")
    state = ["--state-dir", str(tmp_path / "state")]
    dry = CliRunner().invoke(app, ["serve", "m", *words, *state, "--dry-run"])
    assert dry.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
async def test_a_running_server_takes_another_plan(serve: Serve, processes: int) -> None:
    served = await serve("--set", f"gateway.processes={processes}")
    plan = (served.folder / "plan.yaml").read_text()
    other = served.folder / "other.yaml"
    other.write_text(plan + "\nid: other\nworkload_types: [{name: everything}]\n")
    words = ["--url", served.url]
    shown = await cli("switch", str(other), *words)
    assert shown[0] == 0, shown[1]
    async with fresh() as session:

        async def another() -> bool:
            async with session.post(served.url + "/v1/completions", json=BODY) as answer:
                assert answer.status == 200
                kind = answer.headers["x-oserve-workload-type"]
                assert (kind == "everything") == (answer.headers["x-oserve-plan-id"] == "other")
                return kind == "everything"

        await until(another)
        # One machine has no nodes to speak of.
        for call, status, text in (
            ({"action": "list"}, 200, '{"nodes":[]}'),
            ({"action": "drain", "node": "here"}, 400, "there is no node"),
        ):
            async with session.post(served.url + "/oserve/v1/nodes", json=call) as answer:
                assert answer.status == status
                assert text in await answer.text()
    # What it may not bring, and what nobody can answer here.
    other.write_text("replicas: [{id: two, attach: {url: 'http://127.0.0.1:1'}}]")
    code, said = await cli("switch", str(other), *words)
    assert code == 2
    assert "not in force already" in said
    code, said = await cli("plan", "--live", *words)
    assert code == 2
    assert "control.mode is off" in said


async def cli(*words: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "oserve.cli",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()
