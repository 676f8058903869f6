"""What a change of plan would bring and cost, in requests: the slow and pure part of a decision.

The value of replicas at given rates is what the linear programme serves within limits. With
w the weight of a forecast quantile, t the seconds of a step of the forecast, T the time that the
candidate is expected to be the best and S the seconds of the switch:

    gain = sum over steps and quantiles of w t (candidate - current) * (T - S) / T,
           at most what it is at HEADROOM times the expected rates
    cost = sum over legs of (current - what is left) * seconds of the leg + TOUCHED * touched

Where requests are served in order of arrival, what was missing waits before all that comes, and
everybody is late until the new replicas have worked it off with the capacity that they can spare.
That many count as lost, too: none if the current plan is past its capacity, so that all are late
anyway, and all that come if the new one is.

What has lasted for a while may end as suddenly as it began: after T the rates ``before`` the last
change are taken to come back, and for ``back_s``, until there can be a way back, the candidate must
serve them. What it serves less of them than the current plan is taken off the gain.

Planner, value and times are passed in; nothing here knows where they come from.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.perf.corrected import Speeds

Rates = tuple[float, ...]

# Draining lets running requests end, so that each loses its place in a cache and little else.
TOUCHED = 0.05
# What only rare rates would bring is not counted on: bands are wide when traffic has just changed.
HEADROOM = 1.05
_SERVES_ALL = 0.99
# Multiples of the rates at which it is looked how much the new replicas can spare.
_SPARE = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A part of a switch: ``leaving`` drain and go, ``started`` come up, then ``retired`` drain.

    ``seconds``: from when those that leave are gone until those that start serve.
    """

    leaving: tuple[ReplicaSpec, ...] = ()
    started: tuple[ReplicaSpec, ...] = ()
    retired: tuple[ReplicaSpec, ...] = ()
    seconds: float = 0.0


class Appraiser(Protocol):
    """What the controller must be told. Rates are requests/s, in the order of its types."""

    def candidates(self, rates_rps: Rates, current: DeploymentPlan) -> Sequence[DeploymentPlan]:
        """Plans for these rates, best first, close to the current one; empty where none serves."""
        ...

    def floor(self, rates_rps: Rates, current: DeploymentPlan, replicas: int) -> DeploymentPlan:
        """The current plan less all but so many replicas, those that serve these rates best."""
        ...

    def served_rps(self, replicas: Sequence[ReplicaSpec], rates_rps: Rates) -> float:
        """What these replicas serve of these rates within limits."""
        ...

    def legs(self, old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> Sequence[Leg]:
        """The way from one set of replicas to another."""
        ...

    def stay_s(self, replicas: Sequence[ReplicaSpec], rates_rps: Rates) -> float:
        """Seconds that a request stays on a replica, on average: what draining takes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Of the forecast: ``seconds`` in which each of these rates has a chance (they sum to 1).

    ``expected``: the mean rates; empty where only the chances count.
    """

    seconds: float
    chances: Mapping[Rates, float]
    expected: Rates = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a decision is to be made on.

    ``steps`` of the forecast; the last goes on for as long as is asked. ``lasts_s`` is how long a
    candidate is expected to be the best, ``lasting`` the same where it is known, by signature.
    ``plan_for`` are rates to make candidates for. ``given`` is a candidate that a person wants
    weighed instead. ``version`` counts the plans that were in force. ``shrink_to``: leave only so
    many replicas; 0: no. ``drain_s``: what draining a replica takes at least, by what was seen;
    ``drain_limit_s``: by then all that still runs goes on elsewhere.
    ``in_order``: requests are served in order of arrival, so that a backlog makes all late.
    ``past``: rates of late with the seconds that each held, up to now.
    ``before``: the rates before the traffic last changed, empty where it did not; they are taken to
    come back in the end, for ``back_s`` until the plan can follow.
    ``speeds``: how fast replicas were seen to be.
    """

    at_s: float
    current: DeploymentPlan
    now_rps: Rates
    steps: tuple[Step, ...]
    lasts_s: float
    plan_for: tuple[Rates, ...]
    lasting: Mapping[str, float] = field(default_factory=dict)
    version: int = 0
    given: DeploymentPlan | None = None
    shrink_to: int = 0
    drain_s: float = 0.0
    drain_limit_s: float = math.inf
    in_order: bool = False
    past: tuple[tuple[Rates, float], ...] = ()
    before: Rates = ()
    back_s: float = 0.0
    speeds: Speeds = field(default_factory=Speeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchCost:
    """Of one switch: its seconds, replicas that start, and requests lost and touched."""

    seconds: float = 0.0
    changed: int = 0
    lost: float = 0.0
    touched: float = 0.0

    @property
    def requests(self) -> float:
        """The whole cost."""
        return self.lost + TOUCHED * self.touched


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A candidate with its numbers; rates served are averages over ``lasts_s``.

    ``pays_after_s``: when what it brings has made up for the switch and the way back; else
    ``inf``.
    """

    plan: DeploymentPlan
    lasts_s: float
    current_rps: float
    candidate_rps: float
    current_now_rps: float
    candidate_now_rps: float
    gain: float
    cost: SwitchCost
    pays_after_s: float = 0.0

    @property
    def worth(self) -> float:
        """Requests that the switch brings after its cost."""
        return self.gain - self.cost.requests

    @property
    def price(self) -> float:
        """Requests that the candidate serves more until it has paid; ``inf`` if it never does."""
        more_rps = self.candidate_rps - self.current_rps
        return self.pays_after_s * more_rps if more_rps > 0 else math.inf


def appraise(question: Question, appraiser: Appraiser) -> Weighed | None:
    """The candidate that is worth most after its cost; ``None`` where the planner has none."""
    return next(iter(appraised(question, appraiser)), None)


def appraised(question: Question, appraiser: Appraiser) -> list[Weighed]:
    """All candidates, that which is worth most after its cost first."""
    found = [weigh(question, plan, appraiser) for plan in _candidates(question, appraiser)]
    return sorted(found, key=lambda item: item.worth, reverse=True)


def _candidates(question: Question, appraiser: Appraiser) -> list[DeploymentPlan]:
    if question.given is not None:
        return [question.given]
    if question.shrink_to:
        rates = question.plan_for[0]
        return [appraiser.floor(rates, question.current, question.shrink_to)]
    found: dict[frozenset[ReplicaSpec], DeploymentPlan] = {}
    for rates in question.plan_for:
        if sum(rates) > 0:
            for plan in appraiser.candidates(rates, question.current):
                found.setdefault(frozenset(plan.replicas), plan)
    return list(found.values())


def weigh(question: Question, plan: DeploymentPlan, appraiser: Appraiser) -> Weighed:
    """One candidate against the current plan."""
    old, new = question.current.replicas, plan.replicas
    lasts_s = question.lasting.get(signature(plan), question.lasts_s)
    current = candidate = 0.0
    likely = 0.0
    left_s = lasts_s
    for number, step in enumerate(question.steps, 1):
        seconds = left_s if number == len(question.steps) else min(left_s, step.seconds)
        left_s -= seconds
        for rates_rps, chance in step.chances.items() if seconds > 0 else ():
            part = chance * seconds / lasts_s
            current += part * appraiser.served_rps(old, rates_rps)
            candidate += part * appraiser.served_rps(new, rates_rps)
        if seconds > 0:
            likely += seconds / lasts_s * _more(step, old, new, appraiser)
    cost = switch_cost(
        old,
        new,
        question.steps[0].chances,
        appraiser,
        drain_s=question.drain_s,
        drain_limit_s=question.drain_limit_s,
    )
    if question.in_order:
        late = _late(cost.lost, question.steps[0], old, new, appraiser, most_s=lasts_s)
        cost = replace(cost, lost=cost.lost + late)
    more_rps = min(candidate - current, likely)
    missed = _missed_after(question, new, appraiser)
    return Weighed(
        plan=plan,
        lasts_s=lasts_s,
        current_rps=current,
        candidate_rps=candidate,
        current_now_rps=appraiser.served_rps(old, question.now_rps),
        candidate_now_rps=appraiser.served_rps(new, question.now_rps),
        gain=more_rps * max(0.0, lasts_s - cost.seconds) - missed,
        cost=cost,
        pays_after_s=pays_after_s(more_rps, cost, missed),
    )


def pays_after_s(more_rps: float, cost: SwitchCost, missed: float) -> float:
    """When so many requests/s more have made up for a switch and what is missed after it."""
    if more_rps <= 0:
        return math.inf
    return cost.seconds + (cost.requests + missed) / more_rps


def _missed_after(question: Question, new: Sequence[ReplicaSpec], appraiser: Appraiser) -> float:
    """Requests that the new replicas serve less when the rates of before come back."""
    if not question.before or question.back_s <= 0:
        return 0.0
    old_rps = appraiser.served_rps(question.current.replicas, question.before)
    return max(0.0, old_rps - appraiser.served_rps(new, question.before)) * question.back_s


def _more(
    step: Step,
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    appraiser: Appraiser,
) -> float:
    """Requests/s that the new replicas serve more, with headroom over the expected rates."""
    if not step.expected:
        return float("inf")
    rates = tuple(HEADROOM * rate for rate in step.expected)
    return appraiser.served_rps(new, rates) - appraiser.served_rps(old, rates)


def _late(
    backlog: float,
    step: Step,
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    appraiser: Appraiser,
    *,
    most_s: float,
) -> float:
    """Requests that come while a backlog of so many is worked off, within ``most_s``."""
    rates = step.expected or max(step.chances, key=lambda key: step.chances[key])
    rate_rps = sum(rates)
    if backlog <= 0:
        return 0.0
    spare_rps = -1.0
    for factor in _SPARE:
        wanted = tuple(factor * rate for rate in rates)
        if appraiser.served_rps(new, wanted) < _SERVES_ALL * sum(wanted):
            break
        spare_rps = (factor - 1.0) * rate_rps
    if spare_rps >= 0 and appraiser.served_rps(old, rates) < _SERVES_ALL * rate_rps:
        return 0.0
    return rate_rps * (min(most_s, backlog / spare_rps) if spare_rps > 0 else most_s)


def signature(plan: DeploymentPlan) -> str:
    """The same for deployments of the same shapes, wherever these run."""
    counts = Counter(repr(spec.shape) for spec in plan.replicas)
    return "; ".join(f"{count} x {shape}" for shape, count in sorted(counts.items()))


def switch_cost(
    old: Sequence[ReplicaSpec],
    new: Sequence[ReplicaSpec],
    rates: Mapping[Rates, float],
    appraiser: Appraiser,
    *,
    drain_s: float = 0.0,
    drain_limit_s: float = math.inf,
) -> SwitchCost:
    """Of going from one set of replicas to another leg by leg; ``rates`` with their chances.

    Draining takes ``drain_s``, or the stay of a request if that is longer, up to its limit. It
    costs time only where others wait for the devices.
    """

    def served(replicas: Sequence[ReplicaSpec]) -> float:
        return sum(
            chance * appraiser.served_rps(replicas, rates_rps)
            for rates_rps, chance in rates.items()
        )

    before = served(old)
    there = list(old)
    seconds = lost = touched = 0.0
    changed = 0
    for leg in appraiser.legs(old, new):
        going = (*leg.leaving, *leg.retired)
        stay_s = 0.0
        if going:
            stay_s = sum(p * appraiser.stay_s(there, r) for r, p in rates.items())
            stay_s = min(max(stay_s, drain_s), drain_limit_s)
            touched += served(there) * stay_s * len(going) / max(1, len(there))
        left = [spec for spec in there if spec not in leg.leaving]
        if leg.started:
            took_s = leg.seconds + (stay_s if leg.leaving else 0.0)
            seconds += took_s
            lost += max(0.0, before - served(left)) * took_s
        changed += len(leg.started)
        there = [spec for spec in left if spec not in leg.retired] + list(leg.started)
    return SwitchCost(seconds=seconds, changed=changed, lost=lost, touched=touched)
