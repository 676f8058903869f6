"""A run by hour and in all: latencies, attainment, joules, devices, switches, KV cache.

Requests belong to the hour of their arrival. A latency that never came to an end counts up to the
end of the run, so that lost requests do not flatter a policy.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from oserve.evaluate.attainment import ATTAINMENT, met
from oserve.evaluate.simulator import (
    Floats,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
)
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.study.run import Change, Run
from oserve.study.usage import PeriodUse, merged
from oserve.traces import Slo

# Tokens are few in quiet hours; below this ratios mean nothing.
_LEAST_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """P50 and P99 in seconds; 0 without requests."""

    p50_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Requests that arrived in a period. ``lost``: those that never completed."""

    requests: int
    lost: int
    slo_attainment: float
    ttft: Quantiles
    tpot: Quantiles
    e2e: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class HourFigures:
    """One hour, or the whole day (``hour`` is -1).

    ``energy_j`` is of devices that a replica held, ``idle_j`` of the others. ``deployment`` is the
    target at the end. ``kv_...`` are shares of the KV cache, see ``PeriodUse``.
    """

    hour: int
    seconds: float
    latencies: Latencies
    device_s: float
    energy_j: float
    idle_j: float
    switches: int
    deployment: str
    kv_mean: float
    kv_peak: float
    kv_imbalance: float
    replicas: Mapping[str, tuple[float, float]]

    @property
    def holds(self) -> bool:
        """Whether enough requests met the SLO."""
        return self.latencies.slo_attainment >= ATTAINMENT

    @property
    def total_j(self) -> float:
        """Joules of all devices."""
        return self.energy_j + self.idle_j


@dataclass(frozen=True, slots=True, kw_only=True)
class DayFigures:
    """A policy's day: its hours, and all of it."""

    policy: str
    hours: tuple[HourFigures, ...]
    whole: HourFigures

    @property
    def missed(self) -> tuple[int, ...]:
        """The hours in which too few requests met the SLO."""
        return tuple(item.hour for item in self.hours if not item.holds)


def hour_marks(hours: int, hour_s: int) -> list[int]:
    """The seconds at which an hour ends, except for the last."""
    return [hour * hour_s for hour in range(1, hours)]


def day_figures(policy: str, run: Run, slo: Slo, *, hours: int, hour_s: int) -> DayFigures:
    """The figures of a run that had ``hour_marks``; the last hour includes what follows it."""
    marks = hour_marks(hours, hour_s)[: len(run.periods) - 1]
    found = latencies_between(run.results, slo, marks)
    rows = []
    for at, use in enumerate(run.periods):
        end_s = math.inf if at == len(run.periods) - 1 else use.end_s
        rows.append(_figures(at, run, found[at], use, (use.start_s, end_s)))
    (all_day,) = latencies_between(run.results, slo, ())
    whole = _figures(-1, run, all_day, merged(run.periods), (0.0, math.inf))
    return DayFigures(policy=policy, hours=tuple(rows), whole=whole)


def latencies_between(
    results: FleetResults, slo: Slo, marks_s: Sequence[float]
) -> tuple[Latencies, ...]:
    """The latencies of requests that arrived up to each mark, and after the last."""
    done = results.status == Status.COMPLETED
    first = np.where(done, results.first_token_s, results.now_s)
    finish = np.where(done, results.finish_s, results.now_s)
    arrival, gaps, good = results.arrival_s, results.made_tokens - 1, met(results, slo)
    several = done & (gaps > 0)
    edges = [0, *np.searchsorted(arrival, marks_s).tolist(), len(arrival)]
    found = []
    for low, high in itertools.pairwise(edges):
        part = slice(low, high)
        own = several[part]
        found.append(
            Latencies(
                requests=high - low,
                lost=int(np.sum(~done[part])),
                slo_attainment=float(good[part].mean()) if high > low else 1.0,
                ttft=_quantiles(first[part] - arrival[part]),
                tpot=_quantiles((finish[part] - first[part])[own] / gaps[part][own]),
                e2e=_quantiles(finish[part] - arrival[part]),
            )
        )
    return tuple(found)


def _figures(
    hour: int, run: Run, found: Latencies, use: PeriodUse, span_s: tuple[float, float]
) -> HourFigures:
    start_s, end_s = span_s
    before = [change for change in run.changes if change.at_s < end_s]
    return HourFigures(
        hour=hour,
        seconds=use.end_s - use.start_s,
        latencies=found,
        device_s=use.device_s,
        energy_j=use.energy.serving_j,
        idle_j=use.energy.idle_j,
        switches=sum(start_s <= at_s < end_s for at_s in _switches_s(run.changes)),
        deployment=_words(before[-1]) if before else "",
        kv_mean=use.kv_mean,
        kv_peak=use.kv_peak,
        kv_imbalance=use.kv_imbalance,
        replicas={item.name: (item.kv_mean, item.kv_peak) for item in use.replicas},
    )


def _switches_s(changes: Sequence[Change]) -> list[float]:
    """When the set of replicas changed."""
    return [
        after.at_s
        for before, after in itertools.pairwise(changes)
        if set(before.plan.replicas) != set(after.plan.replicas)
    ]


def _words(change: Change) -> str:
    return " + ".join(f"{count} x {name}" for name, count in change.deployment)


def _quantiles(values: Floats) -> Quantiles:
    if not len(values):
        return Quantiles()
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return Quantiles(p50_s=float(p50), p99_s=float(p99))


# -- comparisons --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Over hours: the geometric mean, the largest and the smallest ratio."""

    mean: float
    largest: float
    smallest: float


def ratios(values: Iterable[float], base: Iterable[float]) -> Ratios:
    """``values`` over ``base``, hour by hour; hours without either do not count."""
    found = [
        value / own
        for value, own in zip(values, base, strict=False)
        if value > _LEAST_S and own > _LEAST_S
    ]
    if not found:
        return Ratios(mean=1.0, largest=1.0, smallest=1.0)
    mean = math.exp(math.fsum(math.log(item) for item in found) / len(found))
    return Ratios(mean=mean, largest=max(found), smallest=min(found))


def best_by_hour(
    simulator: Simulator,
    servings: Iterable[SimulatedServing],
    traffic: SimulatedTraffic,
    slo: Slo,
    *,
    hours: int,
    hour_s: int,
    said: Callable[[SimulatedServing], None] = lambda _: None,
) -> list[tuple[str, Latencies]]:
    """For each hour the static serving with the least P99 E2E of those that hold the SLO in it.

    It bounds what following the load can bring with these servings: the hours are chosen in
    hindsight, and switches cost nothing. Where none holds, the one that comes closest counts.
    """
    marks_s = hour_marks(hours, hour_s)
    best: list[tuple[tuple[float, float], str, Latencies]] = []
    for serving in servings:
        said(serving)
        results = simulator.run(serving, traffic)
        for at, found in enumerate(latencies_between(results, slo, marks_s)):
            short = max(0.0, ATTAINMENT - found.slo_attainment)
            entry = ((short, found.e2e.p99_s), serving.plan.id, found)
            if len(best) <= at:
                best.append(entry)
            elif entry[0] < best[at][0]:
                best[at] = entry
    return [(name, found) for _, name, found in best]


def day_document(day: DayFigures) -> dict[str, Any]:
    """JSON-ready data; times are seconds."""
    found: dict[str, Any] = msgspec.to_builtins(day)
    return {**found, "missed_hours": list(day.missed)}
