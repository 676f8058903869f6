"""Replay: the decisions of a controller on the seconds that a server recorded.

It runs the server's own code on recorded time. Starts and drains take as long as predicted, since
nothing runs. Other settings show what they would have decided.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from oserve.config import Settings, parse_plan
from oserve.config.policies import control_policy, follow_policy
from oserve.control.decision import Decision, DecisionVerdict, Mode
from oserve.control.planning import planner_for
from oserve.control.runtime import ControllerRuntime
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, OServeError
from oserve.evaluate.ladder_maker import LadderCache, LadderFeed, ladder_model
from oserve.evaluate.switch_scorer import SwitchScorer, model_of
from oserve.evaluate.switch_simulation import SwitchSimulation, simulated_facts
from oserve.startup.deployment import remembered_speeds
from oserve.startup.first_plan import NoStepTimes, find_step_times, plan_request_for
from oserve.startup.saved_state import ReplayContext
from oserve.startup.store import StateStore
from oserve.startup.switch_facts import switch_facts
from oserve.switch.learned import LearnedPhases
from oserve.switching.prices import SwitchPrices


def saved_context(file: Path) -> ReplayContext:
    """The context that the server saved; raises OServeError if the file has none."""
    context = StateStore(file).saved("context", ReplayContext) if file.is_file() else None
    if context is None:
        raise OServeError(
            "it contains no observations of a server",
            place=str(file),
            remedy="give the state.sqlite in a server's state directory",
        )
    return context


def replayed_decisions(
    file: Path, settings: Settings, context: ReplayContext, *, mode: Mode = Mode.AUTO
) -> Iterator[Decision]:
    """Yield the decisions under ``settings``, in order of time."""
    devices = context.devices
    times = find_step_times(settings, devices, context.network)
    if isinstance(times, NoStepTimes):
        raise OServeError(times.reason, place="model", remedy="give its profile")
    request = plan_request_for(
        settings, devices, times, (), demand=context.demand, shapes=context.shapes
    )
    starts = StartTimes(settings.control.start_s)
    learned = LearnedPhases()
    phases = StateStore(file).saved("switches", dict[str, Any])
    if phases is not None:
        learned.restore(phases)
    # The memory of the machine that replays must not matter.
    facts = switch_facts(
        settings,
        devices,
        network=context.network,
        learned=learned,
        available_bytes=lambda: sys.maxsize,
    )
    prices = SwitchPrices(facts)
    planner = planner_for(request, starts, prices.legs)
    # The last speeds that were observed; earlier ones are not saved.
    planner.correct(remembered_speeds(file, request))
    names = [kind.name for kind in planner.facts.types]
    follow = follow_policy(settings, names)
    feed = None
    if follow is not None:
        feed = LadderFeed(LadderCache(ladder_model(request, follow.goal)))
    scorer = (
        SwitchScorer(model_of(request, min_gain=settings.control.min_gain))
        if settings.control.simulate and follow is None
        else None
    )
    if scorer is not None:
        planner.learn(simulated_facts(planner.facts, scorer))
    runtime = ControllerRuntime(
        _first_plan(file),
        policy=replace(control_policy(settings, mode), follow=follow),
        planner=planner,
        starts=starts,
        shares_interval_s=settings.control.shares_interval_s,
        scorer=None if scorer is None else SwitchSimulation(scorer, planner),
    )
    busy_until_s = 0.0
    for second, counts in StateStore(file).seconds():
        if len(counts) != len(names):
            continue
        now_s = second + 0.999
        batch = Batch(names=tuple(names), arrivals={second: counts})
        trigger = runtime.count(now_s, [batch])
        if feed is not None:
            feed.tick(runtime, now_s)
        if trigger is None:
            continue
        decision, _ = runtime.decide(now_s, trigger, switching=now_s < busy_until_s)
        if decision.verdict is DecisionVerdict.SWITCH:
            busy_until_s = now_s + decision.switch_s
        yield decision


def _first_plan(file: Path) -> DeploymentPlan:
    plans = StateStore(file).plans()
    if not plans:
        raise OServeError("it contains no plan", place=str(file), remedy="give another file")
    return parse_plan(plans[0][1], place=str(file))
