"""Disaggregated prefill and decode: splits of the devices, raced like any other lever.

The gateway routes requests to prefill replicas, which compute the prompts. Then the KV cache goes
over the links of the devices to the decode replica with the least work.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import OServeError, Role
from oserve.evaluate.simulator import Levers, SimulatedServing
from oserve.plan.packing import Packing
from oserve.sim.types import Status
from oserve.study.scene import USUAL_CHUNK
from oserve.study.tune import MeasuredServing, Tuner

PREFILL_SHARES = (0.25, 0.5, 0.75)
"""Shares of prefill replicas that are tried."""

PREFILL_CHUNKS = (USUAL_CHUNK, 8192)


def split(tuner: Tuner, levers: Levers) -> Iterable[SimulatedServing]:
    """Every form with every split, and with usual and large chunks for prefill."""
    for form in tuner.forms([USUAL_CHUNK]):
        count = Packing(tuner.scene.devices, [form]).largest(0)
        for share in PREFILL_SHARES:
            prompts = round(share * count)
            if not 0 < prompts < count:
                continue
            decode = replace(form, role=Role.DECODE)
            for chunk in PREFILL_CHUNKS:
                prefill = replace(form, role=Role.PREFILL, max_num_batched_tokens=chunk)
                wanted = [(prefill, prompts), (decode, count - prompts)]
                yield tuner.deployed(wanted, levers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOutcome:
    """A deployment, its capacity (a rate scale), and P99s in seconds at one common scale."""

    deployment: str
    capacity_scale: float
    p99_ttft_s: float
    p99_tpot_s: float
    p99_e2e_s: float


def apart(tuner: Tuner, *, scale: float) -> dict[str, SplitOutcome]:
    """The best split alone, with an order, and with demotion."""
    best = tuner.best
    bare = _best(tuner, split(tuner, best.serving.levers))
    found = {"static-best": best, "prefill and decode apart": bare}
    if bare.scale > 0.0:
        ordered = tuner.race(tuner.reordered(bare), bare)
        found["apart, by prompt length"] = ordered
        overload = OverloadPolicy(ttft_s=tuner.scene.slo.ttft_s)
        demoted = [
            replace(item.serving, levers=replace(item.serving.levers, overload=overload))
            for item in (bare, ordered)
        ]
        found["apart, demotion"] = _best(tuner, demoted)
    found["static-best-tuned"] = tuner.best_tuned
    return {name: _told(tuner, item, scale) for name, item in found.items()}


def _best(tuner: Tuner, candidates: Iterable[SimulatedServing]) -> MeasuredServing:
    """The best of the candidates; capacity 0 where none meets the SLO at any rate."""
    tried = list(candidates)
    try:
        return tuner.race(tried)
    except OServeError:
        return MeasuredServing(serving=tried[0], scale=0.0)


def _told(tuner: Tuner, found: MeasuredServing, scale: float) -> SplitOutcome:
    results = tuner.simulator.run(found.serving, tuner.scene.learned.faster(scale))
    done = results.status == Status.COMPLETED
    ttft = (results.first_token_s - results.arrival_s)[done]
    e2e = (results.finish_s - results.arrival_s)[done]
    tpot = ((e2e - ttft) / np.maximum(1, results.made_tokens[done] - 1))[
        results.made_tokens[done] > 1
    ]
    return SplitOutcome(
        deployment=found.serving.plan.id,
        capacity_scale=found.scale,
        p99_ttft_s=float(np.quantile(ttft, 0.99)),
        p99_tpot_s=float(np.quantile(tpot, 0.99)),
        p99_e2e_s=float(np.quantile(e2e, 0.99)),
    )
