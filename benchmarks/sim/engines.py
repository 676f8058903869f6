"""The simulator against the engines of this machine: the same requests, the same plan.

    .venv/bin/python -m oserve.engines.tiny .oserve/models/tiny-llama
    .venv/bin/python benchmarks/sim/engines.py .oserve/models/tiny-llama \\
        [--plan plan.yaml] [--trace TRACE] [--plot compared.png]

Measures a profile (``--profile FILE`` skips that), starts ``oserve serve`` with the plan, replays
the trace through ``oserve bench``, and gives the requests as the gateway recorded them, with their
true arrival times and lengths, to the simulator, which knows nothing else of the run. Prints
throughput and percentiles of TTFT and end-to-end times of both. Without a plan: one replica, so
that the other core is left to gateway and client, as it was when the profile was measured.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from oserve.config import load_plan
from oserve.control.dispatch.order import OrderPolicy
from oserve.core import DeploymentPlan
from oserve.perf.costs import measured_costs
from oserve.perf.profile import ProfileSource, read_profile
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.steps import step_tables
from oserve.sim.types import GatewayOptions, RequestTable, RoutingPolicy
from oserve.traces import TraceRequest
from oserve.workload import classify

ONE_REPLICA = """\
replicas:
  - {id: r0, devices: [cpu:0], shape: {precision: fp32, max_num_batched_tokens: 1024,
     max_num_seqs: 16}}
"""
BIN = Path(sys.executable).parent
START_LIMIT_S = 180.0
Seen = SimpleNamespace


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(wanted: argparse.Namespace, plan: Path, state: Path) -> Iterator[str]:
    """A server with the plan, until every replica is ready; its URL."""
    port = free_port()
    command = [BIN / "oserve", "serve", wanted.model, "--plan", plan, "--port", str(port)]
    command += ["--set", f"state_dir={state}"]
    for item in wanted.override or ():
        command += ["--set", item]
    with (state / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                status = json.load(urllib.request.urlopen(f"{url}/oserve/v1/status"))
                if all(r["phase"] == "ready" for r in status["replicas"]):
                    break
            assert process.poll() is None, (state / "serve.log").read_text()
            assert time.monotonic() < deadline_s, (state / "serve.log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def load(wanted: argparse.Namespace, url: str) -> None:
    source = [wanted.trace] if wanted.trace else ["--synthetic", wanted.synthetic]
    command = [BIN / "oserve", "bench", *source, "--url", url, "--speed", str(wanted.speed)]
    command += ["--prompt-scale", str(wanted.scale), "--output-scale", str(wanted.scale)]
    if wanted.duration:
        command += ["--duration", str(wanted.duration)]
    subprocess.run(command, check=True)


def recorded(file: Path) -> list[Seen]:
    """What the gateway wrote down of completed requests, by arrival, the first at 0 s."""
    with sqlite3.connect(file) as store:
        rows = store.execute(
            "SELECT arrival_s, prompt_tokens, output_tokens, ttft_s, e2e_s FROM requests "
            "WHERE status = 'completed' AND ttft_s IS NOT NULL ORDER BY arrival_s"
        ).fetchall()
    names = ("arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s")
    seen = [Seen(**dict(zip(names, row, strict=True))) for row in rows]
    begin_s = seen[0].arrival_s
    for item in seen:
        item.arrival_s -= begin_s
    return seen


def simulated(seen: Sequence[Seen], plan: DeploymentPlan, source: ProfileSource) -> list[Seen]:
    """The same arrivals and lengths on the plan's replicas, as the profile says they are."""
    requests = [
        TraceRequest(
            arrival_s=item.arrival_s,
            prompt_tokens=item.prompt_tokens,
            output_tokens=item.output_tokens,
        )
        for item in seen
    ]
    kinds = [kind.name for kind in plan.length_classes]
    classes = [kinds.index(classify(item.prompt_tokens, plan.length_classes).name) for item in seen]
    table = RequestTable.from_trace(
        requests,
        order=OrderPolicy(),
        # The load generator asks for exact lengths, so the gateway knows them too.
        expected_output_tokens=[item.output_tokens for item in seen],
        class_index=classes,
    )
    fleet = SimulatedFleet(table, classes=len(kinds), gateway=GatewayOptions())
    for spec in plan.replicas:
        model = source.step_model(spec.shape)
        fleet.add_replica(
            spec.id,
            spec.shape,
            step_tables(model, spec.shape),
            kv_tokens=source.kv_tokens(spec.shape),
            costs=measured_costs(model, spec.shape),
            ordered=True,
        )
    shares = {kinds.index(name): row for name, row in plan.routing_shares.items()}
    fleet.set_routing(RoutingPolicy.POOLS, shares)
    fleet.run()
    found = fleet.results().outcomes()
    return [
        Seen(
            arrival_s=item.sent_s,
            prompt_tokens=item.prompt_tokens,
            output_tokens=item.output_tokens,
            ttft_s=item.ttft_s,
            e2e_s=item.e2e_s,
        )
        for item in found
    ]


def figures(seen: Sequence[Seen]) -> dict[str, float]:
    """Requests and output tokens per second, and percentiles in seconds."""
    span_s = max(item.arrival_s + item.e2e_s for item in seen)
    ttft, e2e = np.array([i.ttft_s for i in seen]), np.array([i.e2e_s for i in seen])
    return {
        "requests/s": len(seen) / span_s,
        "output tokens/s": sum(item.output_tokens for item in seen) / span_s,
        "TTFT p50, s": float(np.percentile(ttft, 50)),
        "TTFT p99, s": float(np.percentile(ttft, 99)),
        "E2E p50, s": float(np.percentile(e2e, 50)),
        "E2E p90, s": float(np.percentile(e2e, 90)),
        "E2E p99, s": float(np.percentile(e2e, 99)),
    }


def draw(real: Sequence[Seen], sim: Sequence[Seen], path: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, rows in (("engines", real), ("simulated", sim)):
        for axes, field in ((left, "ttft_s"), (right, "e2e_s")):
            values = np.sort([getattr(item, field) for item in rows])
            axes.plot(values, np.linspace(0, 1, len(values)), label=name)
    for axes, title in ((left, "TTFT, s"), (right, "E2E, s")):
        axes.set(xscale="log", xlabel=title, ylabel="share of requests", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--trace", help="a trace; without one, --synthetic RATE:SECONDS")
    parser.add_argument("--synthetic", default="3:120")
    parser.add_argument("--duration", type=float)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=0.1, help="factor on all lengths")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--set", dest="override", action="append", help="a setting, path=value")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oserve-engines-") as name:
        state = Path(name)
        plan_file = wanted.plan or state / "plan.yaml"
        if wanted.plan is None:
            plan_file.write_text(ONE_REPLICA)
        plan = load_plan(str(plan_file))
        profile = wanted.profile or state / "profile.json"
        if wanted.profile is None:
            command = [BIN / "oserve", "profile", wanted.model, "--output", str(profile)]
            for spec in {spec.shape.precision: spec for spec in plan.replicas}.values():
                size = spec.shape.tensor_parallel_size
                command += ["--shape", f"tp{size}-{spec.shape.precision}"]
            for item in wanted.override or ():
                command += ["--set", item]
            subprocess.run(command, check=True)
        with serving(wanted, plan_file, state) as url:
            load(wanted, url)
        real = recorded(state / "records.sqlite")
        source = ProfileSource(read_profile(profile), name=str(profile))
    begin_s = time.perf_counter()
    sim = simulated(real, plan, source)
    took_s = time.perf_counter() - begin_s
    print(f"{len(real):,} requests; {os.cpu_count()} cores; simulated in {took_s:.2f} s")
    told = figures(sim)
    for what, value in figures(real).items():
        print(
            f"{what:>16}: engines {value:9.3f}, simulated {told[what]:9.3f}, "
            f"{100 * (told[what] / value - 1):+6.1f} %"
        )
    if wanted.plot:
        draw(real, sim, wanted.plot)


if __name__ == "__main__":
    main()
