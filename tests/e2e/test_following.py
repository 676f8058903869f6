"""A server with real engines follows the load on its ladder: up when it rises, down again after."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from oserve.core import Precision
from oserve.engines.tiny import make_tiny_model
from oserve.perf.known_models import find_model
from oserve.perf.profile import ProfileEntry, shipped_profile, write_profile

from .test_serving import Served, start, status_of

pytestmark = pytest.mark.engine

# Two devices in one replica answer sooner, two replicas of 32 sequences each carry more. Steps are
# so slow that any processor is found faster by more than observed speeds may be, which is four
# times: then the ladder is the same everywhere, and 3.6 and 7 requests/s of 20 tokens are its
# capacities, of which 1.1 times the load is to be held.
STEP_S = {1: 1.76, 2: 1.6}
SEQS, TOKENS = 32, 20
FIRST_RPS, LOW_RPS, HIGH_RPS = 0.3, 0.8, 5.2
WIDE = """
id: wide
workload_types: [{name: all}]
replicas:
  - id: w
    shape: {tensor_parallel_size: 2, precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 32}
    devices: [cpu:0, cpu:1]
"""
SETTINGS = {
    "planning.objective": "latency",
    "planning.precisions": "[fp32]",
    "planning.rates": f"all:40x{TOKENS}=0.3",
    "planning.slo_ttft_ms": "8000",
    "planning.slo_tpot_ms": "3600",
    "control.mode": "auto",
    "control.decision_interval_s": "4",
    "control.fall_after_s": "8",
    "control.min_dwell_s": "2",
    "control.margin": "0.1",
    "control.start_s": "5",
    "gateway.move.drain_limit_s": "0.5",
}
_LIMIT_S = 300.0
_PROMPTS = tuple([seed] * 40 for seed in (5, 7, 11, 13))


def write_slow_profile(folder: Path) -> Path:
    """A profile of the tiny model with one fixed time a step, by the number of devices."""
    shipped = shipped_profile(find_model(str(make_tiny_model(folder / "tiny"))), "cpu")
    assert shipped is not None
    profile = shipped[1]
    made: dict[int, ProfileEntry] = {}
    for entry in profile.entries:
        size = entry.tensor_parallel_size
        if entry.precision is Precision.FP32 and entry.pipeline_parallel_size == 1:
            fixed = dict.fromkeys(entry.coefficients, 1e-9) | {
                name: 50.0
                for name in ("gemm", "memory", "kv", "attention", "all_reduce")
                if name in entry.coefficients
            }
            fixed["step_s"] = STEP_S[size]
            made[size] = msgspec.structs.replace(entry, coefficients=fixed)
    path = folder / "slow.json"
    write_profile(path, msgspec.structs.replace(profile, entries=tuple(made.values())))
    return path


@dataclass
class Load:
    """Streams of known texts at a steady rate."""

    url: str
    known: list[str] = field(default_factory=list)

    async def stream(self, session: aiohttp.ClientSession, prompt: Sequence[int]) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        text, done = "", False
        async with session.post(self.url + "/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                done = done or line.startswith(b"data: [DONE]")
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    text += "".join(choice["text"] for choice in event["choices"])
        assert done
        return text

    async def until(
        self, rate_rps: float, reached: Callable[[dict[str, Any]], bool], served: Served
    ) -> dict[str, Any]:
        """Keep up the load until the status is as wished; every stream says what it must."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _LIMIT_S
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            self.known = self.known or [await self.stream(session, each) for each in _PROMPTS]
            calls: list[asyncio.Task[str]] = []
            while True:
                document = await status_of(session, self.url)
                if reached(document):
                    break
                assert loop.time() < deadline_s, (document["control"], served.log())
                for _ in range(3):
                    prompt = _PROMPTS[len(calls) % len(_PROMPTS)]
                    calls.append(asyncio.ensure_future(self.stream(session, prompt)))
                    await asyncio.sleep(1 / rate_rps)
            said = await asyncio.gather(*calls)
        expected = [self.known[number % len(_PROMPTS)] for number in range(len(said))]
        assert said == expected
        return document


def serves(*sizes: int) -> Callable[[dict[str, Any]], bool]:
    """Whether replicas of just these tensor parallel sizes are left, ready, without a switch."""

    def reached(document: dict[str, Any]) -> bool:
        alive = [item for item in document["replicas"] if item["phase"] != "gone"]
        there = sorted(item["shape"]["tensor_parallel_size"] for item in alive)
        ready = all(item["phase"] == "ready" for item in alive)
        return ready and there == sorted(sizes)

    return reached


def knows_speeds(document: dict[str, Any]) -> bool:
    """Whether the ladder is one of the speeds that are observed."""
    ladder = document["control"]["ladder"]
    return bool(ladder) and ladder["capacity_rps"] > HIGH_RPS


def reasons(document: dict[str, Any]) -> list[str]:
    decisions = document["control"]["decisions"]
    return [item["reason"] for item in decisions if item["verdict"] == "switch"]


async def test_it_climbs_when_the_load_rises_and_comes_down_after(tmp_path: Path) -> None:
    plan = tmp_path / "wide.yaml"
    plan.write_text(WIDE)
    settings = SETTINGS | {"planning.profile": str(write_slow_profile(tmp_path))}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    served = start(tmp_path, "--plan", str(plan), "--cpu-slots", "2", "--port", "0", *words)
    load = Load(served.url)
    try:
        # One replica is the best at a low load, two hold a high one.
        document = await load.until(FIRST_RPS, knows_speeds, served)
        rungs = document["control"]["ladder"]["rungs"]
        assert "1 x tp2" in rungs[0]["deployment"]
        assert any("tp1" in row["deployment"] and row["holds"] for row in rungs)

        document = await load.until(HIGH_RPS, serves(1, 1), served)
        # A forecast beyond what any deployment holds makes it a matter of gain.
        assert set(reasons(document)) <= {"load_rises", "objective_gains"}

        document = await load.until(LOW_RPS, serves(2), served)
        assert "objective_gains" in reasons(document)

        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "oserve.cli", "status", "--json", "--url", served.url),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await process.communicate()
        control = json.loads(said)["control"]
        assert control["ladder"]["objectives"] == {"all": "latency"}
        places = [item["place"] for item in control["decisions"] if item["place"]]
        assert any("1 x tp2" in place["rung"] for place in places)
    finally:
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 0
