"""Capacities by simulation, in place of those of the linear model.

The linear model knows steady flow only. A simulated replica also has bursts, mixed steps and
pipeline bubbles, and often ranks chunk budgets and pipelines otherwise. For each shape and type,
as many replicas as the devices hold serve Poisson arrivals of that type. The rate that they serve
within the SLO, divided by their number, is the capacity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.core import DeploymentPlan, Device, LengthClass, ReplicaSpec
from oserve.evaluate.simulator import (
    Floats,
    Ints,
    Levers,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
    largest_scale,
)
from oserve.perf import ShapePerformance
from oserve.plan.packing import Packing
from oserve.plan.place import place_replicas
from oserve.traces import Slo
from oserve.workload.type_probabilities import TypeProbabilities

# The length of a run in multiples of the stay of a request, so that most of it is steady.
_STAYS = 5.0
_FEWEST, _MOST = 1000, 10_000
# Shapes below this fraction of the best modelled capacity per device, for every type, are left out;
# the error of the model is smaller.
_WORTH = 0.75
_TOLERANCE = 0.03
_EVALUATIONS = 10
# The search stops below this part of the modelled capacity.
_LEAST = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthSamples:
    """Observed request lengths of one workload type, in tokens; simulations draw from them.

    ``tier``: the index of its service tier; ``None`` without tiers.
    """

    prompt_tokens: Ints
    output_tokens: Ints
    tier: int | None = None

    def _tiers(self, count: int) -> Ints | None:
        return None if self.tier is None else np.full(count, self.tier, dtype=np.int64)

    def poisson(self, rate_rps: float, *, seconds: float, seed: int) -> SimulatedTraffic:
        """Poisson arrivals for about ``seconds``, but at least a thousand."""
        draw = np.random.default_rng(seed)
        count = round(min(_MOST, max(_FEWEST, rate_rps * seconds)))
        chosen = draw.integers(0, len(self.prompt_tokens), count)
        return SimulatedTraffic(
            arrival_s=np.cumsum(draw.exponential(1.0 / rate_rps, count)),
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            tier=self._tiers(count),
        )

    def drawn(self, arrival_s: Floats, draw: np.random.Generator) -> SimulatedTraffic:
        """Requests that arrive at these seconds."""
        chosen = draw.integers(0, len(self.prompt_tokens), len(arrival_s))
        return SimulatedTraffic(
            arrival_s=arrival_s,
            prompt_tokens=self.prompt_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            tier=self._tiers(len(arrival_s)),
        )


def simulated_table(
    simulator: Simulator,
    table: Sequence[ShapePerformance],
    lengths: Sequence[LengthSamples],
    *,
    devices: Sequence[Device],
    classes: tuple[LengthClass, ...],
    levers: Levers,
    slo: Slo,
    seed: int = 0,
) -> tuple[ShapePerformance, ...]:
    """The promising rows with simulated capacities; ``lengths`` by type, in the table's order.

    Capacities of 0 stay, and so do those of types without lengths.
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


def lengths_by_type(
    traffic: SimulatedTraffic, centres: Sequence[tuple[float, float]]
) -> list[LengthSamples]:
    """The lengths of traffic by the workload type of each request.

    ``centres`` of the types are (prompt, output) in tokens.
    """
    probabilities = TypeProbabilities(centres)
    lengths = zip(traffic.prompt_tokens.tolist(), traffic.output_tokens.tolist(), strict=True)
    kinds = np.array([probabilities.kind(prompt, output) for prompt, output in lengths])
    return [
        LengthSamples(
            prompt_tokens=traffic.prompt_tokens[kinds == kind],
            output_tokens=traffic.output_tokens[kinds == kind],
        )
        for kind in range(len(centres))
    ]


def _serving(
    replicas: tuple[ReplicaSpec, ...], classes: tuple[LengthClass, ...], levers: Levers
) -> SimulatedServing:
    plan = DeploymentPlan(id="x", replicas=replicas, length_classes=classes, routing_shares={})
    return SimulatedServing(plan=plan, levers=levers)


def merged(parts: Sequence[SimulatedTraffic]) -> SimulatedTraffic:
    """All requests, in order of arrival."""
    none = np.zeros(0, dtype=np.int64)
    arrival_s = np.concatenate([none.astype(np.float64), *(item.arrival_s for item in parts)])
    order = np.argsort(arrival_s, kind="stable")
    tiers = [item.tier for item in parts if item.tier is not None]
    return SimulatedTraffic(
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([none, *(item.prompt_tokens for item in parts)])[order],
        output_tokens=np.concatenate([none, *(item.output_tokens for item in parts)])[order],
        tier=np.concatenate([none, *tiers])[order] if parts and len(tiers) == len(parts) else None,
    )


def _promising(table: Sequence[ShapePerformance]) -> list[ShapePerformance]:
    """The rows that the model gives nearly the most, by device, for some type."""
    each = np.array([row.capacity_rps for row in table])
    each = each / np.array([[row.shape.device_count] for row in table])
    near = (each >= _WORTH * each.max(axis=0)) & (each > 0)
    return [row for row, good in zip(table, near.any(axis=1).tolist(), strict=True) if good]


def _capacity(
    simulator: Simulator,
    serving: SimulatedServing,
    traffic: SimulatedTraffic,
    start_rps: float,
    slo: Slo,
) -> float:
    def holds(scale: float) -> bool:
        return scale > _LEAST and simulator.holds(serving, traffic.faster(scale), slo)

    scale = largest_scale(holds, start=1.0, tolerance=_TOLERANCE, evaluations=_EVALUATIONS)
    return scale * start_rps
