"""The whole of it: `oserve serve` with real vLLM engines, as users meet it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.streams import told
from oserve.engines.group import group_members
from oserve.engines.tiny import make_tiny_model
from oserve.gateway.records import read_records
from oserve.traces import synthesise

pytestmark = pytest.mark.engine

PLAN = """
id: e2e
workload_types: [{name: short, max_prompt_tokens: 200}, {name: long}]
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [cpu:0]
  - id: two
    shape: {tensor_parallel_size: 2, precision: fp32, max_num_batched_tokens: 512, max_num_seqs: 8}
    devices: [cpu:1, cpu:2]
routing_shares: {short: {one: 1}, long: {two: 1}}
"""
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
_START_LIMIT_S = 300.0
_LIMIT_S = 300.0
# Answers by another replica than the plan's, in all of this module.
MOST_STRAYS = 2


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    strays: list[tuple[str, str]] = field(default_factory=list)

    def log(self) -> str:
        return (self.folder / "serve.log").read_text()


def start(folder: Path, *words: str) -> Served:
    """`oserve serve` as a process; returns when it says it is ready."""
    model = make_tiny_model(folder / "tiny")
    log = folder / "serve.log"
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--state-dir", str(folder)]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *words], stdout=out, stderr=out, cwd=folder)
    deadline_s = time.monotonic() + _START_LIMIT_S
    while "Ready on" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)
    line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
    return Served(process, line.split()[2], folder)


def descendants(pid: int) -> set[int]:
    """Every process that came from this one and still runs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found.update(children)
        queue.extend(children)
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("e2e")
    plan = folder / "plan.yaml"
    plan.write_text(PLAN)
    words = ["--plan", str(plan), "--cpu-slots", "3", "--port", "0"]
    server = start(folder, *words, "--set", "engines.hang_after_s=8")
    family = descendants(server.process.pid)
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    # Ctrl-C ends everything: not one process is left behind.
    left = {pid for pid in family if Path(f"/proc/{pid}/stat").exists()}
    assert not left, server.log()


async def status_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url + "/oserve/v1/status") as answer:
        return dict(await answer.json())


async def is_running(session: aiohttp.ClientSession, url: str) -> bool:
    return any(replica["running"] for replica in (await status_of(session, url))["replicas"])


async def until(condition: Callable[[], Awaitable[object]], every_s: float = 0.05) -> None:
    """Ask until it is so. What takes longer than a start is an error."""
    async with asyncio.timeout(_START_LIMIT_S):
        while not await condition():  # noqa: ASYNC110 - it asks another process
            await asyncio.sleep(every_s)


async def test_openai_client_chats_streaming_and_not(served: Served) -> None:
    import openai  # noqa: PLC0415 - slow to import

    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "Hello!"}]
        wishes = {**GREEDY, "messages": messages, "extra_body": {"ignore_eos": True}}
        del wishes["ignore_eos"]
        whole = await client.chat.completions.create(**wishes)
        stream = await client.chat.completions.create(**wishes, stream=True)
        pieces = [event.choices[0].delta.content or "" async for event in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"


async def test_clients_of_responses_and_messages(served: Served) -> None:
    import anthropic  # noqa: PLC0415 - slow to import
    import openai  # noqa: PLC0415 - slow to import

    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
        wishes: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 16}
        wishes["input"] = "Hello!"
        response = await client.responses.create(**wishes)
        events = [event async for event in await client.responses.create(**wishes, stream=True)]
    spoken_text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert response.output_text == spoken_text != ""
    assert events[-1].response.usage.output_tokens == response.usage.output_tokens
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none") as claude:
        asked: dict[str, Any] = {"model": "tiny"}
        asked["messages"] = [{"role": "user", "content": "Hello!"}]
        greedy = {"max_tokens": 16, "extra_body": {"temperature": 0}}
        message = await claude.messages.create(**asked, **greedy)
        async with claude.messages.stream(**asked, **greedy) as stream:
            pieces = [piece async for piece in stream.text_stream]
        counted = await claude.messages.count_tokens(**asked)
        with pytest.raises(anthropic.NotFoundError):
            await claude.messages.create(**{**asked, "model": "other", "max_tokens": 1})
    assert message.content[0].text == "".join(pieces) != ""
    assert message.usage.output_tokens == 16
    assert counted.input_tokens == message.usage.input_tokens


async def test_replicas_of_different_shape_serve_their_types(served: Served) -> None:
    async with aiohttp.ClientSession() as session:
        document: dict[str, Any] = {}

        async def all_ready() -> bool:
            document.update(await status_of(session, served.url))
            return {replica["phase"] for replica in document["replicas"]} == {"ready"}

        # The status that gateways show is a moment old.
        await until(all_ready)
        shapes = {r["id"]: r["shape"]["tensor_parallel_size"] for r in document["replicas"]}
        assert shapes == {"one": 1, "two": 2}
        for kind, replica, prompt in (("short", "one", [5] * 20), ("long", "two", [5] * 300)):
            body = {**GREEDY, "prompt": prompt}
            _, seen = await answer_of(session, served, "/v1/completions", body, replica)
            assert seen == kind


def engine_socket(served: Served, replica: str) -> str:
    """The Unix socket on which a replica answers."""
    for entry in Path("/proc/net/unix").read_text().splitlines():
        path = entry.split()[-1]
        if path.endswith("/api.sock") and f"/{replica}" in path and Path(path).exists():
            return path
    raise AssertionError(f"no socket of {replica}")


@pytest.mark.parametrize("replica", ["one", "two"])
async def test_greedy_output_equals_the_engines_own(served: Served, replica: str) -> None:
    # Long enough for either by any guess at how many bytes a token has.
    prompt = "tell me of it " * (3 if replica == "one" else 120)
    chat = {**GREEDY, "messages": [{"role": "user", "content": prompt}]}
    text = {**GREEDY, "prompt": prompt}
    connector = aiohttp.UnixConnector(engine_socket(served, replica))
    async with (
        aiohttp.ClientSession() as session,
        aiohttp.ClientSession(connector=connector) as direct,
    ):
        for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
            for stream in (False, True):
                wish = {**body, "stream": stream}
                data, _ = await answer_of(session, served, path, wish, replica)
                through = spoken(data, stream=stream)
                async with direct.post("http://engine" + path, json=wish) as answer:
                    own = spoken(await answer.read(), stream=stream)
                assert through == own
                assert len(own) >= 20


async def answer_of(
    session: aiohttp.ClientSession, served: Served, path: str, wish: dict[str, Any], replica: str
) -> tuple[bytes, str]:
    """What a replica answers, and the workload type that the gateway saw.

    A slow machine may take an engine for hung, and then another one stands in. That is rare: a
    router that chose wrongly would do so again and again.
    """
    found = b"", ""

    async def by_the_replica() -> bool:
        nonlocal found
        async with session.post(served.url + path, json=wish) as answer:
            found = await answer.read(), answer.headers["x-oserve-workload-type"]
            assert answer.status == 200
            by = answer.headers["x-oserve-replica"]
        if by != replica:
            served.strays.append((replica, by))
            assert len(served.strays) <= MOST_STRAYS, served.log()
            await asyncio.sleep(1.0)
        return by == replica

    await until(by_the_replica)
    return found


def spoken(data: bytes, *, stream: bool) -> str:
    """The text of an answer, whatever its form."""
    if not stream:
        choice = json.loads(data)["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    events = [line[6:] for line in data.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


async def test_bad_input_is_told_and_wedges_nothing(served: Served) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({**GREEDY, "prompt": "x", "model": "other"}, 404),
        ({**GREEDY, "prompt": "x", "max_tokens": -1}, 400),
        ({**GREEDY, "prompt": [7] * 9000}, 400),
        ({**GREEDY}, 400),
        ({**GREEDY, "prompt": "x", "temperature": "hot"}, 400),
    ]
    async with aiohttp.ClientSession() as session:
        for body, status in cases:
            async with session.post(served.url + "/v1/completions", json=body) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["message"]
        for path in ("/collective_rpc", "/pause", "/sleep", "/load_lora_adapter", "/v1/../pause"):
            async with session.post(served.url + path, json={}) as answer:
                assert answer.status == 404
        async with session.post(served.url + "/tokenize", json={"prompt": "four"}) as answer:
            assert (await answer.json())["count"] in {4, 5}


async def test_a_client_that_leaves_frees_the_engine(served: Served) -> None:
    # It would take the engine minutes to say all of it.
    body = {**GREEDY, "prompt": "go on", "max_tokens": 8000, "stream": True}
    async with aiohttp.ClientSession() as session:

        async def at_work() -> bool:
            return await is_running(session, served.url)

        async def idle() -> bool:
            return not await is_running(session, served.url)

        async with session.post(served.url + "/v1/completions", json=body) as answer:
            await answer.content.readany()
            replica = answer.headers["x-oserve-replica"]
            await until(at_work)
        await until(idle)

        async def written_down() -> bool:
            rows = list(read_records(served.folder / "records.sqlite"))
            return any((row.replica, row.status) == (replica, "disconnected") for row in rows)

        await until(written_down)


async def test_a_killed_engine_costs_no_unanswered_request_and_comes_back(served: Served) -> None:
    async def call(session: aiohttp.ClientSession, index: int) -> int:
        body = {**GREEDY, "prompt": f"request {index} ", "max_tokens": 120}
        async with session.post(served.url + "/v1/completions", json=body) as answer:
            data = await answer.json()
            assert data["usage"]["completion_tokens"] == 120
            return answer.status

    async with aiohttp.ClientSession() as session:
        before = await status_of(session, served.url)
        victim = next(r for r in before["replicas"] if r["id"] == "one")
        calls = [asyncio.ensure_future(call(session, index)) for index in range(40)]

        async def at_work() -> bool:
            return await is_running(session, served.url)

        await until(at_work)
        os.kill(victim["pid"], signal.SIGKILL)
        seen = set()

        async def back() -> bool:
            document = await status_of(session, served.url)
            state = next(r for r in document["replicas"] if r["id"] == "one")
            seen.add(state["phase"])
            async with session.get(served.url + "/health") as answer:
                assert answer.status == 200
            return bool(state["phase"] == "ready" and state["pid"] != victim["pid"])

        await until(back)
        assert await asyncio.gather(*calls) == [200] * 40
        assert "gone" in seen
        async with session.get(served.url + "/metrics") as answer:
            metrics = await answer.text()
    assert 'oserve_requests_retried_total{replica="one"}' in metrics


async def test_streams_go_on_when_their_engine_is_killed(served: Served) -> None:
    streams = range(12)
    async with aiohttp.ClientSession() as session:
        calm = await asyncio.gather(*(told(session, served.url, index, [0]) for index in streams))
        before = await status_of(session, served.url)
        victim = next(r for r in before["replicas"] if r["id"] == "one")
        seen = [[0] for _ in streams]
        tasks = [
            asyncio.ensure_future(told(session, served.url, index, seen[index]))
            for index in streams
        ]
        # Soon enough for those on the victim not to be over, however fast it is beside the other.

        async def begun() -> bool:
            return sum(count >= 5 for (count,) in seen) >= 6

        await until(begun, 0.01)
        os.kill(victim["pid"], signal.SIGKILL)
        assert await asyncio.gather(*tasks) == calm
        async with session.get(served.url + "/metrics") as answer:
            metrics = await answer.text()
        found = re.findall(r"^oserve_requests_moved_total.* (\S+)$", metrics, re.MULTILINE)
        assert sum(map(float, found)) >= 2
        await back_again(session, served, victim["pid"])


async def streamed(
    session: aiohttp.ClientSession, url: str, prompt: list[int], seen: list[str]
) -> str:
    """The text of a stream; notes who sent each event."""
    body = {**GREEDY, "prompt": prompt, "max_tokens": 150, "stream": True}
    data = b""
    async with session.post(url + "/v1/completions", json=body) as answer:
        async for part in answer.content.iter_any():
            data += part
            seen.append(answer.headers["x-oserve-replica"])
    return spoken(data, stream=True)


def member_named(group: int, start: str) -> int:
    """The youngest process of a group whose name starts so."""
    members = group_members(group)
    return max(m for m in members if Path(f"/proc/{m}/comm").read_text().startswith(start))


@pytest.mark.parametrize(
    ("replica", "process", "tokens"), [("one", "VLLM::EngineCor", 30), ("two", "VLLM::Worker", 300)]
)
async def test_streams_go_on_when_their_engine_hangs(
    served: Served, replica: str, process: str, tokens: int
) -> None:
    prompts = [[7 + number] * tokens for number in range(6)]
    async with aiohttp.ClientSession() as session:
        calm = await asyncio.gather(*(streamed(session, served.url, p, []) for p in prompts))
        entries = (await status_of(session, served.url))["replicas"]
        pid = next(entry["pid"] for entry in entries if entry["id"] == replica)
        seen: list[list[str]] = [[] for _ in prompts]
        tasks = [
            asyncio.ensure_future(streamed(session, served.url, prompt, parts))
            for prompt, parts in zip(prompts, seen, strict=True)
        ]
        async with asyncio.timeout(_LIMIT_S):
            while any(len(parts) < 5 for parts in seen):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert any(replica in parts for parts in seen)
        # Its other processes live on, and answer what they can.
        os.kill(member_named(pid, process), signal.SIGSTOP)
        async with asyncio.timeout(_LIMIT_S):
            assert await asyncio.gather(*tasks) == calm
            await back_again(session, served, pid, replica)
    assert f"replica {replica} hangs: " in served.log()
    assert not group_members(pid)


async def back_again(
    session: aiohttp.ClientSession, served: Served, pid: int, replica: str = "one"
) -> None:
    """Wait until a replica, which was this process, is another and ready."""

    async def back() -> bool:
        document = await status_of(session, served.url)
        state = next(r for r in document["replicas"] if r["id"] == replica)
        return bool(state["phase"] == "ready" and state["pid"] != pid)

    await until(back)


async def test_bench_replays_a_trace_whole(served: Served, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = synthesise(rate_rps=4, duration_s=15, seed=3)
    trace.write_text(
        "arrival_s,input_tokens,output_tokens\n"
        + "".join(f"{r.arrival_s},{r.prompt_tokens},{r.output_tokens}\n" for r in rows)
    )
    command = [sys.executable, "-m", "oserve.cli", "bench", str(trace), "--url", served.url]
    command += ["--json", "--prompt-scale", "0.1", "--output-scale", "0.1"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    async with asyncio.timeout(_START_LIMIT_S):
        out, _ = await process.communicate()
    report = json.loads(out)
    assert report["failed"] == report["truncated"] == 0, report["errors"]
    assert report["completed"] == report["sent"] > 30
    assert process.returncode == 0


async def test_records_are_kept(served: Served) -> None:
    prompts = {"one": 31, "two": 331}
    async with aiohttp.ClientSession() as session:
        for tokens in prompts.values():
            body = {**GREEDY, "prompt": [5] * tokens}
            async with session.post(served.url + "/v1/completions", json=body) as answer:
                assert answer.status == 200

    async def kept() -> bool:
        rows = list(read_records(served.folder / "records.sqlite"))
        found = {
            row.replica: row.prompt_tokens
            for row in rows
            if row.status == "completed" and row.prompt_tokens in prompts.values()
        }
        return found == prompts

    await until(kept)


def test_a_plan_that_cannot_start_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    plan = tmp_path / "plan.yaml"
    plan.write_text("replicas: [{id: a, devices: ['cpu:0'], engine_args: [--no-such-flag]}]")
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--plan", str(plan)]
    command += ["--port", "0", "--state-dir", str(tmp_path), "--set", "control.max_failures=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 2, result.stderr
    assert "no replica of the plan could start" in result.stderr
    assert "no-such-flag" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            "replicas: [{id: a, shape: {tensor_parallel_size: 5}, "
            "devices: ['cpu:0','cpu:1','cpu:2','cpu:3','cpu:4']}]",
            ["'cpu:4'", "there are 4"],
        ),
        ("replicas: [{id: a, devcies: [x]}]", ["devcies", "did you mean devices?"]),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_starts(
    tmp_path: Path, plan: str, words: list[str]
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan)
    command = [sys.executable, "-m", "oserve.cli", "serve", "m", "--plan", str(path)]
    command += ["--cpu-slots", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words)
    assert "Traceback" not in result.stderr
