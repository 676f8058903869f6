"""Capacities by simulation: what the table of the linear model says, measured instead.

The linear model knows steady flow; on a simulated replica bursts, mixing of steps and pipeline
bubbles count as well, and its ranking of chunk budgets and pipelines is often another. As many
replicas as the devices hold serve Poisson arrivals of one type; what they serve within the SLO,
by replica, takes the place of the table's capacity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.core import DeploymentPlan, Device, LengthClass, ReplicaSpec
from oserve.evaluate.simulator import (
    Floats,
    Ints,
    Levers,
    Serving,
    Simulator,
    Traffic,
    largest_scale,
)
from oserve.perf import ShapePerformance
from oserve.plan.packing import Packing
from oserve.plan.place import place_replicas
from oserve.traces import Slo

# A run lasts so many times as long as a request stays, for the flow to be steady in most of it.
_STAYS = 5.0
_FEWEST, _MOST = 1000, 10_000
# A shape that the model gives less than this part of the best, by device and for every type, is
# left out: its errors are not that large.
_WORTH = 0.75
_TOLERANCE = 0.03
_EVALUATIONS = 10
# Nothing below this part of what the model says is looked for.
_LEAST = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lengths:
    """Lengths seen of one type, in tokens; they are drawn from."""

    prompt_tokens: Ints
    output_tokens: Ints

    def poisson(self, rate_rps: float, *, seconds: float, seed: int) -> Traffic:
        """Requests of these lengths for about so long, a thousand at the least."""
        draw = np.random.default_rng(seed)
        count = round(min(_MOST, max(_FEWEST, rate_rps * seconds)))
        chosen = draw.integers(0, len(self.prompt_tokens), count)
        return Traffic(
            arrival_s=np.cumsum(draw.exponential(1.0 / rate_rps, count)),
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
        )

    def drawn(self, arrival_s: Floats, draw: np.random.Generator) -> Traffic:
        """Requests that come at these moments."""
        chosen = draw.integers(0, len(self.prompt_tokens), len(arrival_s))
        return Traffic(
            arrival_s=arrival_s,
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
        )


def simulated_table(
    simulator: Simulator,
    table: Sequence[ShapePerformance],
    lengths: Sequence[Lengths],
    *,
    devices: Sequence[Device],
    classes: tuple[LengthClass, ...],
    levers: Levers,
    slo: Slo,
    seed: int = 0,
) -> tuple[ShapePerformance, ...]:
    """Its promising rows with simulated capacities; ``lengths`` by type, in the table's order.

    What the model says cannot serve a type stays so, as does a type of which nothing was seen.
    """
    rows = []
    for row in _promising(table):
        count = max(1, Packing(devices, [row.shape]).largest(0))
        placed = place_replicas([(row.shape, count)], devices)
        serving = _serving(placed.replicas, classes, levers)
        found = [
            _capacity(
                simulator,
                serving,
                item.poisson(modelled_rps * count, seconds=_STAYS * stay_s, seed=seed),
                modelled_rps * count,
                slo,
            )
            / count
            if modelled_rps > 0 and len(item.prompt_tokens)
            else modelled_rps
            for modelled_rps, stay_s, item in zip(
                row.capacity_rps, row.latency_s, lengths, strict=True
            )
        ]
        rows.append(replace(row, capacity_rps=tuple(found)))
    return tuple(rows)


def _serving(
    replicas: tuple[ReplicaSpec, ...], classes: tuple[LengthClass, ...], levers: Levers
) -> Serving:
    plan = DeploymentPlan(id="x", replicas=replicas, workload_types=classes, routing_shares={})
    return Serving(plan=plan, levers=levers)


def merged(parts: Sequence[Traffic]) -> Traffic:
    """All requests, in order of arrival."""
    none = np.zeros(0, dtype=np.int64)
    arrival_s = np.concatenate([none.astype(np.float64), *(item.arrival_s for item in parts)])
    order = np.argsort(arrival_s, kind="stable")
    return Traffic(
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([none, *(item.prompt_tokens for item in parts)])[order],
        output_tokens=np.concatenate([none, *(item.output_tokens for item in parts)])[order],
    )


def _promising(table: Sequence[ShapePerformance]) -> list[ShapePerformance]:
    """Rows that the model gives nearly the most, by device, for some type."""
    each = np.array([row.capacity_rps for row in table])
    each = each / np.array([[row.shape.device_count] for row in table])
    near = (each >= _WORTH * each.max(axis=0)) & (each > 0)
    return [row for row, good in zip(table, near.any(axis=1).tolist(), strict=True) if good]


def _capacity(
    simulator: Simulator, serving: Serving, traffic: Traffic, start_rps: float, slo: Slo
) -> float:
    def holds(scale: float) -> bool:
        return scale > _LEAST and simulator.holds(serving, traffic.faster(scale), slo)

    scale = largest_scale(holds, start=1.0, tolerance=_TOLERANCE, evaluations=_EVALUATIONS)
    return scale * start_rps
