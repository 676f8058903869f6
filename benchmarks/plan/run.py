"""How long planning takes, how far from the optimum it ends, and how much the flow search loses.

    .venv/bin/python benchmarks/plan/run.py [--devices 8,16,32] [--instances 10] [--json]

Random but plausible problems: nodes of eight devices, four workload types from short to long,
shapes of tensor parallel 1, 2, 4, 8 x pipeline parallel 1, 2 x two precisions x three chunk
budgets; every second problem has two kinds of devices. The noise of 25 % on capacities is larger
than in practice, so that fewer shapes are dominated and the problems are harder. Times are of one
core. "exact" includes leaving out dominated shapes, building the programme and breaking ties;
"flow" includes the homogeneous deployments it starts from; "plan" is the exact search with ten
candidates, all baselines and their assignments; "gain" is over the best homogeneous deployment.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import TypeVar

from oserve.core import Device, OServeError, Precision, ReplicaShape, WorkloadType
from oserve.perf import ShapePerformance
from oserve.plan.assign import Assigner
from oserve.plan.bounds import ScoredCounts
from oserve.plan.brute import brute_force
from oserve.plan.deploy import place_deployment
from oserve.plan.dominance import undominated
from oserve.plan.exact import ExactSearch
from oserve.plan.guided import guided_search
from oserve.plan.problem import PlanProblem
from oserve.plan.proof import Proved
from oserve.plan.search import plan_deployment

Result = TypeVar("Result")

NODE_SIZE = 8
BRUTE_UP_TO = 8
GUIDED_UP_TO = 64
NOISE = 0.25
TYPES = (
    ("short prompt, short answer", 250.0, 120.0),
    ("long prompt, short answer", 3500.0, 150.0),
    ("short prompt, long answer", 400.0, 900.0),
    ("long prompt, long answer", 6000.0, 900.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of device: speed, and memory in multiples of the model's 16-bit weights."""

    name: str
    speed: float
    memory: float


KINDS = (Kind(name="large", speed=1.0, memory=0.7), Kind(name="small", speed=0.45, memory=0.35))


def option(rng: random.Random, kind: Kind, shape: ReplicaShape) -> ShapePerformance | None:
    """One row of the table; None where the weights leave no room for KV cache."""
    size, width = shape.device_count, shape.tensor_parallel_size
    weights = 1.0 if shape.precision is Precision.BF16 else 0.5
    room = size * kind.memory - weights
    if room <= 0.05:
        return None
    speed = kind.speed * (1.0 if weights == 1.0 else 1.35)
    # All-reduces and pipeline bubbles take their part.
    work_rate = speed * size * width**-0.25 * shape.pipeline_parallel_size**-0.12
    chunk = shape.max_num_batched_tokens
    capacity, latency = [], []
    for _, prompt, output in TYPES:
        batch = min(room * 0.9 * 240_000 / (prompt + output), 256.0)
        filled = batch / (batch + 24 / size**0.5)
        work = prompt / 9000 * (1.15 if chunk < 1024 and prompt > 1000 else 1.0)
        work += output / 2200 * (1.12 if chunk > 4096 else 1.0)
        able = batch >= 8 and not (width == 1 and prompt > 5000)
        rate = 10 * work_rate * filled / work * rng.uniform(1 - NOISE, 1 + NOISE)
        capacity.append(rate if able else 0.0)
        latency.append(3 * work / (speed * width**0.7) if able else float("inf"))
    return ShapePerformance(
        shape=shape,
        capacity_rps=tuple(capacity),
        latency_s=tuple(latency),
        power_w=size * rng.uniform(300, 360),
    )


def problem_of(seed: int, device_count: int) -> PlanProblem:
    rng = random.Random(seed * 10_007 + device_count)
    kinds = KINDS[: 1 + seed % 2]
    devices = [
        Device(id=f"{kind.name}-{slot}", kind=kind.name, node=f"{kind.name}-{slot // NODE_SIZE}")
        for kind in kinds
        for slot in range(device_count // len(kinds))
    ]
    shapes = product(
        kinds, (1, 2, 4, 8), (1, 2), (Precision.BF16, Precision.FP8), (512, 2048, 8192)
    )
    rows = [
        option(
            rng,
            kind,
            ReplicaShape(
                tensor_parallel_size=width,
                pipeline_parallel_size=depth,
                precision=precision,
                max_num_batched_tokens=chunk,
                device_kind=kind.name,
            ),
        )
        for kind, width, depth, precision, chunk in shapes
    ]
    options = tuple(row for row in rows if row is not None)
    mix = [rng.expovariate(1.0) for _ in TYPES]
    load = rng.uniform(0.4, 1.2) * device_count / sum(mix)
    types = tuple(
        WorkloadType(
            name=name,
            prompt_tokens=prompt,
            output_tokens=output,
            arrival_rate_rps=load
            * mix[j]
            * max(row.capacity_rps[j] / row.shape.device_count for row in options),
        )
        for j, (name, prompt, output) in enumerate(TYPES)
    )
    return PlanProblem(devices=tuple(devices), types=types, options=options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One size of cluster. Seconds are medians, losses are relative to the exact optimum."""

    devices: int
    instances: int
    options: float
    considered: float
    exact_s: float
    exact_worst_s: float
    gap_worst: float
    guided_s: float | None
    guided_loss_mean: float | None
    guided_loss_worst: float | None
    brute_s: float | None
    brute_agrees: int | None
    whole_plan_s: float
    placement_s: float
    gain_over_homogeneous: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One problem, measured."""

    options: int
    considered: int
    exact_s: float
    gap: float
    guided_s: float | None
    guided_loss: float | None
    brute_s: float | None
    brute_agrees: bool | None
    whole_plan_s: float
    placement_s: float
    gain: float


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun


def value(problem: PlanProblem, scored: ScoredCounts) -> float:
    scale = scored.score.scale
    return scored.score.served_rps if scale < 1 else problem.demand_rps * scale


def measured(problem: PlanProblem) -> Instance:
    def exactly() -> Proved:
        return ExactSearch(problem, Assigner(problem)).solve()

    size = len(problem.devices)
    exact, exact_s = timed(exactly)
    best = value(problem, exact.best)
    guided_s = guided_loss = brute_s = None
    agrees = None
    if size <= GUIDED_UP_TO:
        guided, guided_s = timed(lambda: guided_search(problem, Assigner(problem)))
        guided_loss = 1 - value(problem, guided) / best
    if size <= BRUTE_UP_TO:
        try:
            brute, brute_s = timed(lambda: brute_force(problem, Assigner(problem)))
            agrees = abs(value(problem, brute) / best - 1) < 2e-6
        except OServeError:
            pass
    planned, whole_plan_s = timed(lambda: plan_deployment(problem))
    _, placement_s = timed(lambda: place_deployment(problem, planned.best))
    baseline = planned.homogeneous[0]
    return Instance(
        options=len(problem.options),
        considered=len(undominated(problem)),
        exact_s=exact_s,
        gap=exact.optimality_gap,
        guided_s=guided_s,
        guided_loss=guided_loss,
        brute_s=brute_s,
        brute_agrees=agrees,
        whole_plan_s=whole_plan_s,
        placement_s=placement_s,
        gain=best / value(problem, ScoredCounts(counts=baseline.counts, score=baseline.score)),
    )


def row_of(device_count: int, instances: int) -> Row:
    found = [measured(problem_of(seed, device_count)) for seed in range(instances)]
    guided = [one.guided_loss for one in found if one.guided_loss is not None]
    guided_s = [one.guided_s for one in found if one.guided_s is not None]
    brute_s = [one.brute_s for one in found if one.brute_s is not None]
    return Row(
        devices=device_count,
        instances=instances,
        options=statistics.mean(one.options for one in found),
        considered=statistics.mean(one.considered for one in found),
        exact_s=statistics.median(one.exact_s for one in found),
        exact_worst_s=max(one.exact_s for one in found),
        gap_worst=max(one.gap for one in found),
        guided_s=statistics.median(guided_s) if guided_s else None,
        guided_loss_mean=statistics.mean(guided) if guided else None,
        guided_loss_worst=max(guided) if guided else None,
        brute_s=statistics.median(brute_s) if brute_s else None,
        brute_agrees=sum(bool(one.brute_agrees) for one in found) if brute_s else None,
        whole_plan_s=statistics.median(one.whole_plan_s for one in found),
        placement_s=statistics.median(one.placement_s for one in found),
        gain_over_homogeneous=statistics.mean(one.gain for one in found),
    )


def shown(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--devices", default="8,16,32,64,256,1024", help="sizes, with commas")
    parser.add_argument("--instances", type=int, default=10, help="problems per size")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    wish = parser.parse_args()
    # The first solve of a process loads code, which is not part of any.
    plan_deployment(problem_of(0, 8))
    rows = [row_of(int(size), wish.instances) for size in wish.devices.split(",")]
    machine = f"{platform.platform()}, {os.cpu_count()} cores (one used), Python " + (
        platform.python_version()
    )
    command = " ".join(["python", *sys.argv])
    if wish.json:
        rows_json = [asdict(row) for row in rows]
        print(json.dumps({"machine": machine, "command": command, "rows": rows_json}, indent=2))
        return
    print(f"machine: {machine}\ncommand: {command}\n")
    print(
        f"{'devices':>7} {'shapes':>6} {'kept':>5} | {'exact s':>8} {'worst s':>8} {'gap':>8} | "
        f"{'flow s':>7} {'loss %':>7} {'worst %':>7} | {'brute s':>8} {'agree':>6} | "
        f"{'plan s':>7} {'place s':>7} {'gain':>5}"
    )
    for row in rows:
        loss = None if row.guided_loss_mean is None else 100 * row.guided_loss_mean
        worst = None if row.guided_loss_worst is None else 100 * row.guided_loss_worst
        agree = "-" if row.brute_agrees is None else f"{row.brute_agrees}/{row.instances}"
        print(
            f"{row.devices:>7} {row.options:>6.0f} {row.considered:>5.1f} | {row.exact_s:>8.3f} "
            f"{row.exact_worst_s:>8.3f} {row.gap_worst:>8.1e} | {shown(row.guided_s, '.2f'):>7} "
            f"{shown(loss, '.2f'):>7} {shown(worst, '.2f'):>7} | "
            f"{shown(row.brute_s, '.2f'):>8} {agree:>6} | {row.whole_plan_s:>7.2f} "
            f"{row.placement_s:>7.3f} {row.gain_over_homogeneous:>5.2f}"
        )


if __name__ == "__main__":
    main()
