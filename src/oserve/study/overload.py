"""A deployment under overload, with different defences.

Loads are multiples of two capacities of the same deployment. The *SLO capacity* is the largest rate
at which 95 % of all requests meet the SLO with its own levers. In a bursty trace it is well below
the *steady throughput*, which is what the deployment completes per second while all engines are
busy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.evaluate.attainment import met
from oserve.evaluate.simulator import (
    Floats,
    Levers,
    Mask,
    SimulatedServing,
    class_indices,
)
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.study.tune import MeasuredServing, Tuner, by_length

PLAIN = "first come, first served"
OWN = "its own order"
DEEP = "demotion, deep engine queues"
_PENALTY_S = 5.0
_WINDOW_S = 300.0
# So fast that all requests arrive at the start.
_FLOOD = 50.0
# The part of a flood in which all replicas are busy.
_STEADY = (0.1, 0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadOutcome:
    """The outcome of one defence at one load.

    ``goodput_rps``: requests per second within the SLO. ``p99_ttft_s``: of the served requests.
    ``shed``: the share of requests that were shed. ``met_by_class``: the share within the SLO, by
    length class.
    """

    goodput_rps: float
    p99_ttft_s: float
    shed: float
    met_by_class: tuple[float, ...]
    shed_by_class: tuple[float, ...]


def defences(tuner: Tuner, serving: SimulatedServing) -> dict[str, Levers]:
    """Levers by name. Shedding refuses requests that have waited for the whole TTFT limit."""
    own = serving.levers
    ttft_s = tuner.scene.slo.ttft_s
    plain = replace(own, order=None)
    fresh = replace(own, order=by_length(_PENALTY_S, freshest_first_s=_WINDOW_S))
    demote = OverloadPolicy(ttft_s=ttft_s)
    shed = OverloadPolicy(ttft_s=ttft_s, shed_after_s=ttft_s)
    deep = replace(plain.gateway, demote_after_s=ttft_s)
    found = {PLAIN: plain, DEEP: replace(plain, gateway=deep)}
    if own.order is not None:
        found[OWN] = own
    found |= {
        "demotion": replace(plain, overload=demote),
        "demotion and shedding": replace(plain, overload=shed),
        "freshest first": fresh,
        "freshest first and demotion": replace(fresh, overload=demote),
        "freshest first, demotion, shedding": replace(fresh, overload=shed),
    }
    if own.order is not None:
        found["its own order, demotion, shedding"] = replace(own, overload=shed)
    return found


def loaded(
    tuner: Tuner, serving: SimulatedServing, levers: Levers, scale: float
) -> OverloadOutcome:
    """Serve the learned traffic ``scale`` times as fast."""
    traffic = tuner.scene.learned.faster(scale)
    results = tuner.simulator.run(replace(serving, levers=levers), traffic)
    good = met(results, tuner.scene.slo)
    refused = results.status == Status.SHED
    classes = class_indices(serving.plan.length_classes, traffic.prompt_tokens)
    members = [classes == index for index in range(len(serving.plan.length_classes))]
    waited = results.first_token_s - results.arrival_s
    return OverloadOutcome(
        goodput_rps=float(good.sum()) / max(traffic.duration_s, 1.0),
        p99_ttft_s=_quantile(waited[np.isfinite(waited)], 0.99),
        shed=float(refused.mean()),
        met_by_class=tuple(_share(good, own) for own in members),
        shed_by_class=tuple(_share(refused, own) for own in members),
    )


def goodput_at_capacity(tuner: Tuner, found: MeasuredServing) -> float:
    """The goodput in requests/s at the SLO capacity."""
    return loaded(tuner, found.serving, found.serving.levers, found.scale).goodput_rps


def steady_scale(tuner: Tuner, serving: SimulatedServing) -> float:
    """The steady throughput, as a rate scale of the learned traffic."""
    traffic = tuner.scene.learned
    flood = replace(traffic, arrival_s=traffic.arrival_s / (_FLOOD * tuner.best.scale))
    plain = replace(serving, levers=replace(serving.levers, order=None))
    done = _finished(tuner.simulator.run(plain, flood, latest_s=float("inf")))
    first, last = (int(share * len(done)) for share in _STEADY)
    return (last - first) / float(done[last] - done[first]) / traffic.rate_rps


def table(
    tuner: Tuner, found: MeasuredServing, scales: Sequence[float]
) -> Mapping[str, Sequence[OverloadOutcome]]:
    """The outcome of each defence at each rate scale."""
    return {
        name: [loaded(tuner, found.serving, levers, scale) for scale in scales]
        for name, levers in defences(tuner, found.serving).items()
    }


def _finished(results: FleetResults) -> Floats:
    done: Floats = np.sort(results.finish_s[results.status == Status.COMPLETED])
    return done


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else float("nan")


def _share(which: Mask, among: Mask) -> float:
    return float(which[among].mean()) if among.any() else float("nan")
