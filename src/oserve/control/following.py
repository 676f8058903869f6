"""Follows the load on a ladder: which deployment should serve, and what the way there costs.

Pure, and a matter of milliseconds: all scores are in the ladder. All gains and costs have one unit,
the request at its best latency (or energy, by the objective); a request outside its SLO counts
``ladder.MISSED``.

    required load = headroom * max(present load, upper quantile of the forecast until a switch ends)
    gain = rate * (cost of the current deployment - cost of the candidate), per second
    price = sum over waves of rate * seconds * (cost on the devices left - cost on all of them)
            + rate * seconds until their backlog is served * MISSED
            + TOUCHED * requests on the replicas that leave

Upwards, a switch is an insurance: if the current deployment does not hold the required load and
another one does, the switch begins at once, if its price is below what it would save at that load
until the next chance, and at least below a premium. If more load has come already and replicas must
make room for others, capacity is missing meanwhile, and a burst may be over before: then the regret
(the summed gain that the current deployment has cost so far) must have reached the price. Downwards
it is a purchase: the candidate must also hold the highest load of the last while, and the regret
must have reached the price. If no deployment holds, one that attains more must pay in the same way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from oserve.control.evaluation import Leg
from oserve.control.ladder import (
    MISSED,
    Goal,
    Ladder,
    LoadScores,
    Shapes,
    device_count,
    in_words,
    shapes_of,
)
from oserve.control.load_facts import LoadFacts, LoadRates
from oserve.core import DeploymentPlan, ReplicaSpec

PREMIUM = 0.25
"""Holding the SLO is worth at least this much of each request until the next chance to switch."""

# A request on a replica that leaves starts over on another one in the worst case.
TOUCHED = 0.5
# A deployment must attain so much more to be worth a switch where none holds.
_LEAST_ATTAINMENT = 0.03
# A load over a few seconds counts as far as it exceeds chance: so many standard deviations less.
_SIGMAS = 2.0

# Less is the usual wait for the next step, or a burst that the engines take up.
_LONG_WAIT_S = 1.0
# Quantiles of a forecast from fewer steps are guesses.
_FEWEST_STEPS = 5
# A ladder for a mix that is so far off says little of types (see ``Ladder.distance``).
_OTHER_MIX = 0.3
# A backlog counts for so long at most: traffic hardly lasts longer.
_LONGEST_BACKLOG_S = 600.0

Switch = Callable[[Shapes], tuple[DeploymentPlan, Sequence[Leg]]]
"""Places a deployment near the current plan; returns the plan and the legs of the switch to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowPolicy:
    """``headroom``: a factor on the load; ``quantile``: of the forecast.

    ``fall_after_s``: a deployment for less load must hold the highest load of so many seconds.
    """

    goal: Goal
    headroom: float = 1.1
    quantile: float = 0.95
    fall_after_s: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The same as loads of a ladder.

    ``present``: the load now, or over the last seconds as far as that is no chance. ``rate_rps``:
    requests/s that are expected.
    """

    now: float
    present: float
    expected: float
    required: float
    fall_required: float
    rate_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowScore:
    """A candidate and its numbers.

    ``rises``: the current deployment does not hold the required load. ``holds``: the candidate
    does. ``climbs``: it also carries more, so that nothing but a fall leads back. ``foreseen``: the
    current deployment does not hold the expected load with headroom; ``overloaded``: nor the
    present one. ``waits``: requests are seen to wait, or nobody knows. ``known``: the forecast
    rests on a few intervals at least, and the ladder was built for about the present mix.
    ``beside``: all new replicas start on vacant devices. ``current_cost`` and ``candidate_cost``,
    at the expected load, are in requests at the best latency per request. ``gain_per_s``: what the
    switch gains each second; ``risk``: what it would save at the required load until the next
    chance to switch; ``price``: what it costs. ``seconds`` until the last wave is committed.
    """

    plan: DeploymentPlan
    rung: str
    loads: Loads
    rises: bool
    holds: bool
    climbs: bool
    foreseen: bool
    overloaded: bool
    waits: bool
    known: bool
    beside: bool
    current_cost: float
    candidate_cost: float
    gain_per_s: float
    risk: float
    price: float
    seconds: float
    changed: int
    touched: float


def loads_of(ladder: Ladder, facts: LoadFacts, policy: FollowPolicy, *, lead_s: float) -> Loads:
    """The loads to decide on; the forecast counts for ``lead_s`` seconds ahead."""
    now = ladder.load(facts.now)
    present = present_load(
        ladder, now=facts.now, last=facts.last, last_s=facts.last_s, burstiness=facts.burstiness
    )
    ahead = 1 + math.ceil(lead_s / facts.step_s)
    means = [ladder.load(rates) for rates in facts.expected]
    expected = max(sum(means) / len(means), 1e-6) if means else max(now, 1e-6)
    required = policy.headroom * max(present, _upper(ladder, facts, policy, ahead), 1e-6)
    peaks = [policy.headroom * ladder.load(rates) for rates in facts.peaks]
    later = policy.headroom * _upper(ladder, facts, policy, len(means))
    return Loads(
        now=now,
        present=present,
        expected=expected,
        required=required,
        fall_required=max([required, later, *peaks]),
        rate_rps=sum(facts.expected[0]) if facts.expected else sum(facts.now),
    )


def present_load(
    ladder: Ladder,
    *,
    now: LoadRates,
    last: LoadRates,
    last_s: float,
    burstiness: Sequence[float],
) -> float:
    """The load now, or over the last seconds as far as that is neither chance nor a usual burst."""
    loads = ladder.loads_by_type(last)
    counts = [max(1.0, rate * last_s) for rate in last]
    variance = sum(
        load**2 * (1.0 / count + bursts)
        for load, count, bursts in zip(loads, counts, burstiness, strict=True)
    )
    return max(ladder.load(now), sum(loads) - _SIGMAS * math.sqrt(variance))


def _upper(ladder: Ladder, facts: LoadFacts, policy: FollowPolicy, steps: int) -> float:
    """The upper quantile of the mean load over the next steps, where that is highest.

    A ladder's deployments hold a mean load with its chance, so what chance explains of the quantile
    does not count again. Types and steps vary independently.
    """
    pairs = list(zip(facts.expected, facts.upper, strict=True))[:steps]
    if not pairs:
        return 0.0
    deviations = NormalDist().inv_cdf(policy.quantile)
    squares = 0.0
    for mean, high in pairs:
        above = tuple(
            _beyond(most - rate, deviations, rate / facts.step_s)
            for rate, most in zip(mean, high, strict=True)
        )
        squares += sum(load**2 for load in ladder.loads_by_type(above))
    return max(ladder.load(mean) for mean, _ in pairs) + math.sqrt(squares) / len(pairs)


def _beyond(above_rps: float, deviations: float, chance: float) -> float:
    """What a variance by chance does not explain of a rate's distance to its upper quantile."""
    return math.sqrt(max(0.0, max(0.0, above_rps) ** 2 - deviations**2 * chance))


def follow(
    ladder: Ladder,
    facts: LoadFacts,
    policy: FollowPolicy,
    *,
    current: DeploymentPlan,
    switch: Switch,
    lead_s: float,
    drain_limit_s: float = math.inf,
) -> FollowScore | None:
    """The deployment for the load, scored; ``None`` if the current one is not in the ladder.

    ``lead_s``: a switch takes so long at most. ``drain_limit_s``: requests that still run on a
    leaving replica by then move to others.
    """
    mine = shapes_of(current.replicas)
    present = ladder.find(mine)
    if present is None:
        return None
    goal = policy.goal
    loads = loads_of(ladder, facts, policy, lead_s=lead_s)
    at_required = ladder.scores(loads.required)
    rises = present not in at_required.holding(goal)
    expected = max(loads.expected, loads.present) if rises else loads.expected
    rung = ladder.choose(
        goal,
        required=loads.required if rises else loads.fall_required,
        expected=expected,
        near=mine,
    )
    at_expected = ladder.scores(expected)
    chosen = rung.index
    if not rises and facts.watched_s < policy.fall_after_s:
        # The highest load of that time is not known yet.
        chosen = present
    if rises and not rung.holds:
        more = at_required.attainment[chosen] - at_required.attainment[present]
        if more < _LEAST_ATTAINMENT:
            chosen = present
    shapes = ladder.deployments[chosen].shapes
    plan, legs = (current, ()) if chosen == present else switch(shapes)
    now_cost, then_cost = at_expected.cost(present, goal), at_expected.cost(chosen, goal)
    rate_rps = loads.rate_rps * expected / loads.expected
    saved = at_required.cost(present, goal) - at_required.cost(chosen, goal)
    coming = loads.rate_rps * loads.required / loads.expected * lead_s
    price = _price(
        ladder,
        (present, chosen),
        loads,
        goal,
        current=current,
        legs=legs,
        drain_limit_s=drain_limit_s,
    )
    return FollowScore(
        plan=plan,
        rung=in_words(shapes),
        loads=loads,
        rises=rises,
        holds=rung.holds,
        climbs=ladder.capacity(chosen, goal) > ladder.capacity(present, goal),
        foreseen=present not in ladder.scores(policy.headroom * loads.expected).holding(goal),
        overloaded=present not in ladder.scores(loads.present).holding(goal),
        waits=facts.wait_s is None or facts.wait_s >= _LONG_WAIT_S,
        known=(
            facts.watched_s >= _FEWEST_STEPS * facts.step_s
            and ladder.distance(facts.now) <= _OTHER_MIX
        ),
        beside=_held(current.replicas).isdisjoint(_held([s for leg in legs for s in leg.started])),
        current_cost=now_cost,
        candidate_cost=then_cost,
        gain_per_s=rate_rps * (now_cost - then_cost),
        risk=coming * max(PREMIUM, saved),
        price=price.cost,
        seconds=price.seconds,
        changed=sum(len(leg.started) for leg in legs),
        touched=price.touched,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Price:
    cost: float
    seconds: float
    touched: float


def _price(
    ladder: Ladder,
    ends: tuple[int, int],
    loads: Loads,
    goal: Goal,
    *,
    current: DeploymentPlan,
    legs: Sequence[Leg],
    drain_limit_s: float,
) -> _Price:
    """What the waves of a switch from one deployment to another cost; see the module."""
    present, chosen = ends
    devices, later = _devices(current.replicas), device_count(ladder.deployments[chosen].shapes)
    able, able_later = ladder.capacity(present, goal), ladder.capacity(chosen, goal)
    cost = seconds = touched = backlog = 0.0
    load = max(loads.now, loads.expected)
    usual = ladder.scores(load).cost(present, goal)
    stay_s = ladder.stay_s(present, load)
    # What waits for the present deployment waits with or without a switch.
    kept = min(load, able)
    left, there = devices, 0
    for leg in legs:
        away = _devices(leg.leaving)
        going = away + _devices(leg.retired)
        touched += loads.rate_rps * stay_s * going / max(1, devices)
        left -= away
        if leg.started:
            took_s = leg.seconds + (min(stay_s, drain_limit_s) if leg.leaving else 0.0)
            seconds += took_s
            more = _more(ladder, present, load, goal, usual, (devices - away) / devices)
            cost += loads.rate_rps * took_s * more
            serve = able * left / devices + able_later * there / max(1, later)
            backlog = max(0.0, backlog + (kept - serve) * took_s)
        there += _devices(leg.started)
    if backlog > 0:
        spare = max(able_later - kept, backlog / _LONGEST_BACKLOG_S)
        cost += loads.rate_rps * MISSED * backlog / spare
    return _Price(cost=cost + TOUCHED * touched, seconds=seconds, touched=touched)


def _more(
    ladder: Ladder, present: int, load: float, goal: Goal, usual: float, share: float
) -> float:
    """How much more a request costs while only a share of the devices serves."""
    if share <= 0:
        return MISSED
    scores: LoadScores = ladder.scores(load / share)
    return min(MISSED, max(0.0, scores.cost(present, goal) - usual))


def _devices(replicas: Sequence[ReplicaSpec]) -> int:
    return sum(len(spec.devices) for spec in replicas)


def _held(replicas: Sequence[ReplicaSpec]) -> set[str]:
    return {device for spec in replicas for device in spec.devices}
