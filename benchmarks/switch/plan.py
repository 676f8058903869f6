"""Plans of transfers between random deployments of Llama-2-70B on 4 nodes of 8 H100.

    .venv/bin/python benchmarks/switch/plan.py [--pairs 20] [--json]

Deployments are random replicas of 4 or 8 devices inside nodes (tensor x pipeline parallel 4x1, 2x2,
8x1, 4x2, 2x4) on shuffled devices; in the second half of the pairs the weights are on one node
only, as when a model is scaled out. Two clusters: the paper's (NVLink 400 GB/s, 200 GB/s per
node), and H100 data sheets (NVLink 450 GB/s, eight 400 Gbit/s ports per node). Nothing is moved:
transfer times are the fluid model's, with one message's latency per pair of devices. "bound" is the
linear programme's, which no choice of sources undercuts. Reload: each node reads the weights that
its devices hold, each file once, over one path of the given rate, and hands them to its devices.
Plan times are medians over pairs of the best of three runs, one core, box-by-box copies included.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from oserve.core import Device
from oserve.perf.device import find_link
from oserve.perf.model import find_model
from oserve.switch.balance import balanced_copies, lower_bound_s
from oserve.switch.choice import Copy, greedy_copies, local_copies, traffic_of
from oserve.switch.demand import demands_of
from oserve.switch.layout import Architecture, Layout, Placed, architecture_of
from oserve.switch.links import Links, busy_s, latency_s, links_of

Result = TypeVar("Result")

NODES, NODE_SIZE = 4, 8
SHAPES = ((4, 1), (2, 2), (8, 1), (4, 2), (2, 4))
# Bytes per second at which a node reads weights that are not on its devices.
DISK = 3.0e9
PAGE_CACHE = 1.5e10


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pair of deployments. Seconds, but the last: of a plan on this machine."""

    spread: bool
    demands: int
    copies: int
    moved_gb: float
    kept_gb: float
    bound_s: float
    balanced_s: float
    greedy_s: float
    disk_s: float
    page_cache_s: float
    balanced_plan_s: float
    greedy_plan_s: float


def deployment(rng: random.Random) -> list[Placed]:
    found: list[Placed] = []
    for node in range(NODES):
        left = [f"n{node}/gpu:{index}" for index in range(NODE_SIZE)]
        rng.shuffle(left)
        while left:
            width, depth = rng.choice([s for s in SHAPES if s[0] * s[1] <= len(left)])
            own, left = tuple(left[: width * depth]), left[width * depth :]
            layout = Layout(tensor_parallel_size=width, pipeline_parallel_size=depth)
            found.append(Placed(replica=f"r{len(found)}", layout=layout, devices=own))
    return found


def clusters() -> dict[str, Links]:
    devices = [
        Device(id=f"n{node}/gpu:{index}", kind="H100", node=f"n{node}")
        for node in range(NODES)
        for index in range(NODE_SIZE)
    ]
    sheets = links_of(devices, find_link("infiniband-400"))
    paper = links_of(devices, find_link("infiniband-400"), node_bandwidth=2.0e11)
    slower = {name: replace(port, bandwidth=4.0e11) for name, port in paper.ports.items()}
    return {"paper": replace(paper, ports=slower), "data sheets": sheets}


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """The best of three, garbage collection aside."""
    best = float("inf")
    for _ in range(3):
        gc.collect()
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def seconds(copies: Sequence[Copy], kept: Sequence[Copy], links: Links) -> float:
    traffic = traffic_of((*copies, *kept))
    return busy_s(traffic, links) + latency_s(traffic.pairs, links)


def measure(
    architecture: Architecture,
    old: Sequence[Placed],
    new: Sequence[Placed],
    links: Links,
    *,
    spread: bool,
) -> Row:
    def gathered() -> float:
        return timed(lambda: demands_of(architecture, old, new))[0]

    gather_s = gathered()
    demands = demands_of(architecture, old, new)
    kept = local_copies(demands)
    balanced_plan_s, balanced = timed(lambda: balanced_copies(demands.remote, links))
    greedy_plan_s, greedy = timed(lambda: greedy_copies(demands.remote, links))
    # A node's devices together hold whole copies of the weights, which a node reads once.
    held = 2.0 * architecture.model.parameters
    traffic = traffic_of((*balanced.copies, *kept))
    bound_s = max(lower_bound_s(demands.remote, links), busy_s(traffic_of(kept), links))
    return Row(
        spread=spread,
        demands=len(demands.remote),
        copies=len(balanced.copies),
        moved_gb=traffic.moved_bytes / 1e9,
        kept_gb=traffic.local_bytes / 1e9,
        bound_s=bound_s,
        balanced_s=seconds(balanced.copies, kept, links),
        greedy_s=seconds(greedy, kept, links),
        disk_s=held / DISK,
        page_cache_s=held / PAGE_CACHE,
        balanced_plan_s=gather_s + balanced_plan_s,
        greedy_plan_s=gather_s + greedy_plan_s,
    )


def report(name: str, rows: Sequence[Row]) -> None:
    for spread in (True, False):
        own = [row for row in rows if row.spread is spread]
        if not own:
            continue

        def middle(value: Callable[[Row], float], own: Sequence[Row] = own) -> float:
            return statistics.median(value(row) for row in own)

        print(f"\n{name}; weights on {'all nodes' if spread else 'one node'}; {len(own)} pairs")
        print(
            f"  moved {middle(lambda r: r.moved_gb):.0f} GB, kept {middle(lambda r: r.kept_gb):.0f}"
            f" GB; {middle(lambda r: r.demands):.0f} demands, {middle(lambda r: r.copies):.0f} copies"
        )
        print(
            f"  {'':12}{'seconds':>9}{'over bound, median':>21}{'worst':>8}{'plan, ms':>10}{'worst':>7}"
        )
        print(f"  {'bound':12}{middle(lambda r: r.bound_s):9.3f}")
        for label, time_of, plan_of in (
            ("balanced", lambda r: r.balanced_s, lambda r: r.balanced_plan_s),
            ("greedy", lambda r: r.greedy_s, lambda r: r.greedy_plan_s),
        ):
            over = [time_of(row) / row.bound_s - 1 for row in own]
            plans = [1e3 * plan_of(row) for row in own]
            print(
                f"  {label:12}{middle(time_of):9.3f}{statistics.median(over):20.1%} {max(over):7.1%}"
                f"{statistics.median(plans):10.1f}{max(plans):7.1f}"
            )
        print(
            f"  {'page cache':12}{middle(lambda r: r.page_cache_s):9.1f}  at {PAGE_CACHE / 1e9:g} GB/s per node"
        )
        print(f"  {'disk':12}{middle(lambda r: r.disk_s):9.1f}  at {DISK / 1e9:g} GB/s per node")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    architecture = architecture_of(find_model("llama-2-70b"))
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for name, links in clusters().items():
        rows = []
        for pair in range(arguments.pairs):
            rng = random.Random(pair)
            old, new = deployment(rng), deployment(rng)
            spread = pair < arguments.pairs / 2
            if not spread:
                old = [one for one in old if one.devices[0].startswith("n0/")]
            rows.append(measure(architecture, old, new, links, spread=spread))
        if arguments.json:
            print(json.dumps({"cluster": name, "rows": [asdict(row) for row in rows]}))
        else:
            report(name, rows)
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
