"""OServe's gateway, the Rust vllm-router and no router at all, side by side, one core each.

    python benchmarks/gateway/run.py [--vllm-router PATH] [--other SRC] [--rounds 3] [--json FILE]

The router runs alone on core 0; backend and client share core 1. Rounds alternate between the
contenders, so that a drift of the machine hits all of them; medians over rounds are printed.
``--other`` is the ``src`` folder of another version of OServe, which runs beside this one.
"""

import argparse
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
from client import Load, Result

from oserve.engines.registry import read_registry

HERE = Path(__file__).resolve().parent
PLANS = "oserve/config/plan.py"


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
    """User and system seconds used by these processes so far."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(
    contender: Contender, connections: int, load: Callable[[int], Load]
) -> dict[str, float]:
    used_s = cpu_s(contender.pids)
    result: Result = uvloop.run(load(contender.port).run(connections))
    used_s = cpu_s(contender.pids) - used_s
    if result.failed:
        sys.exit(f"{contender.name}: {result.failed} answers were wrong")
    row = {
        "requests_per_s": result.answers / result.wall_s,
        "chunks_per_s": result.chunks / result.wall_s,
        "answer_p50_ms": 1e3 * percentile(result.answer_s, 0.5),
        "answer_p99_ms": 1e3 * percentile(result.answer_s, 0.99),
        "router_cpu_us_per_chunk": 1e6 * used_s / result.chunks,
    }
    if result.chunk_s:
        row["chunk_p50_ms"] = 1e3 * percentile(result.chunk_s, 0.5)
        row["chunk_p99_ms"] = 1e3 * percentile(result.chunk_s, 0.99)
    return row


def loads(scale: float) -> dict[str, tuple[int, Callable[[int], Load]]]:
    """Name -> connections, load for a port."""

    def load(total: int, *, chunks: int = 1, stream: bool = False, step_us: int = 0, timed=False):  # type: ignore[no-untyped-def]
        size = max(1, int(total * scale))
        return lambda port: Load(
            port, total=size, stream=stream, chunks=chunks, step_us=step_us, timed=timed
        )

    return {
        "answers, 64 connections, as fast as possible": (64, load(20_000)),
        "answers, 1 connection": (1, load(3_000)),
        "streams of 200, 64 connections, as fast as possible": (
            64,
            load(1_500, chunks=200, stream=True),
        ),
        "streams of 100, 32 connections, a chunk each 10 ms": (
            32,
            load(200, chunks=100, stream=True, step_us=10_000, timed=True),
        ),
        "streams of 200, 128 connections, a chunk each 10 ms": (
            128,
            load(500, chunks=200, stream=True, step_us=10_000, timed=True),
        ),
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
        found.append(Contender("vllm-router (Rust)", port, [processes[-1].pid]))
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
            for name, (connections, load) in loads(wanted.scale).items():
                taken: dict[str, list[dict[str, float]]] = {item.name: [] for item in found}
                for _ in range(wanted.rounds):
                    for item in found:
                        taken[item.name].append(measure(item, connections, load))
                rows[name] = {
                    who: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
                    for who, runs in taken.items()
                }
                show(name, rows[name])
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
    print(f"  {'':22}" + "".join(f"{key:>25}" for key in keys))
    for who, values in row.items():
        print(f"  {who:22}" + "".join(f"{values[key]:>25.3f}" for key in keys), flush=True)


if __name__ == "__main__":
    main()
