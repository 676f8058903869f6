"""OServe's gateway, the Rust vllm-router and no router at all, side by side, one core each.

    python benchmarks/gateway/run.py [--vllm-router PATH] [--other SRC] [--rounds 3] [--json FILE]

The router runs alone on core 0; backend and client share core 1. Rounds alternate between the
contenders, so that a drift of the machine hits all of them; medians over rounds are printed, then
the ratios to vllm-router in one table. CPU is that of all processes of a router, in user and kernel
mode, from the scheduler's accounts. ``--other`` is the ``src`` folder of another version of OServe,
which runs beside this one.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop
from client import Ask, ClosedLoad, Load, Result, SteadyLoad, ask

from oserve.engines.registry import read_registry

HERE = Path(__file__).resolve().parent
PLANS = "oserve/config/plan.py"
RUST = "vllm-router (Rust)"


@dataclass
class Contender:
    name: str
    port: int
    pids: list[int]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: list[str], core: int, log: Path, source: str = "") -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": source} if source else None,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
        )


def wait_until_up(port: int, log: Path) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"port {port} did not come up:\n{log.read_text()[-2000:]}")


def cpu_s(pids: list[int]) -> float:
    """User and system seconds used by the threads of these processes so far."""
    used_ns = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                used_ns += int((task / "schedstat").read_text().split()[0])
    return used_ns / 1e9


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(contender: Contender, load: Callable[[int], Load]) -> dict[str, float]:
    used_s = cpu_s(contender.pids)
    result: Result = uvloop.run(started(load, contender.port))
    used_s = cpu_s(contender.pids) - used_s
    if result.failed:
        sys.exit(f"{contender.name}: {result.failed} answers were wrong")
    row = {
        "requests_per_s": result.answers / result.wall_s,
        "chunks_per_s": result.chunks / result.wall_s,
        "answer_p50_ms": 1e3 * percentile(result.answer_s, 0.5),
        "answer_p99_ms": 1e3 * percentile(result.answer_s, 0.99),
        "router_cpu_us_per_request": 1e6 * used_s / result.answers,
        "router_cpu_us_per_chunk": 1e6 * used_s / result.chunks,
    }
    if result.chunk_s:
        row["chunk_p50_ms"] = 1e3 * percentile(result.chunk_s, 0.5)
        row["chunk_p99_ms"] = 1e3 * percentile(result.chunk_s, 0.99)
    return row


async def started(load: Callable[[int], Load], port: int) -> Result:
    return await load(port).run()


ANSWERS = "answers, 64 connections, as fast as possible"
ONE = "answers, 1 connection"
STREAMS = "streams of 200, 64 connections, as fast as possible"
PACED = "streams of 100, 32 connections, a chunk each 10 ms"
MANY_PACED = "streams of 200, 128 connections, a chunk each 10 ms"
STEADY = "steady mix, 100 requests/s: half answers, half streams of 50, a chunk each 10 ms"
# Load, measurement, and whether more of it is better.
TABLE = (
    (ANSWERS, "requests_per_s", True),
    (ANSWERS, "router_cpu_us_per_request", False),
    (ANSWERS, "answer_p99_ms", False),
    (ONE, "answer_p50_ms", False),
    (ONE, "answer_p99_ms", False),
    (STREAMS, "chunks_per_s", True),
    (STREAMS, "router_cpu_us_per_chunk", False),
    (PACED, "router_cpu_us_per_chunk", False),
    (PACED, "chunk_p99_ms", False),
    (MANY_PACED, "router_cpu_us_per_chunk", False),
    (MANY_PACED, "chunk_p99_ms", False),
    (STEADY, "router_cpu_us_per_request", False),
    (STEADY, "answer_p99_ms", False),
    (STEADY, "chunk_p99_ms", False),
)


def loads(scale: float) -> dict[str, Callable[[int], Load]]:
    """Name -> load for a port."""

    def closed(
        total: int,
        connections: int,
        *,
        chunks: int = 1,
        stream: bool = False,
        step_us: int = 0,
    ) -> Callable[[int], Load]:
        def made(port: int) -> Load:
            wanted = ask(port, stream=stream, chunks=chunks, step_us=step_us, timed=step_us > 0)
            return ClosedLoad(
                port, wanted, total=max(1, int(total * scale)), connections=connections
            )

        return made

    def steady(port: int) -> Load:
        mix: list[Ask] = [ask(port), ask(port, stream=True, chunks=50, step_us=10_000, timed=True)]
        return SteadyLoad(port, mix, rate_per_s=100.0, seconds=20.0 * scale)

    return {
        ANSWERS: closed(20_000, 64),
        ONE: closed(3_000, 1),
        STREAMS: closed(1_500, 64, chunks=200, stream=True),
        PACED: closed(200, 32, chunks=100, stream=True, step_us=10_000),
        MANY_PACED: closed(500, 128, chunks=200, stream=True, step_us=10_000),
        STEADY: steady,
    }


def contenders(
    folder: Path, router: str | None, other: str | None
) -> tuple[list[Contender], list[subprocess.Popen[bytes]]]:
    processes = []
    backend = free_port()
    log = folder / "backend.log"
    processes.append(start([sys.executable, str(HERE / "backend.py"), str(backend)], 1, log))
    wait_until_up(backend, log)
    found = [Contender("no router", backend, [])]
    here = str(HERE.parent.parent / "src")
    for name, source in {"oserve": here, "oserve (other)": other}.items():
        if source is None:
            continue
        port = free_port()
        state = folder / name
        state.mkdir()
        plan = state / "plan.yaml"
        ids = ", token_ids: true" if "token_ids" in (Path(source) / PLANS).read_text() else ""
        plan.write_text(
            "replicas: [{id: b, shape: {max_num_seqs: 4096}, "
            f"attach: {{url: 'http://127.0.0.1:{backend}'{ids}}}}}]"
        )
        log = folder / f"{name}.log"
        command = [sys.executable, "-m", "oserve.cli", "serve", "--plan", str(plan)]
        command += ["--served-model-name", "bench", "--port", str(port), "--state-dir", str(state)]
        processes.append(start(command, 0, log, source))
        wait_until_up(port, log)
        registry = read_registry(state / "keeper.json")
        held = [] if registry is None else [registry.pid, *(item.pid for item in registry.held)]
        found.append(Contender(name, port, [processes[-1].pid, *held]))
    if router:
        port, metrics = free_port(), free_port()
        log = folder / "router.log"
        command = [router, "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
        command += ["--worker-urls", f"http://127.0.0.1:{backend}", "--log-level", "warning"]
        command += ["--prometheus-port", str(metrics), "--prometheus-host", "127.0.0.1"]
        processes.append(start(command, 0, log))
        wait_until_up(port, log)
        found.append(Contender(RUST, port, [processes[-1].pid]))
    return found, processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-router", help="path of the vllm-router command")
    parser.add_argument("--other", help="src folder of another version of OServe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="size of each load")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    os.sched_setaffinity(0, {1})
    rows: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        found, processes = contenders(Path(folder), wanted.vllm_router, wanted.other)
        try:
            for name, load in loads(wanted.scale).items():
                taken: dict[str, list[dict[str, float]]] = {item.name: [] for item in found}
                for _ in range(wanted.rounds):
                    for item in found:
                        taken[item.name].append(measure(item, load))
                rows[name] = {
                    who: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
                    for who, runs in taken.items()
                }
                show(name, rows[name])
            compare(rows, found)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    if wanted.json:
        wanted.json.write_text(
            json.dumps({"machine": platform.processor(), "rows": rows}, indent=1)
        )


def show(name: str, row: dict[str, dict[str, float]]) -> None:
    print(f"\n{name}")
    keys = list(row["no router"])
    print(f"  {'':22}" + "".join(f"{key:>27}" for key in keys))
    for who, values in row.items():
        print(f"  {who:22}" + "".join(f"{values[key]:>27.3f}" for key in keys), flush=True)


def compare(rows: dict[str, dict[str, dict[str, float]]], found: list[Contender]) -> None:
    """Each router beside vllm-router; OServe is ahead where a ratio is bold."""
    names = [item.name for item in found if item.pids]
    if RUST not in names:
        return
    others = [name for name in names if name != RUST]
    print("\n| load | | vllm-router | " + " | ".join(f"{name} | ratio" for name in others) + " |")
    print("|---|---|---|" + "---|---|" * len(others))
    for load, key, more in TABLE:
        rust = rows[load][RUST][key]
        cells = []
        for name in others:
            ratio = rows[load][name][key] / rust
            ahead = ratio > 1 if more else ratio < 1
            cells.append(
                f"{rows[load][name][key]:,.2f} | {f'**{ratio:.2f}**' if ahead else f'{ratio:.2f}'}"
            )
        print(f"| {load} | {key} | {rust:,.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
