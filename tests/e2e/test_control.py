"""The controller with real engines: it grows, a person switches, it is killed and goes on."""

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .test_serving import Served, start, status_of

pytestmark = pytest.mark.engine

SMALL = """
id: small
workload_types: [{name: all}]
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [cpu:0]
"""
BODY = {"model": "tiny", "prompt": [5] * 8, "max_tokens": 3, "temperature": 0}
SETTINGS = (
    *("--cpu-slots", "2", "--port", "0"),
    *("--set", "planning.rates=chats:60x120=4,documents:1500x20=0.1"),
    *("--set", "control.decision_interval_s=4", "--set", "control.min_dwell_s=5"),
    *("--set", "control.start_s=5", "--set", "planning.objective=capacity"),
)
_RATE_RPS = 30.0
# Enough to show that no request fails, and no strain on two cores with engines that start.
_CALM_RPS = 4.0
_LIMIT_S = 300.0


async def one(session: aiohttp.ClientSession, url: str) -> int:
    async with session.post(url + "/v1/completions", json=BODY) as answer:
        await answer.read()
        return answer.status


async def under_load(
    url: str, until: Callable[[dict[str, Any]], bool], *, rate_rps: float = _RATE_RPS
) -> tuple[list[int], dict[str, Any]]:
    """Requests at a steady rate until the status is as wished; statuses of all, and that one."""
    async with aiohttp.ClientSession() as session:
        loop = asyncio.get_running_loop()
        calls = []
        deadline_s = loop.time() + _LIMIT_S
        document = await status_of(session, url)
        while not until(document):
            assert loop.time() < deadline_s, document
            calls.append(asyncio.ensure_future(one(session, url)))
            await asyncio.sleep(1 / rate_rps)
            if len(calls) % max(1, round(rate_rps / 2)) == 0:
                document = await status_of(session, url)
        return list(await asyncio.gather(*calls)), document


def ready(document: dict[str, Any]) -> set[str]:
    return {item["id"] for item in document["replicas"] if item["phase"] == "ready"}


def at_plan(document: dict[str, Any], plan: str, replica: str) -> bool:
    phases = {item["id"]: item["phase"] for item in document["replicas"]}
    alive = {name for name, phase in phases.items() if phase != "gone"}
    return document["plan_id"] == plan and alive == {replica} == ready(document)


async def test_it_grows_is_switched_by_hand_and_survives_a_kill(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(SMALL)
    words = ("--plan", str(plan), "--set", "control.mode=auto", *SETTINGS)
    served = start(tmp_path, *words)
    try:
        await _grows_and_is_switched(served)
    finally:
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(timeout=30)
    # Without a plan it goes on where it was: nothing is computed anew.
    again = start(tmp_path, *SETTINGS)
    try:
        async with aiohttp.ClientSession() as session:
            document = await status_of(session, again.url)
            assert document["plan_id"] == "by-hand"
            numbers = [item["number"] for item in document["control"]["decisions"]]
            assert numbers[0] > 0
            assert await one(session, again.url) == 200
    finally:
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(timeout=60) == 0


async def _grows_and_is_switched(served: Served) -> None:
    codes, document = await under_load(
        served.url,
        lambda d: d["plan_id"].startswith("planned-") and len(ready(d)) == 2,
    )
    assert set(codes) == {200}
    switch = next(d for d in document["control"]["decisions"] if d["verdict"] == "switch")
    assert switch["reason"] == "gain_exceeds_cost"
    assert switch["gain_requests"] > switch["cost_requests"]
    assert "gain_exceeds_cost" in served.log()

    by_hand = served.folder / "by-hand.yaml"
    by_hand.write_text(SMALL.replace("small", "by-hand").replace("256", "512"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oserve.cli", "switch", str(by_hand), "--url", served.url)
    )
    assert await process.wait() == 0
    codes, document = await under_load(
        served.url, lambda d: at_plan(d, "by-hand", "one"), rate_rps=_CALM_RPS
    )
    assert set(codes) == {200}
