"""Load on two busy engines for as long as wanted, and whether one of them was taken to hang.

    .venv/bin/python benchmarks/faults/calm.py [--minutes 60] [--streams 10] [--json FILE]

``oserve serve`` serves the tiny model with two replicas of one core each, as many streams as fit
and then some run at any time: short chats, long documents that fill the context, long answers;
each client sends its next request when the last has ended. Nothing is stopped or killed, so every
engine that is ended for hanging is a false alarm. Told are requests that ended well and that
failed, engines that were taken to hang, starts of engines beyond the first two, and the nearest
approach: the longest silence, and the largest part of the limit in force that one reached, as
``/oserve/v1/status`` says each half second. The longest wait of this process itself for its next
turn says how busy the machine was.

Ends with 1 if there was an alarm, a restart or a failed request. Bounded by ``--minutes`` and the
start, four minutes at most. Everything stays on the loopback interface.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from serving import served

from oserve.engines.tiny import make_tiny_model

_REQUEST_LIMIT_S = 600.0
_LOOK_S = 0.5
_TELL_S = 60.0
_CONTEXT = 4096
_PLAN = """
id: calm
workload_types: [{name: short, max_prompt_tokens: 400}, {name: long}]
replicas:
  - id: small
    shape: {precision: fp32, max_num_batched_tokens: 128, max_num_seqs: 16}
    devices: [cpu:0]
  - id: large
    shape: {precision: fp32, max_num_batched_tokens: 2048, max_num_seqs: 8}
    devices: [cpu:1]
routing_shares: {short: {small: 0.7, large: 0.3}, long: {small: 0.3, large: 0.7}}
"""
_WORDS = ("--cpu-slots", "2", "--set", f"engines.max_model_len={_CONTEXT}")
# Prompt and output tokens, and how often.
_KINDS = (((8, 200), (20, 200), 6), ((1500, 3800), (5, 60), 3), ((50, 400), (400, 1200), 1))


class Load:
    """Clients, and who looks at the server meanwhile."""

    def __init__(self, url: str, until_s: float) -> None:
        self._url = url
        self._until_s = until_s
        self.ended: Counter[str] = Counter()
        self.tokens = 0
        self.longest_silence_s = 0.0
        self.nearest = 0.0
        self.late_s = 0.0
        self.phases: Counter[str] = Counter()
        self.pids: dict[str, set[int]] = {}

    async def run(self, streams: int) -> None:
        limit = aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S)
        async with aiohttp.ClientSession(
            timeout=limit, connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            clients = [self._client(session, random.Random(seed)) for seed in range(streams)]
            await asyncio.gather(self._look(session), *clients)

    async def _client(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        weights = [often for _, _, often in _KINDS]
        while time.monotonic() < self._until_s:
            prompt, output, _ = rng.choices(_KINDS, weights)[0]
            body = {
                "model": "tiny",
                # Prompts that differ, so that none is answered from what was computed before.
                "prompt": [rng.randrange(5, 250) for _ in range(rng.randint(*prompt))],
                "max_tokens": min(rng.randint(*output), _CONTEXT - prompt[1] - 1),
                "ignore_eos": True,
                "stream": True,
            }
            self.ended[await self._one(session, body)] += 1

    async def _one(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        done = False
        try:
            async with session.post(self._url + "/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return f"status {answer.status}"
                async for line in answer.content:
                    done = done or line.strip() == b"data: [DONE]"
                    self.tokens += line.startswith(b"data: ")
                    if line.startswith(b'data: {"error"'):
                        return line.decode(errors="replace").strip()[:200]
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return type(error).__name__
        return "completed" if done else "truncated"

    async def _look(self, session: aiohttp.ClientSession) -> None:
        tell_s = time.monotonic() + _TELL_S
        while time.monotonic() < self._until_s:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(self._url + "/oserve/v1/status") as answer:
                    document = await answer.json()
                for entry in document["replicas"]:
                    self._note(entry)
            if time.monotonic() > tell_s:
                tell_s += _TELL_S
                print(json.dumps(self.report()), flush=True)
            turn_s = time.monotonic()
            await asyncio.sleep(_LOOK_S)
            self.late_s = max(self.late_s, time.monotonic() - turn_s - _LOOK_S)

    def _note(self, entry: dict[str, Any]) -> None:
        self.phases[entry["phase"]] += 1
        if entry["pid"]:
            self.pids.setdefault(entry["id"], set()).add(entry["pid"])
        self.longest_silence_s = max(self.longest_silence_s, entry["silent_s"])
        if entry["patience_s"]:
            self.nearest = max(self.nearest, entry["silent_s"] / entry["patience_s"])

    def report(self) -> dict[str, Any]:
        return {
            "at": time.strftime("%H:%M:%S"),
            "requests": dict(self.ended),
            "chunks": self.tokens,
            "restarts": sum(len(pids) - 1 for pids in self.pids.values()),
            "phases": dict(self.phases),
            "longest_silence_s": self.longest_silence_s,
            "nearest": round(self.nearest, 3),
            "late_s": round(self.late_s, 2),
            "load": [round(value, 1) for value in os.getloadavg()],
        }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=10, help="requests under way at any time")
    parser.add_argument("--json", type=Path, help="write the report there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oserve-calm-") as name:
        folder = Path(name)
        make_tiny_model(folder / "tiny")
        with served(folder, "calm", _PLAN, *_WORDS) as url:
            load = Load(url, time.monotonic() + 60.0 * arguments.minutes)
            asyncio.run(load.run(arguments.streams))
        log = (folder / "calm.log").read_text()
    alarms = re.findall(r"^.*replica \S+ hangs: .*$", log, re.MULTILINE)
    report = {**load.report(), "minutes": arguments.minutes, "alarms": alarms}
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    failed = sum(count for how, count in load.ended.items() if how != "completed")
    return 1 if alarms or failed or report["restarts"] else 0


if __name__ == "__main__":
    sys.exit(main())
