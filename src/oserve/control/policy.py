"""The limits of decisions: modes, guards and margins, and the reason that follows from them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oserve.control.decision import DecisionVerdict, Mode, Reason, Trigger
from oserve.control.evaluation import CandidateScore, DecisionInput, signature
from oserve.control.following import FollowPolicy, FollowScore

HOUR_S = 3600.0
# A load beyond the plan's for so long counts, also if no request waits.
_LASTING_S = 120.0
_SWITCHES = {
    Reason.GAIN_EXCEEDS_COST,
    Reason.ZERO_TRAFFIC,
    Reason.MANUAL,
    Reason.LOAD_RISES,
    Reason.OBJECTIVE_GAINS,
    Reason.NODES_CHANGED,
}


def _no_history(signature: str) -> bool:
    del signature
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """Settings of the controller. Times are seconds, ``min_gain`` and ``margin`` ratios.

    A switch must gain ``min_gain`` of what the current plan serves in that time, also after its
    cost (simulations err by that much), and more than ``margin`` times its cost. ``lasts_s``: how
    long a plan without history is taken to stay the best, ``longest_s`` the most. After
    ``shrink_after_s`` without a request the controller stops all replicas but ``floor_replicas``;
    0: never. An operator's plan stays for ``hold_s``. ``now_s``: the window of current rates.
    ``settle_s``: how long the controller watches new rates after a change before it decides.
    ``drain_limit_s``, ``in_order``: see ``evaluation.DecisionInput``. ``follow``: how to follow the
    load on a ladder; ``None``: the objective is capacity alone.
    """

    mode: Mode = Mode.AUTO
    interval_s: int = 60
    now_s: int = 30
    settle_s: float = 15.0
    min_dwell_s: float = 120.0
    max_switches_per_hour: int = 12
    min_gain: float = 0.05
    margin: float = 1.5
    lasts_s: float = 900.0
    longest_s: float = 3600.0
    shrink_after_s: float = 0.0
    floor_replicas: int = 1
    hold_s: float = 1800.0
    decisions: int = 200
    drain_limit_s: float = 600.0
    in_order: bool = False
    follow: FollowPolicy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionContext:
    """The state of the controller that a decision depends on.

    ``switches``: the times of switches in the last hour; ``falls``: of those that were no climb.
    ``switching``: the last switch has not ended, or the plan is no longer the one of the input.
    ``shrunk``: replicas were stopped for lack of requests. ``watched``: at least one request
    arrived. ``held``: an operator's plan is in force. ``missed``: the switch regret, in requests;
    ``known``: whether the history tells how long a plan stays the best.
    """

    now_s: float
    trigger: Trigger
    switches: tuple[float, ...]
    switching: bool
    shrunk: bool
    watched: bool
    held: bool
    missed: float = math.inf
    known: Callable[[str], bool] = _no_history
    falls: tuple[float, ...] = ()


def reason_for(
    policy: ControlPolicy,
    context: DecisionContext,
    inputs: DecisionInput,
    score: CandidateScore | None,
) -> Reason:
    """The first reason that applies, the strongest first."""
    if context.trigger is Trigger.MANUAL and score is not None:
        return Reason.MANUAL
    if score is None:
        return Reason.NO_PLAN if context.watched else Reason.NO_DATA
    if inputs.of_nodes:
        return _reason_of_nodes(policy, context, inputs, score)
    checks = (
        *_guards(policy, context, inputs, score),
        *_margins(policy, inputs, score),
        (_too_early(context, score), Reason.NOT_LONG_ENOUGH),
        (True, Reason.GAIN_EXCEEDS_COST),
    )
    return next(reason for holds, reason in checks if holds)


def _guards(
    policy: ControlPolicy, context: DecisionContext, inputs: DecisionInput, score: CandidateScore
) -> Iterator[tuple[bool, Reason]]:
    recent = [at_s for at_s in context.switches if context.now_s - at_s < HOUR_S]
    # The first requests after an idle time must not wait for the replicas that were stopped.
    dwelling = (
        bool(recent) and context.now_s - recent[-1] < policy.min_dwell_s and not context.shrunk
    )
    yield not context.watched, Reason.NO_DATA
    yield context.switching, Reason.SWITCH_UNDER_WAY
    same = set(score.plan.replicas) == set(inputs.current.replicas)
    yield same, Reason.SAME_PLAN
    yield context.held, Reason.HELD
    yield dwelling, Reason.MINIMUM_DWELL
    yield len(recent) >= policy.max_switches_per_hour, Reason.SWITCH_LIMIT


def _margins(
    policy: ControlPolicy, inputs: DecisionInput, score: CandidateScore
) -> Iterator[tuple[bool, Reason]]:
    yield inputs.shrink_to > 0, Reason.ZERO_TRAFFIC
    need = score.current_now_rps * (1 - 1e-6) - 1e-9
    yield score.candidate_now_rps < need, Reason.BELOW_PRESENT_NEED
    least = policy.min_gain * score.current_rps * score.lasts_s
    yield score.gain <= max(least, 1e-9), Reason.GAIN_TOO_SMALL
    cost = score.cost.requests
    yield score.gain <= max(policy.margin * cost, cost + least), Reason.COST_EXCEEDS_GAIN


def _reason_of_nodes(
    policy: ControlPolicy, context: DecisionContext, inputs: DecisionInput, score: CandidateScore
) -> Reason:
    """The same where nodes left or came back: neither dwell nor regret counts.

    Replicas that only come in addition need no gain.
    """
    present, planned = set(inputs.current.replicas), set(score.plan.replicas)
    checks = (
        (context.switching, Reason.SWITCH_UNDER_WAY),
        (present == planned, Reason.SAME_PLAN),
        (context.held, Reason.HELD),
        (present < planned, Reason.NODES_CHANGED),
        *_margins(policy, inputs, score),
        (True, Reason.NODES_CHANGED),
    )
    return next(reason for holds, reason in checks if holds)


def follow_reason_for(
    policy: ControlPolicy,
    context: DecisionContext,
    inputs: DecisionInput,
    score: FollowScore | None,
) -> Reason:
    """The first reason that applies, where the controller follows a ladder."""
    if score is None:
        return Reason.NO_LADDER if context.watched else Reason.NO_DATA
    least = policy.min_gain * score.current_cost * score.loads.rate_rps
    recent = [at_s for at_s in context.switches if context.now_s - at_s < HOUR_S]
    dwelling = bool(recent) and context.now_s - recent[-1] < policy.min_dwell_s
    # Each climb follows a fall, so a limit of falls is one of both.
    falls = [at_s for at_s in context.falls if context.now_s - at_s < HOUR_S]
    climbs = score.rises and score.climbs
    urgent = climbs and score.overloaded and score.gain_per_s > least
    likely = score.holds or score.foreseen
    steady = score.beside or not score.overloaded
    insured = climbs and likely and steady and score.known and score.price <= score.risk
    same = set(score.plan.replicas) == set(inputs.current.replicas)
    better = score.gain_per_s > max(least, 1e-9) or (score.rises and score.holds)
    checks = (
        (not context.watched and not inputs.of_nodes, Reason.NO_DATA),
        (context.switching, Reason.SWITCH_UNDER_WAY),
        (same and score.overloaded, Reason.OVERLOADED),
        (same, Reason.SAME_PLAN),
        (context.held, Reason.HELD),
        (inputs.of_nodes, Reason.NODES_CHANGED if better else Reason.GAIN_TOO_SMALL),
        # More load than the current plan holds waits for no dwell.
        (insured or (urgent and context.missed >= score.price), Reason.LOAD_RISES),
        (urgent, Reason.NOT_LONG_ENOUGH),
        (dwelling and not context.shrunk, Reason.MINIMUM_DWELL),
        (len(falls) >= policy.max_switches_per_hour, Reason.SWITCH_LIMIT),
        # Another deployment that holds, but carries no more: their types could take turns.
        (score.rises and score.holds and not score.climbs, Reason.LOAD_RISES),
        (score.gain_per_s <= max(least, 1e-9), Reason.GAIN_TOO_SMALL),
        (context.missed < policy.margin * score.price, Reason.NOT_LONG_ENOUGH),
        (True, Reason.OBJECTIVE_GAINS),
    )
    return next(reason for holds, reason in checks if holds)


def is_absorbed(score: FollowScore, now_s: float, *, since_s: float) -> bool:
    """Whether more load arrives than the plan holds for long, and yet no request waits.

    ``since_s``: when that began; negative if it did not. What misses its limits without waiting
    shows later: such a load counts once it lasts.
    """
    age_s = now_s - since_s if since_s >= 0 else 0.0
    return score.overloaded and not score.waits and age_s < _LASTING_S


def _too_early(context: DecisionContext, score: CandidateScore) -> bool:
    """Whether the regret is still below the cost of the switch and the way back.

    A change may end as suddenly as it began. A controller that switches once the regret equals the
    cost pays at most twice the cost of one that knows the future (ski rental).
    """
    known = context.known(signature(score.plan))
    return not known and context.missed < score.break_even_requests


def verdict_for(policy: ControlPolicy, trigger: Trigger, reason: Reason) -> DecisionVerdict:
    """The verdict for a reason in this mode."""
    if reason not in _SWITCHES:
        return DecisionVerdict.KEEP
    automatic = policy.mode is Mode.AUTO and trigger is not Trigger.QUESTION
    if automatic or trigger is Trigger.MANUAL:
        return DecisionVerdict.SWITCH
    return DecisionVerdict.ADVISE
