"""Real engines: one of two is killed in the middle of greedy streams, which go on at the other."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.test_serving import GREEDY, Served, start, status_of

pytestmark = pytest.mark.engine

_SHAPE = "{precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 32}"
PLAN = f"""
id: two
replicas:
  - {{id: one, shape: {_SHAPE}, devices: [cpu:0]}}
  - {{id: two, shape: {_SHAPE}, devices: [cpu:1]}}
"""
STREAMS = 12
WISH = {**GREEDY, "max_tokens": 150, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("streams")
    plan = folder / "plan.yaml"
    plan.write_text(PLAN)
    server = start(folder, "--plan", str(plan), "--cpu-slots", "2", "--port", "0")
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0


def wish(index: int) -> tuple[str, dict[str, Any]]:
    """Chats and texts, some with stop strings that hold text back, some with logprobs."""
    body: dict[str, Any] = dict(WISH)
    if index % 3 == 0:
        body["stop"] = ["this will not be said"]
    if index % 4 == 1:
        body["logprobs"] = True if index % 2 == 0 else 1
    if index % 2:
        return "/v1/completions", {**body, "prompt": f"story {index}: "}
    messages = [{"role": "user", "content": f"tell me of {index}"}]
    return "/v1/chat/completions", {**body, "messages": messages}


async def told(session: aiohttp.ClientSession, url: str, index: int, seen: list[int]) -> Any:
    """Text, tokens with their logprobs, ends and usage of one stream; counts its events."""
    path, body = wish(index)
    text, tokens, ends, usage, roles = "", [], [], None, 0
    async with session.post(url + path, json=body) as answer:
        assert answer.status == 200
        lines = [line async for line in counted(answer, seen)]
    assert lines[-1] == b"[DONE]"
    for line in lines[:-1]:
        event = json.loads(line)
        assert "error" not in event, event
        for choice in event["choices"]:
            assert choice.get("token_ids") is None
            delta = choice.get("delta", {})
            roles += "role" in delta
            text += choice.get("text") or delta.get("content") or ""
            logprobs = choice.get("logprobs") or {}
            tokens += zip(logprobs.get("tokens", ()), logprobs.get("text_offset", ()), strict=True)
            if choice["finish_reason"]:
                ends.append(choice["finish_reason"])
        usage = event.get("usage") or usage
    return text, tokens, ends, usage, roles


async def counted(answer: aiohttp.ClientResponse, seen: list[int]) -> Any:
    async for line in answer.content:
        if line.startswith(b"data: "):
            seen[0] += 1
            yield line[6:].strip()


async def test_killed_in_mid_stream_nothing_is_lost_or_repeated(served: Served) -> None:
    async with aiohttp.ClientSession() as session:
        calm = await asyncio.gather(
            *(told(session, served.url, index, [0]) for index in range(STREAMS))
        )
        before = await status_of(session, served.url)
        victim = next(r for r in before["replicas"] if r["id"] == "one")
        seen = [[0] for _ in range(STREAMS)]
        tasks = [
            asyncio.ensure_future(told(session, served.url, index, seen[index]))
            for index in range(STREAMS)
        ]
        while min(count for (count,) in seen) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert all(not task.done() for task in tasks)
        os.kill(victim["pid"], signal.SIGKILL)
        rough = await asyncio.gather(*tasks)
        async with session.get(served.url + "/metrics") as answer:
            metrics = await answer.text()
    for index in range(STREAMS):
        assert rough[index] == calm[index], index
        assert rough[index][2:] == calm[index][2:]
        assert rough[index][3]["completion_tokens"] == WISH["max_tokens"]
    lines = [line for line in metrics.splitlines() if line.startswith("oserve_requests_moved_tot")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in lines) >= 2, Path(served.folder)
