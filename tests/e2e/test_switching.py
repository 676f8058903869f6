"""A server that is switched from layout to layout while it serves: no request fails or differs."""

import asyncio
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
_LIMIT_S = 150.0
_GAP_S = 0.3


async def one(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.post(url + "/v1/completions", json=BODY) as answer:
        document = await answer.json()
        return answer.status, str(document.get("choices", [{}])[0].get("text", document))


async def switched(served: Served, name: str) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """Switch by hand under a light load; the report, and all answers meanwhile."""
    command = ("-m", "oserve.cli", "switch", "--to", str(served.folder / f"{name}.yaml"))
    process = await asyncio.create_subprocess_exec(sys.executable, *command, "--url", served.url)
    async with aiohttp.ClientSession() as session:
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
    words = ("--plan", str(tmp_path / "singles.yaml"), "--cpu-slots", "3", "--port", "0")
    served = start(tmp_path, *words)
    family = descendants(served.process.pid)
    try:
        async with aiohttp.ClientSession() as session:
            status, text = await one(session, served.url)
        assert status == 200
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
            report, answers = await switched(served, name)
            assert (report["state"], report["method"]) == ("done", "transfer"), report
            # Not one failed, and each is what an engine loaded from disk said.
            assert set(answers) == {(200, text)}
            family |= descendants(served.process.pid)
    finally:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 0
    left = [pid for pid in family if (Path("/proc") / str(pid)).exists()]
    assert not left, served.log()
