"""Random planning problems, small enough to check by enumeration or as large as asked."""

import random
from dataclasses import dataclass, replace

from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    WorkloadType,
)
from oserve.perf import ShapePerformance
from oserve.plan.problem import AmongEquals, Maximise, PlanProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A device kind: how many devices each of its nodes has, and how fast one is."""

    name: str
    nodes: tuple[int, ...]
    speed: float


def devices_of(kinds: tuple[Kind, ...]) -> tuple[Device, ...]:
    return tuple(
        Device(id=f"{kind.name}{node}.{slot}", kind=kind.name, node=f"{kind.name}{node}")
        for kind in kinds
        for node, size in enumerate(kind.nodes)
        for slot in range(size)
    )


def random_kinds(rng: random.Random, device_count: int, node_size: int = 8) -> tuple[Kind, ...]:
    names = ["h100", "a100"][: rng.choice([1, 2])]
    kinds = []
    left = device_count
    for index, name in enumerate(names):
        take = left if index == len(names) - 1 else rng.randint(1, left - 1)
        left -= take
        nodes = []
        while take > 0:
            size = min(take, rng.choice([node_size, node_size, node_size // 2]))
            nodes.append(size)
            take -= size
        kinds.append(Kind(name=name, nodes=tuple(nodes), speed=1.0 - 0.5 * index))
    return tuple(kinds)


def random_option(
    rng: random.Random, kind: Kind, type_count: int, widths: tuple[int, ...], chunk: int
) -> ShapePerformance:
    width, depth = rng.choice(widths), rng.choice([1, 1, 1, 2])
    size = width * depth
    capacity = []
    for column in range(type_count):
        # Heavier types (later ones) gain from wide groups and may not fit narrow ones at all.
        lean = width ** rng.uniform(-0.4, 0.1) * (1 + 0.2 * column * (width > 2))
        able = rng.random() > 0.3 * (column + 1) / (type_count * size)
        rate = kind.speed * size * lean * rng.uniform(0.7, 1.4) * 8 / (1 + 2 * column)
        capacity.append(rate if able else 0.0)
    return ShapePerformance(
        shape=ReplicaShape(
            tensor_parallel_size=width,
            pipeline_parallel_size=depth,
            precision=rng.choice([Precision.BF16, Precision.FP8]),
            max_num_batched_tokens=chunk,
            device_kind=kind.name,
        ),
        capacity_rps=tuple(capacity),
        latency_s=tuple(rng.uniform(0.5, 5) if c > 0 else float("inf") for c in capacity),
        power_w=size * rng.uniform(200, 700),
    )


def random_problem(
    seed: int,
    *,
    device_count: int | None = None,
    option_count: int = 5,
    load: tuple[float, float] = (0.2, 1.5),
    widths: tuple[int, ...] = (1, 2, 4, 8),
) -> PlanProblem:
    """A problem of up to 8 devices and 4 types, in which every type with traffic can be served."""
    rng = random.Random(seed)
    kinds = random_kinds(rng, device_count or rng.randint(2, 8))
    type_count = rng.randint(1, 4)
    options = [
        random_option(rng, kind, type_count, widths, 512 + index)
        for kind in kinds
        for index in range(option_count)
    ]
    # One shape that fits anywhere and serves everything, so that no problem is refused.
    plain = random_option(rng, kinds[0], type_count, (1,), 256)
    shape = replace(plain.shape, pipeline_parallel_size=1)
    capacity = tuple(kinds[0].speed * rng.uniform(0.5, 1.5) for _ in range(type_count))
    options.append(
        replace(plain, shape=shape, capacity_rps=capacity, latency_s=(1.0,) * type_count)
    )
    devices = devices_of(kinds)
    level = rng.uniform(*load) * len(devices) / type_count
    types = tuple(
        WorkloadType(
            name=f"type{column}",
            prompt_tokens=300.0 * (column + 1),
            output_tokens=100.0,
            arrival_rate_rps=level
            * rng.uniform(0.3, 1.5)
            * max(o.capacity_rps[column] / o.shape.device_count for o in options),
        )
        for column in range(type_count)
    )
    if type_count > 1 and rng.random() < 0.1:
        types = (replace(types[0], arrival_rate_rps=0.0), *types[1:])
    return PlanProblem(
        devices=devices,
        types=types,
        options=tuple(options),
        among_equals=rng.choice(list(AmongEquals)),
        maximise=Maximise.CAPACITY if rng.random() < 0.8 else Maximise.THROUGHPUT,
        enough_scale=rng.choice([None, None, 1.0, 1.2]),
    )


def plan_of(*replicas: ReplicaSpec) -> DeploymentPlan:
    return DeploymentPlan(
        id="current",
        replicas=replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1 / len(replicas) for spec in replicas}},
    )
