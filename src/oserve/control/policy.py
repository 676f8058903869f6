"""What decisions are bound by: modes, guards, margins; and the reason that follows from them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oserve.control.decision import Mode, Reason, Trigger, Verdict
from oserve.control.evaluation import Question, Weighed, signature

HOUR_S = 3600.0


def _nothing(signature: str) -> bool:
    del signature
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """Times in seconds. ``min_gain`` and ``margin`` are ratios.

    A switch must bring ``min_gain`` of what the current plan serves in that time, also after its
    cost (simulations err by that much), and more than ``margin`` times its cost. ``lasts_s`` is how
    long a plan is taken to last before that was seen, ``longest_s`` the most. After
    ``shrink_after_s`` without a request all replicas but ``floor_replicas`` are given up; 0: never.
    A person's plan is held for ``hold_s``. ``now_s`` is what counts as now. ``settle_s``: after a
    change of the traffic, how long its new rates are watched before anything is decided.
    ``drain_limit_s``, ``in_order``: see ``evaluation.Question``.
    """

    mode: Mode = Mode.AUTO
    interval_s: int = 60
    now_s: int = 30
    settle_s: float = 15.0
    min_dwell_s: float = 120.0
    max_switches_per_hour: int = 6
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What else a decision depends on.

    ``switches``: when there were any, in the last hour. ``switching``: the last one is not over, or
    the plan is another than the one that was asked about. ``shrunk``: replicas were given up for
    want of requests. ``watched``: a request was seen. ``held``: a person wants this plan.
    ``missed``: requests that another plan would have served more so far; ``known``: plans of
    which it is known for how long they are the best.
    """

    now_s: float
    trigger: Trigger
    switches: tuple[float, ...]
    switching: bool
    shrunk: bool
    watched: bool
    held: bool
    missed: float = math.inf
    known: Callable[[str], bool] = _nothing


def reason_for(
    policy: ControlPolicy, standing: Standing, question: Question, weighed: Weighed | None
) -> Reason:
    """The first that applies of all reasons, in the order of their strength."""
    if standing.trigger is Trigger.MANUAL and weighed is not None:
        return Reason.MANUAL
    if weighed is None:
        return Reason.NO_PLAN if standing.watched else Reason.NO_DATA
    checks = (
        *_guards(policy, standing, question, weighed),
        *_weights(policy, question, weighed),
        (_too_fresh(standing, weighed), Reason.NOT_LONG_ENOUGH),
        (True, Reason.GAIN_EXCEEDS_COST),
    )
    return next(reason for holds, reason in checks if holds)


def _guards(
    policy: ControlPolicy, standing: Standing, question: Question, weighed: Weighed
) -> Iterator[tuple[bool, Reason]]:
    recent = [at_s for at_s in standing.switches if standing.now_s - at_s < HOUR_S]
    # Who comes back after nobody came must not wait for replicas that were given up.
    dwelling = (
        bool(recent) and standing.now_s - recent[-1] < policy.min_dwell_s and not standing.shrunk
    )
    yield not standing.watched, Reason.NO_DATA
    yield standing.switching, Reason.SWITCH_UNDER_WAY
    same = set(weighed.plan.replicas) == set(question.current.replicas)
    yield same, Reason.SAME_PLAN
    yield standing.held, Reason.HELD
    yield dwelling, Reason.MINIMUM_DWELL
    yield len(recent) >= policy.max_switches_per_hour, Reason.SWITCH_LIMIT


def _weights(
    policy: ControlPolicy, question: Question, weighed: Weighed
) -> Iterator[tuple[bool, Reason]]:
    yield question.shrink_to > 0, Reason.ZERO_TRAFFIC
    need = weighed.current_now_rps * (1 - 1e-6) - 1e-9
    yield weighed.candidate_now_rps < need, Reason.BELOW_PRESENT_NEED
    least = policy.min_gain * weighed.current_rps * weighed.lasts_s
    yield weighed.gain <= max(least, 1e-9), Reason.GAIN_TOO_SMALL
    cost = weighed.cost.requests
    yield weighed.gain <= max(policy.margin * cost, cost + least), Reason.COST_EXCEEDS_GAIN


def _too_fresh(standing: Standing, weighed: Weighed) -> bool:
    """Whether less was missed by now than the switch and the way back cost.

    What has begun just now may be over as soon. Who switches when as much was missed as that costs
    pays at most twice what somebody would who knows the future (ski rental).
    """
    known = standing.known(signature(weighed.plan))
    return not known and standing.missed < weighed.price


def verdict_for(policy: ControlPolicy, trigger: Trigger, reason: Reason) -> Verdict:
    """What comes of a reason in this mode."""
    if reason not in {Reason.GAIN_EXCEEDS_COST, Reason.ZERO_TRAFFIC, Reason.MANUAL}:
        return Verdict.KEEP
    by_itself = policy.mode is Mode.AUTO and trigger is not Trigger.QUESTION
    return Verdict.SWITCH if by_itself or trigger is Trigger.MANUAL else Verdict.ADVISE
