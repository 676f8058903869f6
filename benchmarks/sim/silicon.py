"""The simulator against measurements on real GPUs: a closed loop of equal requests.

    .venv/bin/pip install aiconfigurator-core==0.12.0
    .venv/bin/python benchmarks/sim/silicon.py

The rows are those of benchmarks/perf/silicon.py: b requests kept in flight, I tokens in, O out,
rate = b / (TTFT + TPOT (O - 1)), Llama-3.1-70B in fp8 with vLLM on H100 and H200. Step times come
from the roofline and from aiconfigurator; the first two rounds of requests warm the loop up.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

from oserve.core import Precision, ReplicaShape
from oserve.perf.costs import measured_costs
from oserve.perf.device import find_device
from oserve.perf.known_models import find_model
from oserve.perf.memory import memory_fit
from oserve.sim import RequestTable, SimulatedFleet, step_tables

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.perf.silicon import (
    CHUNK,
    MODEL,
    SYSTEMS,
    measured_rows,
    shown,
    step_model,
)

ROUNDS = 8
WARM = 2


def simulate(
    kind: str, shape: ReplicaShape, provider: str, load: tuple[int, int, int]
) -> tuple[float, float, float]:
    """Mean TTFT and TPOT in seconds, and rate in requests/s, with so many requests in flight."""
    inflight, prompt, output = load
    model = step_model(kind, shape, provider)
    count = ROUNDS * inflight
    table = RequestTable.of([0.0] * count, [prompt] * count, [output] * count)
    fleet = SimulatedFleet(table, closed_loop=inflight)
    fleet.add_replica(
        "one",
        shape,
        step_tables(model, shape),
        kv_tokens=memory_fit(find_model(MODEL), shape, find_device(kind).memory_bytes).kv_tokens,
        costs=measured_costs(model, shape),
    )
    fleet.run()
    results = fleet.results()
    steady = slice(WARM * inflight, (ROUNDS - 1) * inflight)
    ttft_s = float(np.mean((results.first_token_s - results.arrival_s)[steady]))
    e2e_s = float(np.mean((results.finish_s - results.arrival_s)[steady]))
    return ttft_s, (e2e_s - ttft_s) / max(1, output - 1), inflight / e2e_s


def shape_of(row: dict[str, str]) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=int(row["tp_size"]),
        precision=Precision.FP8,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=256,
    )


def load_of(row: dict[str, str]) -> tuple[int, int, int]:
    """Requests in flight, prompt and output tokens of each."""
    return int(float(row["batch_size"])), int(float(row["isl"])), int(float(row["osl"]))


def short_of_kv(row: dict[str, str]) -> bool:
    """Whether the requests in flight, grown to their full length, exceed the KV cache."""
    kind = SYSTEMS[row["system"]]
    fit = memory_fit(find_model(MODEL), shape_of(row), find_device(kind).memory_bytes)
    inflight, prompt, output = load_of(row)
    return inflight * (prompt + output) > fit.kv_tokens


def errors(row: dict[str, str], provider: str) -> tuple[float, float]:
    """Relative errors of TPOT and rate of one measured row."""
    load = load_of(row)
    ttft_s, tpot_s = (float(row[f"silicon_{name}_ms"]) / 1e3 for name in ("ttft", "tpot"))
    rate = load[0] / (ttft_s + tpot_s * (load[2] - 1))
    _, tpot, predicted = simulate(SYSTEMS[row["system"]], shape_of(row), provider, load)
    return tpot / tpot_s - 1, predicted / rate - 1


def main() -> None:
    rows = measured_rows()
    print(f"{MODEL} fp8, vLLM, measured: {len(rows)} points; mean (median) absolute error in %")
    print(
        f"{'device':7} {'step times':16} {'KV cache':>9} {'points':>6} {'TPOT':>14} {'rate':>14} "
        f"{'rate bias':>10}"
    )
    for kind in SYSTEMS.values():
        own = [row for row in rows if SYSTEMS[row["system"]] == kind]
        for provider in ("roofline", "aiconfigurator"):
            found = [(short_of_kv(row), *errors(row, provider)) for row in own]
            parts = {
                "all": found,
                "fits": [item for item in found if not item[0]],
                "short": [item for item in found if item[0]],
            }
            for name, part in parts.items():
                if not part:
                    continue
                tpot, rate = [item[1] for item in part], [item[2] for item in part]
                print(
                    f"{kind:7} {provider:16} {name:>9} {len(part):6} {shown(tpot):>14} "
                    f"{shown(rate):>14} {100 * statistics.fmean(rate):+9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
