"""What the order of requests is worth to short prompts, on a real engine under a mixed burst.

    .venv/bin/python benchmarks/order.py [--model MODEL] [--rounds 2] [--json FILE]

Starts `oserve serve` with one CPU replica (chunk 512, 8 sequences), with `gateway.order.policy`
`priority` and `fcfs`, and sends the same burst to each: 36 prompts of 32 tokens spread among 24 of
3,000, 32 output tokens each, all within three seconds. Rounds alternate between the two.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from oserve.traces.metrics import percentile

SHORT, LONG, OUTPUT = 32, 3000, 32
PLAN = """
replicas:
  - id: one
    devices: [cpu:0]
    shape: {precision: fp32, max_num_batched_tokens: 512, max_num_seqs: 8}
"""


def start(model: Path, folder: Path, policy: str) -> tuple[subprocess.Popen[bytes], str]:
    plan = folder / "plan.yaml"
    plan.write_text(PLAN)
    log = folder / f"{policy}.log"
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--plan", str(plan)]
    command += [
        "--port",
        "0",
        "--state-dir",
        str(folder),
        "--set",
        f"gateway.order.policy={policy}",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    while "Ready on" not in log.read_text():
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.2)
    line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
    return process, line.split()[2]


def burst(seed: int) -> list[tuple[float, int]]:
    """(due_s, prompt tokens), the same for both contenders."""
    draw = random.Random(seed)
    lengths = [SHORT] * 36 + [LONG] * 24
    draw.shuffle(lengths)
    return [(index * 0.05, length) for index, length in enumerate(lengths)]


async def ttft_s(session: aiohttp.ClientSession, url: str, length: int, seed: int) -> float:
    draw = random.Random(seed)
    prompt = [draw.randrange(32, 127) for _ in range(length)]
    body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "stream": True}
    started_s = time.perf_counter()
    async with session.post(url + "/v1/completions", json=body) as answer:
        await answer.content.readany()
        first_s = time.perf_counter() - started_s
        rest = await answer.content.read()
    if b"[DONE]" not in rest:
        sys.exit("a stream did not complete")
    return first_s


async def run(url: str, seed: int) -> dict[int, list[float]]:
    seen: dict[int, list[float]] = {SHORT: [], LONG: []}

    async def one(due_s: float, length: int, index: int) -> None:
        await asyncio.sleep(due_s)
        seen[length].append(await ttft_s(session, url, length, seed * 1000 + index))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(
            *(one(due_s, length, index) for index, (due_s, length) in enumerate(burst(seed)))
        )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".oserve/models/tiny-llama"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"priority": [], "fcfs": []}
    for index in range(wanted.rounds):
        for policy, taken in rows.items():
            with tempfile.TemporaryDirectory() as folder:
                process, url = start(wanted.model, Path(folder), policy)
                try:
                    seen = asyncio.run(run(url, seed=index))
                finally:
                    process.send_signal(signal.SIGINT)
                    process.wait()
            row = {
                f"{name}_{label}_s": percentile(seen[length], share)
                for name, length in (("short", SHORT), ("long", LONG))
                for label, share in (("p50", 0.5), ("p99", 0.99))
            }
            row["longest_wait_s"] = max(seen[SHORT] + seen[LONG])
            taken.append(row)
            shown = "  ".join(f"{key} {value:6.2f}" for key, value in row.items())
            print(f"round {index} {policy:9} {shown}", flush=True)
    medians = {
        policy: {key: statistics.median(row[key] for row in taken) for key in taken[0]}
        for policy, taken in rows.items()
    }
    ratio = medians["fcfs"]["short_p99_s"] / medians["priority"]["short_p99_s"]
    print(f"P99 TTFT of short prompts, fcfs over priority: {ratio:.1f} x")
    if wanted.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        wanted.json.write_text(json.dumps({"machine": machine, "medians": medians, "rounds": rows}))


if __name__ == "__main__":
    main()
