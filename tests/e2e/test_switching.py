"""A server that is switched from layout to layout while it serves: no request fails or differs."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .test_serving import Served, descendants, start, status_of

pytestmark = pytest.mark.engine

SHAPE = "precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16"
PLANS = {
    "singles": f"""
replicas:
  - {{id: a, shape: {{{SHAPE}}}, devices: [cpu:0]}}
  - {{id: b, shape: {{{SHAPE}}}, devices: [cpu:1]}}
""",
    "wide": f"""
replicas:
  - {{id: a, shape: {{tensor_parallel_size: 2, {SHAPE}}}, devices: [cpu:0, cpu:1]}}
""",
    "both": f"""
replicas:
  - {{id: a, shape: {{{SHAPE}}}, devices: [cpu:0]}}
  - {{id: p, shape: {{pipeline_parallel_size: 2, {SHAPE}}}, devices: [cpu:1, cpu:2]}}
""",
}
BODY = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
# Longer than replicas may drain, so that they move in the middle of decoding.
LONG = {**BODY, "prompt": [7] * 600, "max_tokens": 160, "stream": True}
_LIMIT_S = 300.0
_GAP_S = 0.3


async def one(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.post(url + "/v1/completions", json=BODY) as answer:
        document = await answer.json()
        return answer.status, str(document.get("choices", [{}])[0].get("text", document))


async def long_one(session: aiohttp.ClientSession, url: str) -> tuple[str, int]:
    """The text of a stream and the tokens that it says it has."""
    text, tokens = "", 0
    options = {"stream_options": {"include_usage": True}}
    async with session.post(url + "/v1/completions", json={**LONG, **options}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                text += "".join(choice["text"] for choice in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens


async def moved(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Streams that went on elsewhere so far, by the way they went."""
    async with session.get(url + "/metrics") as answer:
        text = await answer.text()
    found = {"move": 0.0, "replay": 0.0}
    for line in text.splitlines():
        if line.startswith("oserve_requests_moved_total{"):
            way = line.partition('way="')[2].partition('"')[0]
            found[way] += float(line.rpartition(" ")[2])
    return found


async def switched(served: Served, name: str, *, long: str) -> tuple[Any, list[tuple[int, str]]]:
    """Switch by hand under a light load; the report, and all answers meanwhile.

    ``long`` is what two streams at a time say, one after the other, all the while.
    """
    command = ("-m", "oserve.cli", "switch", "--to", str(served.folder / f"{name}.yaml"))
    process = await asyncio.create_subprocess_exec(sys.executable, *command, "--url", served.url)
    async with aiohttp.ClientSession() as session:
        over = asyncio.Event()

        async def keep_on() -> None:
            while not over.is_set():
                assert await long_one(session, served.url) == (long, LONG["max_tokens"])

        streams = [asyncio.ensure_future(keep_on()) for _ in range(2)]
        calls = []
        deadline_s = asyncio.get_running_loop().time() + _LIMIT_S
        while True:
            calls.append(asyncio.ensure_future(one(session, served.url)))
            await asyncio.sleep(_GAP_S)
            report = (await status_of(session, served.url))["switch"]
            if report and report["plan_id"] == name and report["ended_s"] is not None:
                break
            assert asyncio.get_running_loop().time() < deadline_s, (report, served.log())
        assert await process.wait() == 0
        answers = list(await asyncio.gather(*calls))
        over.set()
        await asyncio.gather(*streams)
        async with session.get(f"{served.url}/oserve/v1/switches/{report['id']}") as answer:
            assert await answer.json() == report
        async with session.get(f"{served.url}/oserve/v1/switches") as answer:
            assert (await answer.json())["switches"][-1] == report
        async with session.get(f"{served.url}/oserve/v1/switches/none") as answer:
            assert answer.status == 404
        return report, answers


async def test_switches_in_a_row_under_load(tmp_path: Path) -> None:
    for name, text in PLANS.items():
        (tmp_path / f"{name}.yaml").write_text(f"id: {name}\n{text}")
    served = start(
        tmp_path,
        *("--plan", str(tmp_path / "singles.yaml"), "--cpu-slots", "3", "--port", "0"),
        *("--set", "gateway.move.drain_limit_s=0.2"),
    )
    family = descendants(served.process.pid)
    try:
        async with aiohttp.ClientSession() as session:
            status, text = await one(session, served.url)
            long, tokens = await long_one(session, served.url)
        assert status == 200
        assert tokens == LONG["max_tokens"]
        dry = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "oserve.cli", "switch", str(tmp_path / "both.yaml")),
            *("--dry-run", "--url", served.url),
            stderr=asyncio.subprocess.PIPE,
        )
        _, told = await dry.communicate()
        assert dry.returncode == 0
        # The second stage of p is on a device that has nothing yet.
        assert b"-> cpu:2" in told
        for name in ("wide", "both", "singles"):
            report, answers = await switched(served, name, long=long)
            assert (report["state"], report["method"]) == ("done", "transfer"), report
            # Not one failed, and each is what an engine loaded from disk said.
            assert set(answers) == {(200, text)}
            family |= descendants(served.process.pid)
        async with aiohttp.ClientSession() as session:
            ways = await moved(session, served.url)
        # Streams of every switch went on elsewhere, and with their KV cache.
        assert ways["move"] >= len(PLANS), (ways, served.log())
    finally:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 0
    left = [pid for pid in family if (Path("/proc") / str(pid)).exists()]
    assert not left, served.log()
