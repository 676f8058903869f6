"""Plans of transfers between random deployments of Llama-2-70B on 4 nodes of 8 H100.

    .venv/bin/python benchmarks/switch/plan.py [--pairs 20] [--json]

Deployments are random replicas of 4 or 8 devices (tensor x pipeline parallel 4x1, 2x2, 8x1, 4x2,
2x4) on shuffled devices, in three settings: replicas inside nodes; stages of a replica on any
nodes; and, inside nodes, the weights on one node only at first, as when a model is scaled out. Two
clusters: the paper's (NVLink 400 GB/s, 200 GB/s per node), and H100 data sheets (NVLink 450 GB/s,
eight 400 Gbit/s ports per node). Nothing is moved: transfer times are the fluid model's, with one
message's latency per pair of devices. "bound" is the linear programme's, which no choice of sources
undercuts. Reload: each node reads the weights that
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
from oserve.perf.known_models import find_model
from oserve.switch.balance import balanced_copies, lower_bound_s
from oserve.switch.choice import Copy, greedy_copies, local_copies, traffic_of
from oserve.switch.demand import demands_of
from oserve.switch.layout import Architecture, Layout, ShardPlacement, architecture_of
from oserve.switch.links import Links, busy_s, latency_s, links_of

Result = TypeVar("Result")

NODES, NODE_SIZE = 4, 8
SHAPES = ((4, 1), (2, 2), (8, 1), (4, 2), (2, 4))
INSIDE, STRADDLE, ONE_NODE = "inside nodes", "stages on any nodes", "weights on one node at first"
# Bytes per second at which a node reads weights that are not on its devices.
DISK = 3.0e9
PAGE_CACHE = 1.5e10


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pair of deployments. Seconds, but the last: of a plan on this machine."""

    setting: str
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


def deployment(rng: random.Random, *, straddle: bool) -> list[ShardPlacement]:
    """Tensor-parallel groups are inside nodes, stages of a replica too unless they straddle."""
    found: list[ShardPlacement] = []
    free = [
        rng.sample([f"n{node}/gpu:{index}" for index in range(NODE_SIZE)], NODE_SIZE)
        for node in range(NODES)
    ]
    while any(free):
        open_nodes = [node for node in free if node]
        width, depth = rng.choice(SHAPES)
        home = rng.choice(open_nodes)
        devices: list[str] = []
        for _ in range(depth):
            roomy = [node for node in (free if straddle else [home]) if len(node) >= width]
            if not roomy:
                break
            chosen = rng.choice(roomy)
            devices += [chosen.pop() for _ in range(width)]
        if len(devices) < width * depth:
            for device in devices:
                free[int(device[1])].append(device)
            continue
        layout = Layout(tensor_parallel_size=width, pipeline_parallel_size=depth)
        name = f"r{len(found)}"
        found.append(ShardPlacement(replica=name, layout=layout, devices=tuple(devices)))
    return found


def deployments(seed: int, setting: str) -> tuple[list[ShardPlacement], list[ShardPlacement]]:
    rng = random.Random(seed)
    straddle = setting == STRADDLE
    old, new = deployment(rng, straddle=straddle), deployment(rng, straddle=straddle)
    if setting == ONE_NODE:
        old = [one for one in old if one.devices[0].startswith("n0/")]
    return old, new


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
    old: Sequence[ShardPlacement],
    new: Sequence[ShardPlacement],
    links: Links,
    *,
    setting: str,
) -> Row:
    gather_s, demands = timed(lambda: demands_of(architecture, old, new))
    kept = local_copies(demands)
    balanced_plan_s, balanced = timed(lambda: balanced_copies(demands.remote, links))
    greedy_plan_s, greedy = timed(lambda: greedy_copies(demands.remote, links))
    # A node's devices together hold whole copies of the weights, which a node reads once.
    held = 2.0 * architecture.model.parameters
    traffic = traffic_of((*balanced.copies, *kept))
    bound_s = max(lower_bound_s(demands.remote, links), busy_s(traffic_of(kept), links))
    return Row(
        setting=setting,
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


def over_bound(times: Sequence[float], rows: Sequence[Row]) -> list[float]:
    return [time_s / row.bound_s - 1 for time_s, row in zip(times, rows, strict=True)]


def report(name: str, setting: str, rows: Sequence[Row]) -> None:
    middle = statistics.median
    print(f"\n{name}; {setting}; {len(rows)} pairs")
    print(
        f"  moved {middle(row.moved_gb for row in rows):.0f} GB, "
        f"kept {middle(row.kept_gb for row in rows):.0f} GB; "
        f"{middle(row.demands for row in rows):.0f} demands, "
        f"{middle(row.copies for row in rows):.0f} copies"
    )
    print(f"  {'':12}{'seconds':>9}{'over bound':>12}{'worst':>8}{'plan, ms':>10}{'worst':>8}")
    print(f"  {'bound':12}{middle(row.bound_s for row in rows):9.3f}")
    for label, times, plans in (
        ("balanced", [row.balanced_s for row in rows], [row.balanced_plan_s for row in rows]),
        ("greedy", [row.greedy_s for row in rows], [row.greedy_plan_s for row in rows]),
    ):
        over = over_bound(times, rows)
        print(
            f"  {label:12}{middle(times):9.3f}{middle(over):12.1%}{max(over):8.1%}"
            f"{1e3 * middle(plans):10.1f}{1e3 * max(plans):8.1f}"
        )
    for label, rate in (("page cache", PAGE_CACHE), ("disk", DISK)):
        read_s = rows[0].page_cache_s if rate == PAGE_CACHE else rows[0].disk_s
        print(f"  {label:12}{read_s:9.1f}  at {rate / 1e9:g} GB/s per node")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", type=int, default=20, help="of deployments, in each setting")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    architecture = architecture_of(find_model("llama-2-70b"))
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for name, links in clusters().items():
        for setting in (INSIDE, STRADDLE, ONE_NODE):
            rows = []
            for pair in range(arguments.pairs):
                old, new = deployments(pair, setting)
                rows.append(measure(architecture, old, new, links, setting=setting))
            if arguments.json:
                print(json.dumps({"cluster": name, "rows": [asdict(row) for row in rows]}))
            else:
                report(name, setting, rows)
    print(f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
