"""Switches of real CPU engines, weights moved from engine to engine beside restarts from disk.

    .venv/bin/python benchmarks/switch/engines.py [--layers 16] [--precision fp32] [--json]

A Llama of noise (16 layers, hidden size 1024: 252 million parameters) is served by `oserve serve`
on two slots of CPU cores. Two replicas of one device become one of two devices and back, while
streams of 48 tokens run one after the other. Four ways: weights moved; moved at no more than
``--pace`` bytes/s; engines restarted with the files in the page cache; restarted with the files
dropped from it (posix_fadvise). Per way and direction:

- the seconds of each phase, from the server's own report, and until the new plan serves;
- bytes, and bytes/s of the transfer phase, which includes joining and repacking;
- the longest gap between tokens of any stream that ran then, and before the switch, and the longest
  wait for a first token;
- the longest time in which no replica was ready (``/health``, asked every 20 ms);
- requests that failed.

With ``--row 20``: so many switches one after the other, between two replicas, one of two devices
and one of two stages, of the tiny model, while three streams of 160 tokens run whose text is known.
It tells how long each took, how many streams went on elsewhere and how, and how many failed or
differed.

With ``--idle`` nobody asks meanwhile, so that the new engines have the cores to themselves.

Beside them (alone with ``--limits``): bytes/s of a copy in memory, through a Unix socket between
two processes, and of writing to memory for the first time, by one process and by two, here and
now. All share the machine's cores, so times depend on them more than on the method.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

# They lie beside this file; mypy knows them by longer names.
from mid_model import make_mid_model  # type: ignore[import-not-found]
from streams import BODY, Seen  # type: ignore[import-not-found]

from oserve.engines.tiny import make_tiny_model

LIMIT_S = 900.0
_SEEN_S = 1.0


def plans(folder: Path, precision: str) -> dict[str, Path]:
    shape = f"precision: {precision}, max_num_batched_tokens: 256, max_num_seqs: 4"
    texts = {
        "narrow": f"""
  - {{id: a, shape: {{{shape}}}, devices: [cpu:0]}}
  - {{id: b, shape: {{{shape}}}, devices: [cpu:1]}}
""",
        "wide": f"""
  - {{id: w, shape: {{tensor_parallel_size: 2, {shape}}}, devices: [cpu:0, cpu:1]}}
""",
        "deep": f"""
  - {{id: d, shape: {{pipeline_parallel_size: 2, {shape}}}, devices: [cpu:0, cpu:1]}}
""",
    }
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(f"id: {name}\nreplicas:{text}")
    return found


class Watch(Seen):  # type: ignore[misc]
    """Streams one after the other, and whether a replica is ready, until it is stopped."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        super().__init__()
        self._session, self._url, self._model = session, url, model
        self.unready: list[tuple[float, float]] = []

    async def stream(self) -> None:
        while True:
            told = await self.ask(self._session, self._url, {**BODY, "model": self._model})
            if not told.whole:
                await asyncio.sleep(0.1)

    async def health(self) -> None:
        since_s: float | None = None
        while True:
            async with self._session.get(self._url + "/health") as answer:
                ready = answer.status == 200
            now_s = time.time()
            if ready:
                if since_s is not None:
                    self.unready.append((since_s, now_s - since_s))
                since_s = None
            elif since_s is None:
                since_s = now_s
            await asyncio.sleep(0.02)

    def longest_unready_s(self, start_s: float) -> float:
        return max((took for since_s, took in self.unready if since_s >= start_s), default=0.0)


@contextlib.asynccontextmanager
async def served(model: Path, folder: Path, plan: Path, *words: str) -> AsyncIterator[str]:
    log = (folder / "serve.log").open("ab")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oserve.cli", "serve", str(model), "--plan", str(plan)),
        *("--cpu-slots", "2", "--port", "0", "--state-dir", str(folder), *words),
        *("--set", "engines.max_model_len=1024", "--set", "control.interval_s=0.2"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    url = said = ""
    while not url:
        line = (await process.stderr.readline()).decode()
        said += line
        assert line, f"the server ended: {said}"
        log.write(line.encode())
        if line.startswith("Ready on"):
            url = line.split()[2]
    rest = asyncio.ensure_future(_drained(process.stderr, log))
    try:
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()
        await rest
        log.close()


async def _drained(stream: asyncio.StreamReader, log: Any) -> None:
    while data := await stream.read(4096):
        log.write(data)


async def switched(
    session: aiohttp.ClientSession,
    url: str,
    plan: Path,
    watch: Watch,
    cold: Path | None,
    *,
    quiet_s: float = 15.0,
) -> dict[str, Any]:
    """One switch, from the call until nothing is left of the old plan."""
    begun_s = time.time()
    await asyncio.sleep(quiet_s)
    if cold is not None:
        drop(cold)
    body = await asyncio.to_thread(plan.read_bytes)
    async with session.post(url + "/oserve/v1/plan", data=body) as answer:
        waves = (await answer.json()).get("foreseen", {}).get("waves", ())
    start_s = time.time()
    async with session.post(url + "/oserve/v1/switch", data=body) as answer:
        assert answer.status == 200, await answer.text()
    while True:
        await asyncio.sleep(0.1)
        async with session.get(url + "/oserve/v1/status") as answer:
            document = await answer.json()
        report = document["switch"]
        if report and report["plan_id"] == plan.stem and report["ended_s"] is not None:
            break
        assert time.time() - start_s < LIMIT_S, report
    end_s = report["ended_s"]
    # For the watch to see what the report says.
    await asyncio.sleep(_SEEN_S)
    phases = report["phases"]
    took = {one["phase"]: after["at_s"] - one["at_s"] for one, after in pairwise(phases)}
    committed_s = next((one["at_s"] for one in phases if one["phase"] == "drain"), end_s)
    moved = report["moved_bytes"]
    return {
        "to": plan.stem,
        "method": report["method"],
        "state": report["state"],
        "reason": report["reason"],
        "until_it_serves_s": committed_s - start_s,
        "until_over_s": end_s - start_s,
        "phases_s": took,
        "engines": max((len(wave["start"]) for wave in waves), default=0),
        "links_busy_s": sum(wave["links_busy_s"] for wave in waves),
        "largest_bytes": max((wave["largest_bytes"] for wave in waves), default=0),
        "waves": len(waves),
        "moved_bytes": moved,
        "bytes_per_s": moved / took["transfer"] if moved else None,
        "gap_before_s": watch.longest_gap_s(begun_s, start_s),
        "gap_during_s": watch.longest_gap_s(start_s, end_s),
        "first_before_s": watch.longest_first_s(begun_s, start_s),
        "first_during_s": watch.longest_first_s(start_s, end_s + _SEEN_S),
        "unready_s": watch.longest_unready_s(start_s),
    }


def drop(model: Path) -> None:
    """Have the kernel forget the model's files."""
    for path in model.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def way(
    model: Path,
    folder: Path,
    named: dict[str, Path],
    name: str,
    words: tuple[str, ...],
    *,
    idle: bool = False,
) -> list[dict[str, Any]]:
    cold = model if name == "restart, cold" else None
    rows = []
    async with served(model, folder, named["narrow"], *words) as url:
        timeout = aiohttp.ClientTimeout(total=LIMIT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            watch = Watch(session, url, model.name)
            tasks = [asyncio.ensure_future(watch.health())]
            if not idle:
                tasks.append(asyncio.ensure_future(watch.stream()))
            for target in ("wide", "narrow"):
                sent, failed = watch.sent, watch.failed
                row = await switched(session, url, named[target], watch, cold)
                rows.append(
                    {"way": name, **row, "sent": watch.sent - sent, "failed": watch.failed - failed}
                )
                print(_line(rows[-1]), file=sys.stderr, flush=True)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return rows


ROW_BODY = {**BODY, "prompt": [7] * 300, "max_tokens": 160}


async def text_of(session: aiohttp.ClientSession, url: str, model: str) -> str:
    """What a stream says, or what went wrong with it."""
    told = await Seen().ask(session, url, {**ROW_BODY, "model": model})
    return told.text if told.whole else f"failed: {told.reason}"


async def in_a_row(model: Path, folder: Path, named: dict[str, Path], count: int) -> dict[str, Any]:
    """Many switches in a row, and streams that are to say the same whatever happens."""
    told: list[str] = []
    reports = []
    words = ("--set", "gateway.move.drain_limit_s=0.5")
    async with served(model, folder, named["narrow"], *words) as url:
        timeout = aiohttp.ClientTimeout(total=LIMIT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            known = await text_of(session, url, model.name)

            async def keep_on() -> None:
                while True:
                    told.append(await text_of(session, url, model.name))

            streams = [asyncio.ensure_future(keep_on()) for _ in range(3)]
            watch = Watch(session, url, model.name)
            for number in range(count):
                name = ("wide", "deep", "narrow")[number % 3]
                report = await switched(session, url, named[name], watch, None, quiet_s=1.0)
                reports.append(report)
                line = _line({"way": "row", "failed": 0, "sent": 0, **report})
                print(number + 1, line, file=sys.stderr, flush=True)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            async with session.get(url + "/metrics") as answer:
                metrics = await answer.text()
    moved = [
        line for line in metrics.splitlines() if line.startswith("oserve_requests_moved_total{")
    ]
    took = sorted(item["until_it_serves_s"] for item in reports)
    return {
        "switches": len(reports),
        "done": sum(item["state"] == "done" for item in reports),
        "until_it_serves_s": {"median": took[len(took) // 2], "worst": took[-1]},
        "streams": len(told),
        "failed": sum(item.startswith("failed: ") for item in told),
        "differed": sum(item != known and not item.startswith("failed: ") for item in told),
        "moved": moved,
        "rows": reports,
    }


def limits() -> dict[str, float]:
    """Bytes/s of a copy in memory, and through a Unix socket."""
    size = 256 << 20
    one = np.ones(size, dtype=np.uint8)
    other = np.zeros(size, dtype=np.uint8)
    start_s = time.perf_counter()
    for _ in range(3):
        np.copyto(other, one)
    memory = 3 * size / (time.perf_counter() - start_s)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    if os.fork() == 0:
        theirs.sendall(one.data)
        os._exit(0)
    view = other.data
    start_s = time.perf_counter()
    got = 0
    while got < size:
        got += ours.recv_into(view[got:])
    through = size / (time.perf_counter() - start_s)
    os.wait()
    return {
        "memory_copy_bytes_per_s": memory,
        "unix_socket_bytes_per_s": through,
        "new_memory_bytes_per_s": new_memory(1),
        "new_memory_of_two_bytes_per_s": new_memory(2),
    }


def new_memory(processes: int, size: int = 512 << 20) -> float:
    """Bytes/s in all at which so many processes write to memory that they did not have before."""
    start_s = time.perf_counter()
    for _ in range(processes):
        if os.fork() == 0:
            np.empty(size, dtype=np.uint8).fill(1)
            os._exit(0)
    for _ in range(processes):
        os.wait()
    return processes * size / (time.perf_counter() - start_s)


def _line(row: dict[str, Any]) -> str:
    rate = f"{row['bytes_per_s'] / 1e6:7.0f} MB/s" if row["bytes_per_s"] else "            "
    phases = ", ".join(f"{name} {took:.2f}" for name, took in row["phases_s"].items())
    return (
        f"{row['way']:<16} to {row['to']:<7} serves {row['until_it_serves_s']:6.1f} s, over "
        f"{row['until_over_s']:6.1f} s {rate}  gap {row['gap_before_s']:.2f} -> "
        f"{row['gap_during_s']:.2f} s, first token {row['first_before_s']:.2f} -> "
        f"{row['first_during_s']:.2f} s, none ready {row['unready_s']:5.1f} s, "
        f"{row['failed']} of {row['sent']} failed  {row['state']} {phases} {row['reason']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--pace", type=float, default=100e6, help="bytes/s of the throttled way")
    parser.add_argument("--only", default="", help="of the ways, this one")
    parser.add_argument("--row", type=int, default=0, help="so many switches of the tiny model")
    parser.add_argument("--idle", action="store_true", help="without requests meanwhile")
    parser.add_argument("--limits", action="store_true", help="of the machine, and nothing else")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.limits:
        print(json.dumps(limits(), indent=2))
        return
    with tempfile.TemporaryDirectory(prefix="oserve-") as name:
        folder = Path(name)
        if arguments.row:
            tiny = make_tiny_model(folder / "tiny")
            print(
                json.dumps(
                    asyncio.run(in_a_row(tiny, folder, plans(folder, "fp32"), arguments.row)),
                    indent=2,
                )
            )
            return
        model = make_mid_model(folder / f"mid-{arguments.layers}", layers=arguments.layers)
        named = plans(folder, arguments.precision)
        ways = {
            "moved": (),
            "moved, throttled": ("--set", f"switch.bytes_per_s={arguments.pace:.0f}"),
            "restart": ("--set", "switch.method=restart"),
            "restart, cold": ("--set", "switch.method=restart"),
        }
        before = limits()
        rows = []
        for number, (label, words) in enumerate(ways.items()):
            if arguments.only not in {"", label}:
                continue
            own = folder / f"way{number}"
            own.mkdir()
            rows += asyncio.run(way(model, own, named, label, words, idle=arguments.idle))
        document = {
            "layers": arguments.layers,
            "precision": arguments.precision,
            "idle": arguments.idle,
            "model_bytes": (model / "model.safetensors").stat().st_size,
            "limits": {"before": before, "after": limits()},
            "rows": rows,
        }
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        for row in rows:
            print(_line(row))
        for when, found in document["limits"].items():
            print(when, {key: f"{value / 1e9:.2f} GB/s" for key, value in found.items()})


if __name__ == "__main__":
    main()
