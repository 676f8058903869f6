"""What constants of dispatch are worth on a part of a trace, by simulation.

The part is cut into windows of equal length, as far as it is long enough. Each is served at loads
up to the knee of the present constants and past it; loads are multiples of the trace's own rate.
All constants see the same requests at the same times, so differences are theirs (common random
numbers). One number tells the gain of some constants over others in a window, the logarithm of a
product:

    capacity after / before                                largest load that holds the SLO
  * sqrt(mean * P99 of E2E), before / after                mean over loads up to the knee
  * SLO attainment after / before                          mean over loads past the knee

Where a load up to the knee is not held by both, attainment takes the place of latency there; past
the knee, latency takes that of attainment where both hold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oserve.control.dispatch.constants import DispatchConstants
from oserve.core import DeploymentPlan
from oserve.evaluate.attainment import ATTAINMENT, attainment
from oserve.evaluate.simulator import (
    Levers,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
    largest_scale,
)
from oserve.sim.results import FleetResults
from oserve.sim.types import GatewayOptions, Status
from oserve.traces import Slo

BELOW = (0.5, 0.8)
PAST = (1.2, 1.5)
"""RateScales that are compared, as multiples of the knee; the trace's own rate comes on top."""

LEAST_WINDOW_S = 60.0
"""A window, played at the knee, lasts at least so long."""

# Smaller capacities and attainments count as this.
_LEAST = 1e-3
_MOST_WINDOWS = 3
_TOLERANCE = 0.01
# RateScales closer than this to the trace's own rate stand for it.
_NEAR = 0.05
_EVALUATIONS = 14
# The search for a capacity begins at an earlier one, in steps of this factor.
_STEP = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWindow:
    """One window at one load. Latencies are of completed requests, in seconds."""

    requests: int
    attainment: float
    mean_e2e_s: float
    p99_e2e_s: float

    @property
    def holds(self) -> bool:
        """Whether enough requests are within the SLO."""
        return self.attainment >= ATTAINMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScore:
    """``capacity``: the largest multiple of the trace's rate that holds; 0: none was found.

    ``below`` and ``past``: an entry for each load up to the knee, and past it.
    """

    capacity: float
    below: tuple[ServedWindow, ...]
    past: tuple[ServedWindow, ...]


PartScore = tuple[WindowScore, ...]
"""A score for each window of a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateScales:
    """Multiples of the trace's own rate: up to the knee, and past it."""

    below: tuple[float, ...]
    past: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A relative gain: 0.02 is 2 %. ``error``: the standard error over windows."""

    mean: float
    error: float

    @property
    def sure(self) -> float:
        """The gain less one standard error."""
        return self.mean - self.error


def gain_of(before: PartScore, after: PartScore) -> Gain:
    """The gain of one score over another of the same part; the other way round it is negative."""
    gains = [_log_gain(*pair) for pair in zip(before, after, strict=True)]
    mean = math.fsum(gains) / len(gains)
    error = 0.0
    if len(gains) > 1:
        spread = math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
        error = math.sqrt(spread / len(gains))
    return Gain(mean=mean, error=error)


def _log_gain(before: WindowScore, after: WindowScore) -> float:
    carried = _log_ratio(max(_LEAST, after.capacity), max(_LEAST, before.capacity))
    return carried + _mean_gain(before.below, after.below) + _mean_gain(before.past, after.past)


def _mean_gain(before: Sequence[ServedWindow], after: Sequence[ServedWindow]) -> float:
    gains = [_load_gain(*pair) for pair in zip(before, after, strict=True)]
    return math.fsum(gains) / max(1, len(gains))


def _load_gain(before: ServedWindow, after: ServedWindow) -> float:
    if before.holds and after.holds:
        return 0.5 * (
            _log_ratio(before.mean_e2e_s, after.mean_e2e_s)
            + _log_ratio(before.p99_e2e_s, after.p99_e2e_s)
        )
    return _log_ratio(max(_LEAST, after.attainment), max(_LEAST, before.attainment))


def _log_ratio(above: float, below: float) -> float:
    return math.log(above / below) if above > 0.0 and below > 0.0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredServing:
    """What stays the same while constants vary.

    ``ordered``: engines take priorities; without that, requests are served in order of arrival.
    """

    plan: DeploymentPlan
    slo: Slo
    ordered: bool = True

    def served(self, constants: DispatchConstants) -> SimulatedServing:
        """The plan, served with these constants as the live gateway would."""
        return SimulatedServing(
            plan=self.plan,
            levers=Levers(
                order=constants.order if self.ordered else None,
                gateway=GatewayOptions(overflow_s=constants.overflow_s),
                inflight_per_device=constants.inflight_per_device,
                overload=constants.overload,
            ),
        )


class PartScorer:
    """Scores constants on one part of a trace; ``runs`` counts the simulations so far.

    ``told`` is called after each simulation.
    """

    def __init__(
        self,
        simulator: Simulator,
        serving: ScoredServing,
        part: SimulatedTraffic,
        *,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._simulator = simulator
        self._serving = serving
        self._part = part
        self._told = told
        self.runs = 0
        self.compare_at(RateScales(below=(1.0,), past=()), windows=1)

    def compare_at(self, loads: RateScales, *, windows: int) -> None:
        """Score in so many windows, at these loads, from now on."""
        self._loads = loads
        self._windows = windows_of(self._part, windows)
        self._capacities = [1.0] * len(self._windows)

    def knee(self, constants: DispatchConstants) -> float:
        """The largest multiple of the part's own rate at which the SLO holds; 0: none found."""
        return self._capacity(self._serving.served(constants), self._part, start=1.0, step=1.25)

    def __call__(self, constants: DispatchConstants) -> PartScore:
        """Serve all windows at all loads."""
        serving = self._serving.served(constants)
        scores = []
        for index, window in enumerate(self._windows):
            found = self._capacity(serving, window, start=self._capacities[index], step=_STEP)
            # Candidates are near each other, so the first capacity is a good start for all.
            if self._capacities[index] == 1.0 and found > 0.0:
                self._capacities[index] = found
            scores.append(
                WindowScore(
                    capacity=found,
                    below=tuple(self._at(serving, window, load) for load in self._loads.below),
                    past=tuple(self._at(serving, window, load) for load in self._loads.past),
                )
            )
        return tuple(scores)

    def _capacity(
        self, serving: SimulatedServing, part: SimulatedTraffic, *, start: float, step: float
    ) -> float:
        def holds(scale: float) -> bool:
            self._count()
            return self._simulator.holds(serving, part.faster(scale), self._serving.slo)

        return largest_scale(
            holds, start=start, tolerance=_TOLERANCE, evaluations=_EVALUATIONS, step=step
        )

    def _at(self, serving: SimulatedServing, window: SimulatedTraffic, load: float) -> ServedWindow:
        self._count()
        return served_window(self._simulator.run(serving, window.faster(load)), self._serving.slo)

    def _count(self) -> None:
        self.runs += 1
        self._told()


def served_window(results: FleetResults, slo: Slo) -> ServedWindow:
    """The attainment and the latencies of a run."""
    done = results.status == Status.COMPLETED
    e2e = (results.finish_s - results.arrival_s)[done]
    mean, p99 = (float(e2e.mean()), float(np.quantile(e2e, 0.99))) if len(e2e) else (0.0, 0.0)
    return ServedWindow(
        requests=len(results.arrival_s),
        attainment=attainment(results, slo),
        mean_e2e_s=mean,
        p99_e2e_s=p99,
    )


def windows_of(part: SimulatedTraffic, count: int) -> tuple[SimulatedTraffic, ...]:
    """The part in so many windows of equal length, without those that are empty."""
    length_s = part.duration_s / count
    ends = [*(length_s * index for index in range(1, count)), math.inf]
    starts = [length_s * index for index in range(count)]
    windows = [part.between(start, end) for start, end in zip(starts, ends, strict=True)]
    return tuple(window for window in windows if len(window))


def windows_at(duration_s: float, knee: float) -> int:
    """How many windows a part is cut into, 1 to 3: a window at the knee lasts a minute or more.

    Played too fast, a window ends before queues have grown, and holds at any load.
    """
    return max(1, min(_MOST_WINDOWS, int(duration_s / max(knee, 1.0) / LEAST_WINDOW_S)))


def loads_around(knee: float) -> RateScales:
    """The trace's own rate, and loads around the knee."""
    below, past = ({factor * knee for factor in factors} for factors in (BELOW, PAST))
    if all(abs(load - 1.0) > _NEAR for load in below | past):
        (below if knee >= 1.0 else past).add(1.0)
    return RateScales(below=tuple(sorted(below)), past=tuple(sorted(past)))
