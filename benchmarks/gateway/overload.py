"""Real CPU engines under more than they can serve: goodput with and without demotion and shedding.

    python benchmarks/gateway/overload.py .oserve/models/tiny-llama [--seconds 20] [--trace FILE]

One ``oserve serve`` per contender, all up at once, each with the same replicas of the tiny model on
the same cores; one is under load at a time, and contenders take turns at each load, so that a drift
of the machine hits all. First the throughput of the plain one is measured in a closed loop; loads
are multiples of that. Every contender gets the same requests at the same moments.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import uvloop

from oserve.cli.load import Replay, new_session
from oserve.cli.target import calibrated_writer, find_target
from oserve.traces import (
    Outcome,
    OutcomeStatus,
    Slo,
    TraceRequest,
    fit_lengths,
    read_trace,
    synthesise,
)
from oserve.traces.metrics import percentile

MOST_REQUESTS = 20_000
START_S = 240.0
IN_FLIGHT = 1024
TIMEOUT_S = 120.0
# Requests in flight in the closed loop, for each sequence that the replicas run at once.
CLOSED_PER_SEQ = 2.0


@dataclass
class Contender:
    name: str
    settings: list[str]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()


def contenders(slo: Slo) -> list[Contender]:
    assert slo.ttft_s is not None
    limit_ms = f"{slo.ttft_s * 1e3:g}"
    fcfs = "gateway.order.policy=fcfs"
    demote = f"gateway.overload.ttft_ms={limit_ms}"
    shed = f"gateway.overload.shed_after_ms={limit_ms}"
    return [
        Contender("first come, first served", [fcfs, "gateway.overload.demote=false"]),
        Contender("demotion", [fcfs, demote]),
        Contender("demotion, shedding", [fcfs, demote, shed]),
        Contender("short first, demotion, shedding", [demote, shed]),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(item: Contender, model: Path, folder: Path, asked: argparse.Namespace) -> None:
    item.port = free_port()
    state = folder / item.name.replace(" ", "-").replace(",", "")
    state.mkdir()
    plan = state / "plan.yaml"
    shape = (
        f"{{precision: int8, max_num_batched_tokens: {asked.chunk}, max_num_seqs: {asked.seqs}}}"
    )
    replicas = [
        f"  - {{id: r{index}, devices: ['cpu:{index}'], shape: {shape}}}"
        for index in range(asked.replicas)
    ]
    plan.write_text("replicas:\n" + "\n".join(replicas) + "\n")
    command = [sys.executable, "-m", "oserve.cli", "serve", str(model), "--plan", str(plan)]
    command += ["--port", str(item.port), "--state-dir", str(state)]
    for setting in (f"engines.variants={{int8: {model}-int8}}", *item.settings):
        command += ["--set", setting]
    item.log = state / "log"
    with item.log.open("wb") as out:
        item.process = subprocess.Popen(command, stdout=out, stderr=out)


def wait_until_ready(item: Contender) -> None:
    """Until all replicas serve."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if item.process is None or item.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{item.port}/health", timeout=2
            ) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    sys.exit(f"{item.name} did not come up:\n{item.log.read_text()[-3000:]}")


def stop(items: list[Contender]) -> None:
    for item in items:
        if item.process is not None and item.process.poll() is None:
            item.process.send_signal(signal.SIGTERM)
    for item in items:
        if item.process is not None:
            try:
                item.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                item.process.kill()
                item.process.wait()


def requests_of(asked: argparse.Namespace) -> list[TraceRequest]:
    if asked.trace:
        return list(read_trace(asked.trace, limit=MOST_REQUESTS))
    made = synthesise(rate_rps=20.0, duration_s=1000.0, seed=asked.seed)
    return list(islice(made, MOST_REQUESTS))


def at_rate(requests: list[TraceRequest], rate_rps: float, seconds: float) -> list[TraceRequest]:
    """The first requests of the trace, as many as come in that time, and its bursts kept."""
    count = max(2, min(len(requests), round(rate_rps * seconds)))
    taken = requests[:count]
    first = taken[0].arrival_s
    factor = (count / rate_rps) / max(taken[-1].arrival_s - first, 1e-9)
    return [replace(item, arrival_s=(item.arrival_s - first) * factor) for item in taken]


async def drive(
    port: int, requests: list[TraceRequest], asked: argparse.Namespace, *, at_once: int
) -> list[Outcome]:
    async with new_session() as session:
        target = await find_target(
            session,
            f"http://127.0.0.1:{port}",
            model="",
            api_key="",
            chat=False,
            timeout_s=TIMEOUT_S,
        )
        writer = await calibrated_writer(session, target, seed=asked.seed)
        fitted = fit_lengths(
            requests,
            max_model_len=target.max_model_len,
            prompt_scale=asked.prompt_scale,
            output_scale=asked.output_scale,
            reserve_tokens=max(32, target.max_model_len // 50),
        )
        replay = Replay(session, target, writer, max_concurrency=at_once, progress=lambda: None)
        await replay.run(fitted, speed=1.0)
        return replay.outcomes


def throughput_rps(
    item: Contender, requests: list[TraceRequest], asked: argparse.Namespace
) -> float:
    """Requests per second with twice as many in flight as the replicas run at once."""
    at_once = max(1, round(CLOSED_PER_SEQ * asked.replicas * asked.seqs))
    count, found = 2 * at_once, 0.0
    # Once to warm up, once to learn how many fill the time, once to measure.
    for turn in range(3):
        batch = [replace(one, arrival_s=0.0) for one in requests[: min(count, len(requests))]]
        outcomes = uvloop.run(drive(item.port, batch, asked, at_once=at_once))
        done = [one for one in outcomes if one.status is OutcomeStatus.COMPLETED]
        if not done:
            sys.exit(f"{item.name}: nothing completed: {outcomes[0].error}")
        # All were due at the start; the beginning and the thin end are left out.
        ends = sorted(one.e2e_s for one in done)
        first, last = len(ends) // 10, 7 * len(ends) // 10
        found = (last - first) / max(ends[last] - ends[first], 1e-3)
        count = max(2 * at_once, round(found * asked.seconds)) if turn else 3 * at_once
    return found


def row_of(outcomes: list[Outcome], seconds: float, slo: Slo, capacity: float) -> dict[str, float]:
    done = [one for one in outcomes if one.status is OutcomeStatus.COMPLETED]
    shed = sum(1 for one in outcomes if "status 429" in one.error)
    good = sum(1 for one in done if slo.met_by(one))
    return {
        "sent": len(outcomes),
        "goodput_rps": good / seconds,
        "goodput_of_capacity": good / seconds / capacity,
        "attainment": good / len(outcomes),
        "p50_ttft_s": percentile([one.ttft_s for one in done], 0.5),
        "p99_ttft_s": percentile([one.ttft_s for one in done], 0.99),
        "shed": shed,
        "failed": len(outcomes) - len(done) - shed,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="as `make serve` makes it, MODEL-int8 beside it")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, each run")
    parser.add_argument("--loads", default="0.8,1.25,1.5,2", help="multiples of the throughput")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--seqs", type=int, default=32)
    parser.add_argument("--trace", help="request trace; a seeded synthetic mix without one")
    parser.add_argument("--prompt-scale", type=float, default=0.1)
    parser.add_argument("--output-scale", type=float, default=0.1)
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=200.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} cores"


def main() -> None:
    asked = arguments()
    slo = Slo(ttft_s=asked.slo_ttft_ms / 1e3, tpot_s=asked.slo_tpot_ms / 1e3)
    requests = requests_of(asked)
    items = contenders(slo)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for item in items:
                start(item, asked.model, Path(folder), asked)
                wait_until_ready(item)
            capacity = throughput_rps(items[0], requests, asked)
            print(f"{processor()}; {' '.join(sys.argv)}")
            print(f"Closed loop: {capacity:.2f} requests/s.\n")
            print(
                "| load | contender | sent | goodput, requests/s (of the throughput) | in time ",
                end="",
            )
            print("| P50 / P99 TTFT of those served, s | shed | failed |\n|" + "---|" * 8)
            for load in (float(part) for part in asked.loads.split(",")):
                batch = at_rate(requests, load * capacity, asked.seconds)
                seconds = len(batch) / (load * capacity)
                for item in items:
                    outcomes = uvloop.run(drive(item.port, batch, asked, at_once=IN_FLIGHT))
                    row = row_of(outcomes, seconds, slo, capacity)
                    found.setdefault(f"{load:g}", {})[item.name] = row
                    show(f"{load:g}x", item.name, row)
        finally:
            stop(items)
    if asked.json:
        document = {"machine": processor(), "throughput_rps": capacity, "rows": found}
        asked.json.write_text(json.dumps(document, indent=1))


def show(load: str, name: str, row: dict[str, float]) -> None:
    print(
        f"| {load} | {name} | {row['sent']:.0f} | {row['goodput_rps']:.2f} "
        f"({row['goodput_of_capacity']:.2f}) | {row['attainment']:.0%} | {row['p50_ttft_s']:.2f} / "
        f"{row['p99_ttft_s']:.2f} | {row['shed']:.0f} | {row['failed']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
