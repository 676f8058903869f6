"""Scores a switch by simulation: the evaluation workload with the switch and without it.

The current plan serves the workload, and the candidate serves it as if it had been there all along.
Where that gains enough, the fleet switches from one to the other at the time of the decision, with
drains, starts and the backlog that these leave behind. Near capacity the drains and starts decide,
so they are simulated and not only priced.

How long the present traffic lasts is unknown, and a switch that gains where it lasts loses where it
does not. So there are two courses: the traffic lasts as long as expected, or as long again as it
has lasted. Then the earlier traffic returns, and the fleet switches back. A switch gains what it
gains in the first, unless it loses in the second. That is ski rental: a switch is bought once the
change has lasted so long that it would have paid for the way there and back.

Scoring depends on nothing but its arguments and gives the same score for the same arguments, on a
server, in a replay and in a study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.evaluation import DecisionInput, SimulatedScore
from oserve.core import DeploymentPlan, Device, LengthClass
from oserve.evaluate.attainment import met
from oserve.evaluate.capacities import LengthSamples, simulated_table
from oserve.evaluate.simulator import (
    LATEST_S,
    Levers,
    Mask,
    SimulatedServing,
    SimulatedTraffic,
    Simulator,
)
from oserve.evaluate.transition import RoutedLeg, TimedSwitch, simulate_switches
from oserve.evaluate.verification import SERVED_AS, slo_of
from oserve.evaluate.workload import EvaluationWorkload, evaluation_workload
from oserve.perf import ShapePerformance
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.table import PerformanceSource
from oserve.plan.demand import Demand
from oserve.plan.planning import PlanRequest
from oserve.traces import Slo

# A share of the arrivals. Where no plan serves more of them in time, they are late because of the
# backlog, which hides the better plan.
_BACKLOGGED = 0.1
_AS_MEASURED = Speeds()
_MOST_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationModel:
    """The inputs of scores, except the switch itself; picklable.

    ``lengths``: request lengths by workload type. ``levers``: how replicas serve. ``min_gain``: the
    gain, as a ratio of what the current plan serves, below which a switch is not simulated.
    """

    source: PerformanceSource
    devices: tuple[Device, ...]
    classes: tuple[LengthClass, ...]
    lengths: tuple[LengthSamples, ...]
    levers: Levers
    slo: Slo
    min_gain: float
    seed: int = 0


def model_of(
    request: PlanRequest,
    *,
    min_gain: float,
    lengths: Sequence[LengthSamples] = (),
    levers: Levers | None = None,
) -> EvaluationModel:
    """The model for a plan request.

    Without ``lengths`` each type has those of the demand's samples, else the one of its centre.
    """
    return EvaluationModel(
        source=request.source,
        devices=request.devices,
        classes=request.demand.classes,
        lengths=tuple(lengths) or demand_lengths(request.demand),
        levers=replace(levers or SERVED_AS, tiers=request.tiers),
        slo=slo_of(request),
        min_gain=min_gain,
        seed=request.seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCase:
    """A switch to score; picklable.

    ``current`` and ``candidate`` have the routing shares for the expected rates. ``legs``: the way
    from one to the other; ``back``: the way back, when earlier traffic has returned. ``lasts_s``:
    how long the candidate is taken to stay the best.
    """

    inputs: DecisionInput
    current: DeploymentPlan
    candidate: DeploymentPlan
    legs: tuple[RoutedLeg, ...]
    lasts_s: float
    back: tuple[RoutedLeg, ...] = ()

    @property
    def returning(self) -> "SwitchCase | None":
        """The case in which the traffic lasts as long again as it has; ``None`` if it is this."""
        inputs = self.inputs
        if not inputs.before or not 0.0 < inputs.age_s < self.lasts_s:
            return None
        return replace(self, lasts_s=inputs.age_s)


class SwitchScorer:
    """Scores switches and simulates capacities for one evaluation model."""

    def __init__(self, model: EvaluationModel) -> None:
        self._model = model
        # The planner corrects capacities by the observed speeds, so its table is simulated at the
        # speeds of the source.
        self._as_measured = self._simulator = Simulator(model.source)
        self._speeds = _AS_MEASURED
        # What the current plan serves in time: by the seconds at the expected rates, and requests.
        self._kept_for: SwitchCase | None = None
        self._kept: dict[tuple[float, int], Mask] = {}

    @property
    def slo(self) -> Slo:
        """The limits that requests are judged by."""
        return self._model.slo

    def capacities(self, rows: Sequence[ShapePerformance]) -> tuple[ShapePerformance, ...]:
        """The promising rows with simulated capacities; unchanged where there are no limits."""
        model = self._model
        if model.slo == Slo():
            return tuple(rows)
        return simulated_table(
            self._as_measured,
            rows,
            model.lengths,
            devices=model.devices,
            classes=model.classes,
            levers=model.levers,
            slo=model.slo,
            seed=model.seed,
        )

    def score(self, case: SwitchCase) -> SimulatedScore:
        """Score a switch. If a backlog makes all late either way, score it without the backlog.

        Raises OServeError for replicas that cannot be simulated.
        """
        found = self._steady(case)
        best_rps = max(found.current_rps, found.candidate_rps)
        if case.inputs.past and best_rps <= _BACKLOGGED * sum(case.inputs.expected_rps):
            case = replace(case, inputs=replace(case.inputs, past=()))
            found = self._steady(case)
        if found.candidate_rps <= (1.0 + self._model.min_gain) * found.current_rps:
            return found
        if case.returning is not None:
            returning = self._switched(case.returning)
            if returning.net_gain < 0:
                # The rates stay those of the traffic as it is, for the regret of keeping the plan.
                net_gain, lasts_s = returning.net_gain, returning.lasts_s
                return replace(found, net_gain=net_gain, lasts_s=lasts_s)
        return self._switched(case)

    def workload(self, case: SwitchCase) -> EvaluationWorkload:
        """The traffic on which the switch is simulated."""
        model = self._model
        return evaluation_workload(case.inputs, case.lasts_s, model.lengths, seed=model.seed)

    def met(
        self, plan: DeploymentPlan, traffic: SimulatedTraffic, speeds: Speeds = _AS_MEASURED
    ) -> Mask:
        """Which requests replicas of these speeds serve within the limits."""
        self._correct(speeds)
        serving = SimulatedServing(plan=plan, levers=self._model.levers)
        return met(self._simulator.run(serving, traffic, latest_s=self._latest_s), self._model.slo)

    # -- within ---------------------------------------------------------------------------------
    def _steady(self, case: SwitchCase) -> SimulatedScore:
        """Score the candidate as if it had been there all along, until earlier traffic returns."""
        ahead = self.workload(case)
        ahead = replace(ahead, traffic=ahead.traffic.between(0.0, ahead.then_s))
        if not len(ahead.traffic):
            return SimulatedScore(current_rps=0.0, candidate_rps=0.0, net_gain=0.0)
        kept = self._met_without(case, ahead)
        moved = self.met(case.candidate, ahead.traffic, case.inputs.speeds)
        served, more = int((kept & ahead.expected).sum()), _more(moved, kept, ahead.expected)
        return SimulatedScore(
            current_rps=served / ahead.lasting_s,
            candidate_rps=(served + more) / ahead.lasting_s,
            net_gain=more * case.lasts_s / ahead.lasting_s,
        )

    def _switched(self, case: SwitchCase) -> SimulatedScore:
        """Score the switch, and the way back once earlier traffic has returned."""
        ahead = self.workload(case)
        kept = self._met_without(case, ahead)
        moved = self._met_with(case, ahead)
        served = int((kept & ahead.expected).sum())
        # Requests that are under way when the switch begins count, too.
        more, later = _more(moved, kept, ~ahead.later), _more(moved, kept, ahead.later)
        return SimulatedScore(
            current_rps=served / ahead.lasting_s,
            candidate_rps=(served + more) / ahead.lasting_s,
            net_gain=more * case.lasts_s / ahead.lasting_s + later,
            pays_after_s=_pays_after_s(ahead, kept, moved),
            lasts_s=case.lasts_s,
        )

    def _met_without(self, case: SwitchCase, ahead: EvaluationWorkload) -> Mask:
        """The requests that the current plan serves in time; the same for all candidates."""
        key = replace(case, candidate=case.current, legs=(), back=(), lasts_s=0.0)
        if self._kept_for != key:
            self._kept_for, self._kept = key, {}
        course = ahead.lasting_s, len(ahead.traffic)
        if course not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[course] = self.met(case.current, ahead.traffic, case.inputs.speeds)
        return self._kept[course]

    def _met_with(self, case: SwitchCase, ahead: EvaluationWorkload) -> Mask:
        """The requests served in time if the switch begins at the time of the decision.

        The way back begins as soon as the controller may take it.
        """
        self._correct(case.inputs.speeds)
        results = simulate_switches(
            self._simulator,
            SimulatedServing(plan=case.current, levers=self._model.levers),
            [
                TimedSwitch(at_s=ahead.now_s, legs=case.legs),
                TimedSwitch(at_s=ahead.back_s, legs=case.back),
            ],
            ahead.traffic,
            drain_limit_s=case.inputs.drain_limit_s,
            latest_s=self._latest_s,
        )
        return met(results, self._model.slo)

    @property
    def _latest_s(self) -> float:
        """Seconds after the last arrival; without limits, what is not done by then is late."""
        return 0.0 if self._model.slo == Slo() else LATEST_S

    def _correct(self, speeds: Speeds) -> None:
        """Simulate replicas of these speeds from now on."""
        if speeds != self._speeds:
            self._speeds = speeds
            self._simulator = Simulator(corrected(self._model.source, speeds))


def _pays_after_s(ahead: EvaluationWorkload, kept: Mask, moved: Mask) -> float:
    """When the gain has made up for the switch, should the traffic change back after that.

    The cost is the deepest point of the cumulative difference, and what the candidate serves less
    once the earlier rates are back. A time in which a backlog makes all late with the switch and
    without it costs nothing, so it is no reason to wait and let the backlog grow.
    """
    expected = ahead.expected
    gained = np.cumsum(moved[expected].astype(int) - kept[expected].astype(int))
    later = min(0, _more(moved, kept, ahead.later))
    if not len(gained) or gained[-1] + later <= 0:
        return math.inf
    cost = max(0, -int(gained.min())) - later
    return cost * ahead.lasting_s / float(gained[-1])


def demand_lengths(demand: Demand) -> tuple[LengthSamples, ...]:
    """The lengths of each type: those of its samples, else the one of its centre."""
    places = {name: place for place, name in enumerate(demand.tiers)}
    return tuple(
        replace(
            _sampled(demand.samples[kind.name])
            if demand.samples.get(kind.name)
            else _one_length(*demand.centres[kind.name]),
            tier=places.get(kind.tier),
        )
        for kind in demand.types
    )


def _sampled(pairs: Sequence[tuple[int, int]]) -> LengthSamples:
    lengths = np.array(pairs, dtype=np.int64)
    return LengthSamples(prompt_tokens=lengths[:, 0], output_tokens=lengths[:, 1])


def _more(moved: Mask, kept: Mask, among: Mask) -> int:
    """How many requests more are served in time with the switch."""
    return int((moved & among).sum()) - int((kept & among).sum())


def _one_length(prompt_tokens: float, output_tokens: float) -> LengthSamples:
    def whole(tokens: float) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.array([max(1, round(tokens))], dtype=np.int64)

    return LengthSamples(prompt_tokens=whole(prompt_tokens), output_tokens=whole(output_tokens))
