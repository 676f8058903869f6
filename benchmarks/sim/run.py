"""Requests simulated per second: the skipping kernel with and without numba, and step by step.

    .venv/bin/pip install -e '.[fast]'
    .venv/bin/python benchmarks/sim/run.py [--trace FILE] [--rate 1.8]

One replica serves Llama-2-70B on four H100s (roofline), then sixteen do. All contenders run the
same requests in this one process, after a warm-up; the best of several rounds counts, without
building the fleet. "step by step" is the kernel taking every step; "reference" is the gateway's
request machine before the iteration-level engines of the tests. Results are compared request by
request. The last row is a million synthetic requests on 32 GPUs, each routed by load.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oserve.core import ReplicaShape
from oserve.perf.costs import measured_costs
from oserve.perf.known_models import find_model
from oserve.perf.source import RooflineSource
from oserve.sim import RequestTable, SimulatedFleet, StepTables, step_tables
from oserve.sim.compiled import HAS_NUMBA
from oserve.traces import TraceRequest, read_trace, synthesise

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from sim.engine_reference import PS, Engine, Job
from sim.reference import Reference

SHAPE = ReplicaShape(
    tensor_parallel_size=4, max_num_batched_tokens=2048, max_num_seqs=128, device_kind="H100"
)
SOURCE = RooflineSource(find_model("llama-2-70b"))
COSTS = measured_costs(SOURCE.step_model(SHAPE), SHAPE)


def requests(trace: Path | None, count: int, rate_rps: float) -> list[TraceRequest]:
    if trace is not None:
        return list(read_trace(trace))[:count]
    made = synthesise(rate_rps=rate_rps, duration_s=1e9, seed=1, code_share=0.0)
    return [request for request, _ in zip(made, range(count), strict=False)]


def fleet(
    table: RequestTable, tables: StepTables, replicas: int, *, compiled: bool, skip: bool
) -> SimulatedFleet:
    made = SimulatedFleet(table, compiled=compiled, skip=skip)
    for index in range(replicas):
        made.add_replica(
            f"r{index:02}", SHAPE, tables, kv_tokens=SOURCE.kv_tokens(SHAPE), costs=COSTS
        )
    return made


def reference(table: RequestTable, tables: StepTables, replicas: int) -> Reference:
    arrivals = np.round(table.arrival_s * PS).astype(np.int64).tolist()
    lengths = zip(table.prompt_tokens.tolist(), table.output_tokens.tolist(), strict=True)
    expected = int(table.expected_output_tokens[0])
    made = Reference(
        [
            Job(number=n, arrival=arrival, prompt=p, output=o, expected=expected, rank=arrival)
            for n, (arrival, (p, o)) in enumerate(zip(arrivals, lengths, strict=True))
        ],
        watched=False,
    )
    for index in range(replicas):
        made.engines.append(
            Engine(
                name=f"r{index:02}",
                prompts=tables.prompts.tolist(),
                joint=tables.joint.tolist(),
                decodes=tables.decodes.tolist(),
                kv_rate=tables.kv_rate,
                pair_rate=tables.pair_rate,
                seqs=SHAPE.max_num_seqs,
                budget=SHAPE.max_num_batched_tokens,
                total_blocks=SOURCE.kv_tokens(SHAPE) // 16,
                max_inflight=2 * SHAPE.max_num_seqs,
                prefill_s=COSTS.prefill_s_per_token,
                decode_s=COSTS.decode_s_per_token,
                phase="ready",
            )
        )
    return made


def timed(make: Callable[[], Callable[[], object]], rounds: int) -> float:
    """The best of some rounds, of running what is made anew for each."""
    best = float("inf")
    for _ in range(rounds):
        run = make()
        start_s = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start_s)
    return best


def contender(
    table: RequestTable,
    tables: StepTables,
    replicas: int,
    *,
    compiled: bool,
    skip: bool,
    rounds: int,
) -> tuple[float, list[int]]:
    """Seconds, and every request's end in picoseconds."""

    def make() -> SimulatedFleet:
        return fleet(table, tables, replicas, compiled=compiled, skip=skip)

    spent_s = timed(lambda: make().run, rounds if compiled else 1)
    last = make()
    last.run()
    return spent_s, np.round(last.results().finish_s * PS).astype(np.int64).tolist()


def slow_contender(
    table: RequestTable, tables: StepTables, replicas: int
) -> tuple[float, list[int]]:
    """The same of the reference, run once."""
    slow = reference(table, tables, replicas)
    spent_s = timed(lambda: lambda: slow.advance(10**18), 1)
    return spent_s, [job.finish or 0 for job in slow.jobs]


def compare(table: RequestTable, replicas: int, rounds: int) -> None:
    """All contenders on the same requests; Python only where it does not take too long."""
    tables = step_tables(SOURCE.step_model(SHAPE), SHAPE)
    found = {}
    for kind, compiled in (("numba", True), ("Python", False)):
        for how, skip in (("skipping", True), ("step by step", False)):
            if (HAS_NUMBA or not compiled) and (replicas == 1 or skip):
                found[f"{kind}, {how}"] = contender(
                    table, tables, replicas, compiled=compiled, skip=skip, rounds=rounds
                )
    if len(table) <= 2_000:
        found["reference"] = slow_contender(table, tables, replicas)
    (first_s, ends), *_ = found.values()
    for name, (spent_s, own) in found.items():
        assert own == ends, f"{name} disagrees"
        print(
            f"{len(table):8} {replicas:8} {name:22} {spent_s:9.4f} {len(table) / spent_s:11,.0f} "
            f"{spent_s / first_s:5.0f}",
            flush=True,
        )


def large(count: int, rate_rps: float) -> None:
    """Eight replicas, 32 GPUs, and very many requests, each routed by the load of that moment."""
    table = RequestTable.from_trace(requests(None, count, 8 * rate_rps))
    tables = step_tables(SOURCE.step_model(SHAPE), SHAPE)
    run = fleet(table, tables, 8, compiled=True, skip=True)
    start_s = time.perf_counter()
    run.run()
    spent_s = time.perf_counter() - start_s
    print(f"{count:8} {8:8} {'numba, skipping':22} {spent_s:9.4f} {count / spent_s:11,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--rate", type=float, default=1.8, help="requests/s for each replica")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=1_000_000, help="requests of the last row")
    wanted = parser.parse_args()
    print(
        f"{'requests':>8} {'replicas':>8} {'contender':22} {'seconds':>9} {'requests/s':>11} ratio"
    )
    for count, replicas in ((2_000, 1), (10_000, 1), (10_000, 16)):
        trace = requests(wanted.trace, count, wanted.rate * replicas)
        compare(RequestTable.from_trace(trace), replicas, wanted.rounds)
    if HAS_NUMBA:
        large(wanted.most, wanted.rate)


if __name__ == "__main__":
    main()
