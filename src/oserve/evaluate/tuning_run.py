"""One tuning of a deployment's constants on a trace: the split, the loads, the search, the outcome.

``oserve tune``, a server in the background and the experiments all call it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oserve.control.dispatch.constants import DispatchConstants
from oserve.core import DeploymentPlan, OServeError
from oserve.evaluate.attainment import ATTAINMENT
from oserve.evaluate.part_score import (
    PartScore,
    PartScorer,
    RateScales,
    ScoredServing,
    ServedWindow,
    loads_around,
    windows_at,
)
from oserve.evaluate.simulator import (
    SimulatedTraffic,
    Simulator,
)
from oserve.evaluate.tuning import SearchSpace, Tuned, tune

MIN_GAIN = 0.02
HOLD_OUT = 0.5
LEAST_REQUESTS = 200
"""Fewer requests in a part do not tell 2 % from noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningChoice:
    """``hold_out``: the share of the time that is held out, at its end.

    ``min_gain``: the least gain on that part, as a fraction. ``place`` names the trace in errors.
    """

    present: DispatchConstants
    serving: ScoredServing
    pooled: bool
    ttft_s: float | None
    min_gain: float = MIN_GAIN
    hold_out: float = HOLD_OUT
    place: str = "the trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """Of a part under some constants: means over windows, and over loads below and past the knee.

    ``capacity`` is a multiple of the trace's rate, latencies are in seconds.
    """

    capacity: float
    mean_e2e_s: float
    p99_e2e_s: float
    attainment_past: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRun:
    """``knee`` is that of the present constants on the first part. ``runs`` counts simulations.

    ``requests``: in the first part and in the part held out. ``before`` and ``after`` are of the
    held-out part. ``shortest_s``: how long the shorter part lasts at the knee.
    """

    tuned: Tuned
    knee: float
    loads: RateScales
    requests: tuple[int, int]
    windows: int
    shortest_s: float
    runs: int
    before: PartSummary
    after: PartSummary


def parts(traffic: SimulatedTraffic, hold_out: float) -> tuple[SimulatedTraffic, SimulatedTraffic]:
    """The first part and the part held out, each on a clock that starts at 0 s."""
    split_s = traffic.duration_s * (1.0 - hold_out)
    return traffic.between(0.0, split_s), traffic.between(split_s, math.inf)


def run_tuning(
    simulator: Simulator,
    traffic: SimulatedTraffic,
    choice: TuningChoice,
    *,
    told: Callable[[int], None] = lambda _: None,
) -> TuningRun:
    """Tune; ``told`` gets the number of simulations so far.

    Raises OServeError for too few requests in a part, for no SLO, and where the plan does not hold
    the SLO at any rate.
    """
    first, later = parts(traffic, choice.hold_out)
    for words, part in (("first part", first), ("part held out", later)):
        if len(part) < LEAST_REQUESTS:
            raise OServeError(
                f"its {words} has {len(part)} requests",
                place=choice.place,
                remedy=f"give at least {LEAST_REQUESTS} in each part: a longer trace, or another "
                "share to hold out",
            )
    slo = choice.serving.slo
    if slo.ttft_s is None and slo.tpot_s is None:
        raise OServeError(
            "without an SLO there is nothing to tune for",
            place="--slo-ttft-ms",
            remedy="give --slo-ttft-ms and --slo-tpot-ms",
        )

    def scorer(part: SimulatedTraffic) -> PartScorer:
        return PartScorer(simulator, choice.serving, part, told=lambda: told(_runs()))

    def _runs() -> int:
        return sum(item.runs for item in scorers)

    scorers: list[PartScorer] = []
    scorers += [scorer(first), scorer(later)]
    knee = scorers[0].knee(choice.present)
    if knee == 0.0:
        raise OServeError(
            f"the plan holds the SLO for {ATTAINMENT:.0%} of the requests at no rate",
            place="--slo-ttft-ms",
            remedy="loosen the SLO, or give a plan that holds it",
        )
    loads = loads_around(knee)
    windows = windows_at(min(first.duration_s, later.duration_s), knee)
    for item in scorers:
        item.compare_at(loads, windows=windows)
    space = SearchSpace(ttft_s=choice.ttft_s, ordered=choice.serving.ordered, pooled=choice.pooled)
    found = tune(choice.present, space, *scorers, min_gain=choice.min_gain)
    return TuningRun(
        tuned=found,
        knee=knee,
        loads=loads,
        requests=(len(first), len(later)),
        windows=windows,
        shortest_s=min(first.duration_s, later.duration_s) / max(knee, 1.0),
        runs=_runs(),
        before=summarised(scorers[1](choice.present)),
        after=summarised(scorers[1](found.constants)),
    )


def summarised(score: PartScore) -> PartSummary:
    """The means of a score."""
    below = [row for window in score for row in window.below]
    past = [row for window in score for row in window.past]
    return PartSummary(
        capacity=_mean([window.capacity for window in score]),
        mean_e2e_s=_weighted(below, [row.mean_e2e_s for row in below]),
        p99_e2e_s=_weighted(below, [row.p99_e2e_s for row in below]),
        attainment_past=_weighted(past, [row.attainment for row in past]),
    )


def is_pooled(plan: DeploymentPlan) -> bool:
    """Whether some replica is outside of some type's pool."""
    return any(
        sum(1 for share in shares.values() if share > 0.0) < len(plan.replicas)
        for shares in plan.routing_shares.values()
    )


def _weighted(rows: Sequence[ServedWindow], values: Sequence[float]) -> float:
    total = sum(row.requests for row in rows)
    weighted = (value * row.requests for value, row in zip(values, rows, strict=True))
    return math.fsum(weighted) / max(1, total)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
