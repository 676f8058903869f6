"""Decisions over again: what a controller makes of seconds that a server observed.

The same code as on the server, on recorded time; starts and drains take what they were assumed to,
since nothing runs. Other settings may be given, to see what they would have decided.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from oserve.app.deployment import remembered_speeds
from oserve.app.switching.prices import SwitchPrices, switch_facts
from oserve.config import Settings, parse_plan
from oserve.config.policies import policy_of
from oserve.control.decision import Decision, Mode, Verdict
from oserve.control.planning import planner_for
from oserve.control.runtime import ControllerRuntime
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, Device, OServeError, ReplicaShape
from oserve.evaluate.switch_simulation import Opinion
from oserve.plan.demand import Demand
from oserve.startup.first_plan import know, planning_question
from oserve.startup.store import StateStore
from oserve.switch.learned import LearnedPhases


def recorded(file: Path) -> dict[str, Any]:
    """What the file says of the server; raises OServeError where it is no such file."""
    context = StateStore(file).memory("context") if file.is_file() else None
    if not isinstance(context, dict):
        raise OServeError(
            "it holds nothing that a server observed",
            place=str(file),
            remedy="give the state.sqlite in a server's state directory",
        )
    return context


def replayed_decisions(
    file: Path, settings: Settings, context: dict[str, Any], *, mode: Mode = Mode.AUTO
) -> Iterator[Decision]:
    """Decisions in their order, as ``settings`` would have them."""
    devices = tuple(msgspec.convert(item, Device) for item in context["devices"])
    demand = msgspec.convert(context["demand"], Demand)
    knowledge = know(settings, devices)
    if knowledge.source is None:
        raise OServeError(knowledge.missing, place="model", remedy="give its profile")
    shapes = tuple(msgspec.convert(item, ReplicaShape) for item in context["shapes"])
    question = planning_question(settings, devices, knowledge, (), demand=demand, shapes=shapes)
    starts = StartTimes(settings.control.start_s)
    learned = LearnedPhases()
    memory = StateStore(file).memory("switches")
    if isinstance(memory, dict):
        learned.restore(memory)
    # The memory of this machine must not matter.
    facts = switch_facts(settings, devices, learned=learned, available_bytes=lambda: sys.maxsize)
    prices = SwitchPrices(facts)
    planner = planner_for(question, starts, prices.legs)
    # As fast as they were last seen to be: how fast at each moment is not kept.
    planner.correct(remembered_speeds(file, question))
    names = [kind.name for kind in planner.facts.types]
    opinion = Opinion(question) if settings.control.simulate else None
    if opinion is not None:
        planner.learn(opinion.refined(planner.facts))
    helm = ControllerRuntime(
        _first_plan(file),
        policy=policy_of(settings, mode),
        planner=planner,
        starts=starts,
        shares_interval_s=settings.control.shares_interval_s,
        scorer=None if opinion is None else opinion.scorer(planner),
    )
    controller = helm.controller
    busy_until_s = 0.0
    for second, counts in StateStore(file).seconds():
        if len(counts) != len(names):
            continue
        now_s = second + 0.999
        batch = Batch(names=tuple(names), arrivals={second: counts})
        trigger = controller.watch.observe(now_s, [batch])
        if trigger is None:
            continue
        asked = controller.ask(now_s)
        decision = controller.judge(
            asked,
            helm.weighed(asked),
            now_s=now_s,
            trigger=trigger,
            switching=now_s < busy_until_s,
        )
        if decision.verdict is Verdict.SWITCH:
            busy_until_s = now_s + decision.switch_s
        yield decision


def _first_plan(file: Path) -> DeploymentPlan:
    plans = StateStore(file).plans()
    if not plans:
        raise OServeError("it holds no plan", place=str(file), remedy="give another file")
    return parse_plan(plans[0][1], place=str(file))
