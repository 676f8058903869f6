"""The gain of each lever: alone on the best homogeneous deployment, and in the final one."""

from dataclasses import replace

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.evaluate.simulator import Routing
from oserve.study.ours import OServeTuner
from oserve.study.tune import MeasuredServing


def lever_capacities(tuner: OServeTuner) -> dict[str, float]:
    """Capacities (rate scales) by lever, ``static-best`` and all together included."""
    best, whole = tuner.best, tuner.everything
    demotion = OverloadPolicy(ttft_s=tuner.scene.slo.ttft_s)
    alone = {
        "chunk budget": tuner.best_chunk,
        "order by prompt length": tuner.race(tuner.reordered(best), best),
        "order by prompt length, freshest first": tuner.race(tuner.ordered(best.serving), best),
        "least work instead of shortest queue": tuner.race(
            [replace(best.serving, levers=replace(best.serving.levers, routing=Routing.LEAST_WORK))]
        ),
        "late choice by prompts owed, demotion": tuner.race(
            [replace(best.serving, levers=replace(best.serving.levers, overload=demotion))], best
        ),
        "late choice by prompts owed or number, demotion": tuner.race(
            tuner.bounded(best.serving), best
        ),
        "different shapes": tuner.race(
            tuner.heterogeneous(best.serving.levers, shares=False), best
        ),
        "different shapes in soft pools": tuner.race(tuner.mixed(best.serving), best),
        "chunk budget and order (static-best-tuned)": tuner.best_tuned,
        "all together": whole,
        "all, told the output lengths": tuner.knowing,
    }
    found = {"static-default": tuner.measure(tuner.default).scale, "static-best": best.scale}
    found |= {f"+ {name}": item.scale for name, item in alone.items()}
    found |= {f"all but {name}": item.scale for name, item in _without(tuner, whole).items()}
    return found


def _without(tuner: OServeTuner, whole: MeasuredServing) -> dict[str, MeasuredServing]:
    levers = whole.serving.levers
    plain = replace(levers.gateway, demote_after_s=None)

    def with_levers(**fields: object) -> MeasuredServing:
        changed = replace(levers, **fields)  # type: ignore[arg-type]
        return tuner.measure(replace(whole.serving, levers=changed), start=whole.scale)

    order = levers.order
    oldest = None if order is None else replace(order, freshest_first_s=0.0)
    return {
        "order": with_levers(order=None),
        **({"freshest first": with_levers(order=oldest)} if oldest != order else {}),
        "bound on requests in flight": with_levers(inflight_per_device=None),
        "late choice by prompts owed, demotion": with_levers(
            gateway=plain, overload=OverloadPolicy()
        ),
        "least work": with_levers(routing=Routing.LEAST_REQUESTS),
    }
