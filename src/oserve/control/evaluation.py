"""Switch evaluation: what a change of plan gains and costs, in requests.

This is the slow and pure part of a decision. The value of replicas at given rates is the rate that
the linear programme serves within limits. With w the weight of a forecast quantile, t the seconds
of a forecast step, T the time for which the candidate is expected to stay the best and S the
seconds of the switch:

    gain = sum over steps and quantiles of w t (candidate - current) * (T - S) / T,
           at most the gain at HEADROOM times the expected rates
    cost = sum over legs of (current - remaining) * seconds of the leg + TOUCHED * touched

Where replicas serve in order of arrival, the requests that a switch delays form a backlog. Every
later request is late until the new replicas have served the backlog with their spare capacity.
Those requests count as lost. None count if the current plan is past its capacity, since all are
late anyway; all that arrive count if the new plan is.

Traffic may return to what it was. After T the rates ``before`` the last change are taken to return
for ``back_s``, the time until the controller can switch back. What the candidate serves less of
them than the current plan is subtracted from the gain.

A simulation may replace these numbers: see ``SimulatedScore``.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from oserve.control.load_facts import LoadFacts
from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.perf.corrected import Speeds

TypeRates = tuple[float, ...]

# Running requests finish while their replica drains. Each loses its prefix cache and little else.
TOUCHED = 0.05
# Quantile bands are wide just after a change, so gains at unlikely rates do not count.
HEADROOM = 1.05
_SERVES_ALL = 0.99
# Multiples of the expected rates at which the spare capacity of the new replicas is probed.
_SPARE = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A part of a switch: ``leaving`` drain and stop, ``started`` start, then ``retired`` drain.

    ``seconds``: from the end of the leaving replicas to the moment when the started ones serve.
    """

    leaving: tuple[ReplicaSpec, ...] = ()
    started: tuple[ReplicaSpec, ...] = ()
    retired: tuple[ReplicaSpec, ...] = ()
    seconds: float = 0.0


class SwitchPlanner(Protocol):
    """The planner of an evaluation. Rates are requests/s, in the order of the workload types."""

    def candidates(self, rates_rps: TypeRates, current: DeploymentPlan) -> Sequence[DeploymentPlan]:
        """Plans for these rates, the best first, close to the current one; empty if none serves."""
        ...

    def floor(self, rates_rps: TypeRates, current: DeploymentPlan, replicas: int) -> DeploymentPlan:
        """The current plan cut to the ``replicas`` replicas that serve these rates best."""
        ...

    def served_rps(self, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates) -> float:
        """The requests/s that these replicas serve of these rates within limits."""
        ...

    def legs(self, old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> Sequence[Leg]:
        """The switch from one set of replicas to another, leg by leg."""
        ...

    def stay_s(self, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates) -> float:
        """The mean seconds that a request stays on a replica, which is the time to drain it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastStep:
    """One step of the forecast, ``seconds`` long.

    ``probabilities``: of rates. ``expected``: the mean rates; empty if only the former count.
    """

    seconds: float
    probabilities: Mapping[TypeRates, float]
    expected: TypeRates = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionInput:
    """All that one decision is based on.

    ``steps`` of the forecast; the last one lasts as long as needed. ``lasts_s``: how long a
    candidate is expected to stay the best; ``lasting`` has the same by signature, for plans with a
    history. ``plan_for``: rates to make candidates for. ``given``: the operator's plan, evaluated
    in place of candidates. ``version`` counts the plans in force. ``shrink_to``: keep only so many
    replicas; 0: all. ``drain_s``: the least time that draining took so far.
    ``drain_limit_s``: requests that still run by then move to other replicas.
    ``in_order``: replicas serve in order of arrival, so a backlog makes all requests late.
    ``past``: recent rates, each with the seconds that it held, up to now.
    ``before``: the rates before the traffic last changed, empty if it did not; they are taken to
    return for ``back_s``, until the controller can switch back. ``age_s``: of the present traffic.
    ``speeds``: of replicas, observed. ``load``: for a controller that follows a ladder.
    ``unusable``: devices for no plan. ``of_nodes``: decide at once, since these changed.
    """

    at_s: float
    current: DeploymentPlan
    now_rps: TypeRates
    steps: tuple[ForecastStep, ...]
    lasts_s: float
    plan_for: tuple[TypeRates, ...]
    lasting: Mapping[str, float] = field(default_factory=dict)
    version: int = 0
    given: DeploymentPlan | None = None
    shrink_to: int = 0
    drain_s: float = 0.0
    drain_limit_s: float = math.inf
    in_order: bool = False
    past: tuple[tuple[TypeRates, float], ...] = ()
    before: TypeRates = ()
    back_s: float = 0.0
    age_s: float = 0.0
    speeds: Speeds = field(default_factory=Speeds)
    load: LoadFacts | None = None
    unusable: frozenset[str] = frozenset()
    of_nodes: bool = False
    earlier: DeploymentPlan | None = None  # The plan in force before nodes left.

    @property
    def follows(self) -> bool:
        """Whether a ladder decides."""
        return self.load is not None and self.given is None and not self.shrink_to

    @property
    def expected_rps(self) -> TypeRates:
        """The mean rates of the first forecast step."""
        return self.steps[0].expected


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchPrice:
    """The price of one switch: its seconds, started replicas, requests lost and touched."""

    seconds: float = 0.0
    changed: int = 0
    lost: float = 0.0
    touched: float = 0.0

    @property
    def requests(self) -> float:
        """The whole price in requests."""
        return self.lost + TOUCHED * self.touched


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedScore:
    """The simulated score of a switch: requests/s within limits without the switch and with it.

    ``net_gain``: requests that the switch gains after its cost, in the course of the traffic that
    decides. ``lasts_s``: how long the present traffic lasts in that course; ``None``: as long as
    expected. ``pays_after_s``: when the gain has made up for the cost; ``inf`` if it never does.
    """

    current_rps: float
    candidate_rps: float
    net_gain: float
    pays_after_s: float = math.inf
    lasts_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """A candidate and its numbers; the gain is that of ``lasts_s`` seconds.

    ``pays_after_s``: when the gain has made up for the switch and the way back; ``inf`` if it never
    does.
    """

    plan: DeploymentPlan
    lasts_s: float
    current_rps: float
    candidate_rps: float
    current_now_rps: float
    candidate_now_rps: float
    gain: float
    cost: SwitchPrice
    pays_after_s: float = 0.0

    @property
    def net_gain(self) -> float:
        """Requests that the switch gains after its cost."""
        return self.gain - self.cost.requests

    @property
    def break_even_requests(self) -> float:
        """Requests that the candidate must serve more to pay off; ``inf`` if it never does."""
        more_rps = self.candidate_rps - self.current_rps
        return self.pays_after_s * more_rps if more_rps > 0 else math.inf

    def as_simulated(self, score: SimulatedScore) -> "CandidateScore":
        """The same candidate with simulated rates and gain in place of the linear model's."""
        return replace(
            self,
            lasts_s=self.lasts_s if score.lasts_s is None else score.lasts_s,
            current_rps=score.current_rps,
            candidate_rps=score.candidate_rps,
            current_now_rps=score.current_rps,
            candidate_now_rps=score.candidate_rps,
            gain=score.net_gain + self.cost.requests,
            pays_after_s=score.pays_after_s,
        )


def best_candidate(inputs: DecisionInput, planner: SwitchPlanner) -> CandidateScore | None:
    """The candidate with the largest net gain; ``None`` without any."""
    return next(iter(score_candidates(inputs, planner)), None)


def score_candidates(inputs: DecisionInput, planner: SwitchPlanner) -> list[CandidateScore]:
    """All candidates, the one with the largest net gain first."""
    found = (score_candidate(inputs, plan, planner) for plan in _candidates(inputs, planner))
    return sorted(found, key=lambda item: item.net_gain, reverse=True)


def _candidates(inputs: DecisionInput, planner: SwitchPlanner) -> list[DeploymentPlan]:
    if inputs.given is not None:
        return [inputs.given]
    if inputs.shrink_to:
        return [planner.floor(inputs.plan_for[0], inputs.current, inputs.shrink_to)]
    found: dict[frozenset[ReplicaSpec], DeploymentPlan] = {}
    for rates in inputs.plan_for:
        if sum(rates) > 0:
            for plan in planner.candidates(rates, inputs.current):
                found.setdefault(frozenset(plan.replicas), plan)
    return list(found.values())


def score_candidate(
    inputs: DecisionInput, plan: DeploymentPlan, planner: SwitchPlanner
) -> CandidateScore:
    """One candidate against the current plan, by the linear model."""
    old, new = inputs.current.replicas, plan.replicas
    lasts_s = inputs.lasting.get(signature(plan), inputs.lasts_s)
    current, candidate, likely = _served(inputs, old, new, planner, lasts_s=lasts_s)
    price = switch_price(
        old,
        new,
        inputs.steps[0].probabilities,
        planner,
        drain_s=inputs.drain_s,
        drain_limit_s=inputs.drain_limit_s,
    )
    if inputs.in_order:
        late = _late(price.lost, inputs.steps[0], old, new, planner, most_s=lasts_s)
        price = replace(price, lost=price.lost + late)
    more_rps = min(candidate - current, likely)
    missed = _missed_after(inputs, new, planner)
    return CandidateScore(
        plan=plan,
        lasts_s=lasts_s,
        current_rps=current,
        candidate_rps=candidate,
        current_now_rps=planner.served_rps(old, inputs.now_rps),
        candidate_now_rps=planner.served_rps(new, inputs.now_rps),
        gain=more_rps * max(0.0, lasts_s - price.seconds) - missed,
        cost=price,
        pays_after_s=_pays_after_s(more_rps, price, missed),
    )


def _served(
    inputs: DecisionInput,
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    planner: SwitchPlanner,
    *,
    lasts_s: float,
) -> tuple[float, float, float]:
    """Mean requests/s of the old and the new replicas, and the gain at the expected rates."""
    current = candidate = likely = 0.0
    left_s = lasts_s
    for number, step in enumerate(inputs.steps, 1):
        seconds = left_s if number == len(inputs.steps) else min(left_s, step.seconds)
        left_s -= seconds
        if seconds <= 0:
            continue
        for rates_rps, chance in step.probabilities.items():
            part = chance * seconds / lasts_s
            current += part * planner.served_rps(old, rates_rps)
            candidate += part * planner.served_rps(new, rates_rps)
        likely += seconds / lasts_s * _gain_at_expected(step, old, new, planner)
    return current, candidate, likely


def _pays_after_s(more_rps: float, price: SwitchPrice, missed: float) -> float:
    """When ``more_rps`` has made up for a switch and for what is missed after it."""
    if more_rps <= 0:
        return math.inf
    return price.seconds + (price.requests + missed) / more_rps


def _missed_after(
    inputs: DecisionInput, new: Sequence[ReplicaSpec], planner: SwitchPlanner
) -> float:
    """Requests that the new replicas serve less when the rates of before return."""
    if not inputs.before or inputs.back_s <= 0:
        return 0.0
    old_rps = planner.served_rps(inputs.current.replicas, inputs.before)
    return max(0.0, old_rps - planner.served_rps(new, inputs.before)) * inputs.back_s


def _gain_at_expected(
    step: ForecastStep,
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    planner: SwitchPlanner,
) -> float:
    """Requests/s that the new replicas serve more at HEADROOM times the expected rates."""
    if not step.expected:
        return math.inf
    rates = tuple(HEADROOM * rate for rate in step.expected)
    return planner.served_rps(new, rates) - planner.served_rps(old, rates)


def _late(
    backlog: float,
    step: ForecastStep,
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    planner: SwitchPlanner,
    *,
    most_s: float,
) -> float:
    """Requests that arrive while the new replicas serve such a backlog, within ``most_s``."""
    rates = step.expected or max(step.probabilities, key=lambda key: step.probabilities[key])
    rate_rps = sum(rates)
    if backlog <= 0:
        return 0.0
    spare_rps = -1.0
    for factor in _SPARE:
        wanted = tuple(factor * rate for rate in rates)
        if planner.served_rps(new, wanted) < _SERVES_ALL * sum(wanted):
            break
        spare_rps = (factor - 1.0) * rate_rps
    if spare_rps >= 0 and planner.served_rps(old, rates) < _SERVES_ALL * rate_rps:
        return 0.0
    return rate_rps * (min(most_s, backlog / spare_rps) if spare_rps > 0 else most_s)


def signature(plan: DeploymentPlan) -> str:
    """A string that is equal for deployments of equal shapes, regardless of their devices."""
    counts = Counter(repr(spec.shape) for spec in plan.replicas)
    return "; ".join(f"{count} x {shape}" for shape, count in sorted(counts.items()))


def switch_price(
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    rates: Mapping[TypeRates, float],
    planner: SwitchPlanner,
    *,
    drain_s: float = 0.0,
    drain_limit_s: float = math.inf,
) -> SwitchPrice:
    """The price of a switch, leg by leg; ``rates`` with their probabilities.

    Draining takes ``drain_s`` or the stay of a request, whichever is longer, up to the limit. It
    adds to the time of the switch only where new replicas wait for the devices.
    """

    def served(replicas: Sequence[ReplicaSpec]) -> float:
        return sum(
            chance * planner.served_rps(replicas, rates_rps) for rates_rps, chance in rates.items()
        )

    before = served(old)
    there = list(old)
    seconds = lost = touched = 0.0
    changed = 0
    for leg in planner.legs(old, new):
        going = (*leg.leaving, *leg.retired)
        stay_s = 0.0
        if going:
            stay_s = sum(p * planner.stay_s(there, r) for r, p in rates.items())
            stay_s = min(max(stay_s, drain_s), drain_limit_s)
            touched += served(there) * stay_s * len(going) / max(1, len(there))
        left = [spec for spec in there if spec not in leg.leaving]
        if leg.started:
            took_s = leg.seconds + (stay_s if leg.leaving else 0.0)
            seconds += took_s
            lost += max(0.0, before - served(left)) * took_s
        changed += len(leg.started)
        there = [spec for spec in left if spec not in leg.retired] + list(leg.started)
    return SwitchPrice(seconds=seconds, changed=changed, lost=lost, touched=touched)
