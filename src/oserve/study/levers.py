"""The gain of each lever: alone on the best homogeneous deployment, and in the final one.

All settings are searched on the tuner's learned traffic. With a part held out, capacities are those
on that part, under the settings as they were found.
"""

from collections.abc import Mapping
from dataclasses import replace

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import DeploymentPlan
from oserve.evaluate.part_score import ScoredServing
from oserve.evaluate.simulator import (
    Levers,
    Routing,
    SimulatedServing,
    SimulatedTraffic,
    largest_scale,
)
from oserve.evaluate.tuning_run import TuningChoice, TuningRun, run_tuning
from oserve.study.ours import OServeTuner
from oserve.study.tune import MeasuredServing


def lever_servings(tuner: OServeTuner) -> dict[str, MeasuredServing]:
    """What the search finds for each lever, ``static-best`` and all together included."""
    best, whole = tuner.best, tuner.everything
    found = {
        "static-default": tuner.measure(tuner.default),
        "static-best": best,
        "+ chunk budget": tuner.best_chunk,
        "+ order by prompt length": tuner.race(tuner.reordered(best), best),
        "+ order by prompt length, freshest first": tuner.race(tuner.ordered(best.serving), best),
        **{
            f"+ {name}": tuner.measure(replace(best.serving, levers=levers), start=best.scale)
            for name, levers in _alone(tuner, best.serving.levers).items()
        },
        "+ bound by number": tuner.race(tuner.bounded_by_number(best.serving), best),
        "+ late choice by prompts owed, demotion, bound by number": tuner.race(
            tuner.bounded_by_number(_with_demotion(tuner, best.serving)), best
        ),
        "+ different shapes": tuner.race(
            tuner.heterogeneous(best.serving.levers, shares=False), best
        ),
        "+ different shapes in soft pools": tuner.race(tuner.mixed(best.serving), best),
        "+ chunk budget and order (static-best-tuned)": tuner.best_tuned,
        "+ all together": whole,
        "+ all, told the output lengths": tuner.knowing,
    }
    return found | {f"all but {name}": item for name, item in _without(tuner, whole).items()}


def capacities(
    tuner: OServeTuner,
    servings: Mapping[str, MeasuredServing],
    held_out: SimulatedTraffic | None = None,
) -> dict[str, float]:
    """Capacities (rate scales) by lever: as searched, or on the part held out."""
    if held_out is None:
        return {name: item.scale for name, item in servings.items()}
    return {
        name: capacity_on(tuner, item, held_out, knows_outputs="output lengths" in name)
        for name, item in servings.items()
    }


def capacity_on(
    tuner: OServeTuner,
    found: MeasuredServing,
    traffic: SimulatedTraffic,
    *,
    knows_outputs: bool = False,
) -> float:
    """The capacity of a serving on other traffic than it was searched on."""

    def holds(scale: float) -> bool:
        played = traffic.faster(scale)
        expected = played.output_tokens if knows_outputs else None
        return tuner.simulator.holds(found.serving, played, tuner.scene.slo, expected=expected)

    return largest_scale(holds, start=found.scale or 1.0)


def tuned_constants(tuner: OServeTuner, *, hold_out: float) -> TuningRun:
    """The live server's constants for the plan of ``oserve-static``, tuned by time split.

    The present constants are a server's defaults, with demotion by the SLO.
    """
    plan, slo = _everywhere(tuner.everything.serving.plan), tuner.scene.slo
    return run_tuning(
        tuner.simulator,
        tuner.scene.traffic,
        TuningChoice(
            present=DispatchConstants(overload=OverloadPolicy(ttft_s=slo.ttft_s)),
            serving=ScoredServing(plan=plan, slo=slo),
            pooled=False,
            ttft_s=slo.ttft_s,
            hold_out=hold_out,
        ),
    )


def _everywhere(plan: DeploymentPlan) -> DeploymentPlan:
    """The plan with every replica in every pool."""
    equal = {spec.id: 1.0 / len(plan.replicas) for spec in plan.replicas}
    return replace(plan, routing_shares={item.name: equal for item in plan.length_classes})


def _with_demotion(tuner: OServeTuner, serving: SimulatedServing) -> SimulatedServing:
    overload = OverloadPolicy(ttft_s=tuner.scene.slo.ttft_s)
    return replace(serving, levers=replace(serving.levers, overload=overload))


def _alone(tuner: OServeTuner, levers: Levers) -> dict[str, Levers]:
    """Levers that have nothing to search."""
    ttft_s = tuner.scene.slo.ttft_s
    deep = replace(levers.gateway, demote_after_s=ttft_s)
    fresh = OrderPolicy(penalty_s_per_token=0.0, freshest_first_s=300.0)
    return {
        "freshest first alone": replace(levers, order=fresh),
        "least work instead of shortest queue": replace(levers, routing=Routing.LEAST_WORK),
        "late choice by prompts owed, demotion": replace(
            levers, overload=OverloadPolicy(ttft_s=ttft_s)
        ),
        "demotion with deep engine queues": replace(levers, gateway=deep),
    }


def _without(tuner: OServeTuner, whole: MeasuredServing) -> dict[str, MeasuredServing]:
    levers = whole.serving.levers

    def with_levers(**fields: object) -> MeasuredServing:
        changed = replace(levers, **fields)  # type: ignore[arg-type]
        return tuner.measure(replace(whole.serving, levers=changed), start=whole.scale)

    order = levers.order
    oldest = None if order is None else replace(order, freshest_first_s=0.0)
    return {
        "order": with_levers(order=None),
        **({"freshest first": with_levers(order=oldest)} if oldest != order else {}),
        "bound by number": with_levers(inflight_per_device=None),
        "late choice by prompts owed, demotion": with_levers(overload=OverloadPolicy()),
        "least work": with_levers(routing=Routing.LEAST_REQUESTS),
    }
