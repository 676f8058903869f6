"""A demonstration that moves: serves a small model, changes its traffic, and tells what happened.

    make demo        sets up what it needs, then runs this

Traffic is calm, rises, flips to long prompts, and falls again, some five minutes in all. If the
controller sees no reason to switch within ``--patience`` seconds, the demonstration asks for a
switch as an operator would, and says so.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

# What it asks for if the controller sees no reason to switch.
BY_HAND = """
id: by-hand
workload_types: [{name: all}]
replicas:
  - id: small-steps
    shape: {precision: PRECISION, max_num_batched_tokens: 512, max_num_seqs: 16}
    devices: [cpu:0]
  - id: large-steps
    shape: {precision: PRECISION, max_num_batched_tokens: 1024, max_num_seqs: 32}
    devices: [cpu:1]
"""
# Seconds, requests/s as multiples of --rate, and the share of long prompts.
COURSE = (
    ("calm", 40.0, 0.3, 0.0),
    ("it rises", 100.0, 1.5, 0.1),
    ("it flips to long prompts", 80.0, 0.8, 0.9),
    ("it falls", 60.0, 0.2, 0.1),
)
WORDS = ("river", "stone", "winter", "letter", "engine", "garden", "market", "window")
# A switch is judged a minute after its end, and its last requests need some time.
JUDGED_S = 100.0
START_LIMIT_S = 300.0
EVENTS = "/oserve/v1/page/events"


@dataclass
class Seen:
    """What the demonstration saw: on the page's stream, and of its own requests."""

    began_s: float
    first_switch_s: float | None = None
    switches: list[dict[str, Any]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)


def say(text: str) -> None:
    print(text, flush=True)


async def watch(session: aiohttp.ClientSession, url: str, seen: Seen) -> None:
    """Follow the page's own stream, as a browser does."""
    while True:
        try:
            # The first event has the last hour.
            async with session.get(f"{url}{EVENTS}", read_bufsize=1 << 22) as answer:
                while text := await answer.content.readuntil(b"\n\n"):
                    found = msgspec.json.decode(text.removeprefix(b"data: "))["sections"]
                    if "switches" in found:
                        show(found["switches"], seen)
        except (aiohttp.ClientError, ValueError):
            await asyncio.sleep(1.0)


def show(switches: list[dict[str, Any]], seen: Seen) -> None:
    known = {item["id"]: item for item in seen.switches}
    for item in switches:
        old = known.get(item["id"])
        if old is None:
            if seen.first_switch_s is None:
                seen.first_switch_s = time.monotonic() - seen.began_s
            say(f"  the page shows a switch to plan {item['plan']} (by {item['by']})")
        elif old["ended_s"] is None and item["ended_s"] is not None:
            say(f"  the switch is {item['state']} after {item['ended_s'] - item['began_s']:.1f} s")
    seen.switches = switches


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, seen: Seen
) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 32,
        "temperature": 0,
        "stream": True,
    }
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            text = await answer.read()
            whole = answer.status == 200 and text.rstrip().endswith(b"data: [DONE]")
            seen.answers["complete" if whole else f"status {answer.status}, cut off"] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.answers[type(error).__name__] += 1


async def traffic(
    session: aiohttp.ClientSession, url: str, model: str, rate_rps: float, seen: Seen
) -> None:
    """Open loop, by the course; waits for the last answers."""
    draw = random.Random(1)
    running: set[asyncio.Task[None]] = set()
    for words, seconds, scale, long in COURSE:
        say(f"{words}: {scale * rate_rps:.1f} requests/s, {long:.0%} long prompts, {seconds:.0f} s")
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            count = 300 if draw.random() < long else 12
            prompt = " ".join(draw.choice(WORDS) for _ in range(count))
            task = asyncio.ensure_future(ask(session, url, model, prompt, seen))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(draw.expovariate(scale * rate_rps))
    if running:
        say(f"{len(running)} requests still run")
        await asyncio.wait(running, timeout=120.0)


async def by_hand(
    session: aiohttp.ClientSession, url: str, plan: bytes, after_s: float, seen: Seen
) -> None:
    await asyncio.sleep(after_s)
    if seen.switches:
        return
    say("  no reason to switch so far: asking for one as an operator")
    async with session.post(f"{url}/oserve/v1/switch", data=plan) as answer:
        if answer.status != 200:
            say(f"  it was refused: {(await answer.text())[:300]}")


def report(seen: Seen) -> None:
    total, complete = sum(seen.answers.values()), seen.answers["complete"]
    say("\nWhat happened")
    say(f"  requests: {total}, answered in full: {complete}, lost: {total - complete}")
    for words, count in seen.answers.items():
        if words != "complete":
            say(f"    {count} x {words}")
    if seen.first_switch_s is not None:
        say(f"  first switch on the page after {seen.first_switch_s:.0f} s from the first request")
    for item in seen.switches:
        took = "has not ended" if item["ended_s"] is None else f"{item['state']}"
        if item["ended_s"] is not None:
            took += f" in {item['ended_s'] - item['began_s']:.1f} s"
        size = f"{item['moved_bytes'] / 1e6:.0f} MB"
        say(f"  switch to {item['plan']} by {item['by']}: {took}, {size}")
        if (outcome := item["outcome"]) is not None:
            say(
                f"    {outcome['requests']} requests ran meanwhile, {outcome['moves']} moves of "
                f"streams, {outcome['lost']} lost"
            )
        if item["expected_gain"] is not None:
            net = item["expected_gain"] - item["expected_cost"]
            say(f"    expected: {net:.0f} requests more within limits in {item['lasts_s']:.0f} s")
        if item["realised_gain"] is not None:
            say(
                f"    realised: {item['realised_gain']} in {outcome['judged_s']:.0f} s (kept "
                f"{outcome['kept']}; by the simulator, the old plan {outcome['without']}, the new "
                f"one {outcome['with_it']})"
            )
    if not seen.switches:
        say("  no switch")


async def started(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    """Wait until it serves; ends the program if it does not."""
    end_s = time.monotonic() + START_LIMIT_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end_s and process.returncode is None:
            try:
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    tail = (await asyncio.to_thread(log.read_text))[-2000:]
    sys.exit(f"the server did not start:\n{tail}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=1.0, help="requests/s")
    parser.add_argument("--patience", type=float, default=75.0, help="s until a switch by hand")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--state-dir", default=".oserve/demo")
    wanted = parser.parse_args()
    url, name = f"http://127.0.0.1:{wanted.port}", Path(wanted.model).name
    state = Path(wanted.state_dir)
    await asyncio.to_thread(lambda: state.mkdir(parents=True, exist_ok=True))
    log = state / "demo.log"
    command = [sys.executable, "-m", "oserve.cli", "serve", wanted.model, "--cpu-slots", "2"]
    command += ["--port", str(wanted.port), "--state-dir", wanted.state_dir]
    settings = {
        "control.decision_interval_s": "10",
        "control.min_dwell_s": "20",
        # Each demonstration begins anew.
        "control.resume": "false",
        "planning.objective": "capacity",
        "planning.precisions": f"[{wanted.precision}]",
        "planning.rates": f"chats:30x32={wanted.rate},documents:600x32={wanted.rate / 4}",
        "planning.slo_ttft_ms": "3000",
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    out = await asyncio.to_thread(log.open, "wb")
    server = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
    try:
        say(f"starting a server with {wanted.model}; the first time it is measured for a minute")
        await started(server, url, log)
        say(f"\nLook: {url}/oserve/\n")
        await shown(url, name, wanted, BY_HAND.replace("PRECISION", wanted.precision).encode())
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGINT)
        await server.wait()
        out.close()


async def shown(url: str, name: str, wanted: argparse.Namespace, more: bytes) -> None:
    seen = Seen(began_s=time.monotonic())
    timeout = aiohttp.ClientTimeout(total=None, sock_read=180.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        beside = [
            asyncio.ensure_future(watch(session, url, seen)),
            asyncio.ensure_future(by_hand(session, url, more, wanted.patience, seen)),
        ]
        try:
            await traffic(session, url, name, wanted.rate, seen)
            if not judged(seen):
                say("waiting until the last switch can be judged; Ctrl-C skips this")
            end_s = time.monotonic() + JUDGED_S
            while time.monotonic() < end_s and not judged(seen):  # noqa: ASYNC110
                await asyncio.sleep(1.0)
        finally:
            for task in beside:
                task.cancel()
            report(seen)


def judged(seen: Seen) -> bool:
    return all(item["realised_gain"] is not None for item in seen.switches)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        say("ended before its time")
