"""The simulator's speed against another checkout's, side by side.

    git worktree add /tmp/base REVISION
    .venv/bin/python benchmarks/sim/against.py /tmp/base/src

Each checkout runs in processes of its own. Rounds alternate, so that both meet the same other load
of the machine. The best round counts, in CPU time, over several pairs of processes: where code and
data happen to lie in memory makes 15 %. The last column tells whether both end every request at the
same moment.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OWN = Path(__file__).parents[2] / "src"
# Name, requests, replicas, compiled, options of the gateway.
CASES: tuple[tuple[str, int, int, bool, dict[str, Any]], ...] = (
    ("numba, 1 replica", 20_000, 1, True, {}),
    ("numba, 16 replicas", 20_000, 16, True, {}),
    ("numba, 16, demotion", 20_000, 16, True, {"demote_after_s": 1.5, "shed_after_s": 8.0}),
    ("Python, 1 replica", 1_000, 1, False, {}),
    ("Python, 16 replicas", 1_000, 16, False, {}),
)


def work() -> None:
    """Build and run one case for each line of input; answer with seconds and a digest."""
    from oserve import sim  # noqa: PLC0415
    from oserve.core import ReplicaShape  # noqa: PLC0415 - of the checkout that is measured
    from oserve.perf.costs import measured_costs  # noqa: PLC0415
    from oserve.perf.known_models import find_model  # noqa: PLC0415
    from oserve.perf.source import RooflineSource  # noqa: PLC0415
    from oserve.sim import GatewayOptions, RequestTable, step_tables  # noqa: PLC0415
    from oserve.traces import synthesise  # noqa: PLC0415

    shape = ReplicaShape(
        tensor_parallel_size=4, max_num_batched_tokens=2048, max_num_seqs=128, device_kind="H100"
    )
    source = RooflineSource(find_model("llama-2-70b"))
    model = source.step_model(shape)
    tables, costs = step_tables(model, shape), measured_costs(model, shape)
    # A checkout to compare with may still call it Fleet.
    fleet_type = vars(sim).get("SimulatedFleet") or vars(sim)["Fleet"]
    for line in sys.stdin:
        _, count, replicas, compiled, options = CASES[int(line)]
        rate_rps = (2.2 if options else 1.8) * replicas
        made = synthesise(rate_rps=rate_rps, duration_s=1e9, seed=1, code_share=0.0)
        table = RequestTable.from_trace(
            [request for request, _ in zip(made, range(count), strict=False)]
        )
        fleet = fleet_type(table, compiled=compiled, gateway=GatewayOptions(**options))
        for index in range(replicas):
            fleet.add_replica(
                f"r{index:02}", shape, tables, kv_tokens=source.kv_tokens(shape), costs=costs
            )
        start_s = time.process_time()
        fleet.run()
        spent_s = time.process_time() - start_s
        digest = hashlib.sha256(fleet.results().finish_s.tobytes()).hexdigest()
        print(json.dumps([spent_s, digest]), flush=True)


def worker(sources: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--work", str(sources)],
        env={**os.environ, "PYTHONPATH": str(sources)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asked(process: subprocess.Popen[str], case: int) -> tuple[float, str]:
    assert process.stdin is not None  # Both are pipes.
    assert process.stdout is not None
    process.stdin.write(f"{case}\n")
    process.stdin.flush()
    spent_s, digest = json.loads(process.stdout.readline())
    return spent_s, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="the other checkout's src folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4, help="of processes, one after another")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.work:
        work()
        return
    found: dict[int, list[list[tuple[float, str]]]] = {case: [] for case in range(len(CASES))}
    for _ in range(wanted.pairs):
        both = [worker(wanted.base), worker(OWN)]
        for case, (*_, compiled, _) in enumerate(CASES):
            rounds = [[asked(item, case) for item in both] for _ in range(wanted.rounds + 1)]
            # The first round compiles.
            found[case] += rounds[1:] if compiled else rounds
        for item in both:
            assert item.stdin is not None  # It is a pipe.
            item.stdin.close()
            item.wait(30)
    print(f"{'case':22} {'requests':>8} {'base, s':>9} {'own, s':>9} {'speed':>6} same results")
    for case, (name, count, *_) in enumerate(CASES):
        same = len({digest for pair in found[case] for _, digest in pair}) == 1
        base_s, own_s = (min(pair[side][0] for pair in found[case]) for side in (0, 1))
        print(f"{name:22} {count:8} {base_s:9.4f} {own_s:9.4f} {base_s / own_s:6.2f} {same}")


if __name__ == "__main__":
    main()
