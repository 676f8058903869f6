"""Policies that change the deployment: OServe with switching, reload, and the oracle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from oserve.core import DeploymentPlan, WorkloadType
from oserve.evaluate.attainment import met
from oserve.evaluate.simulator import (
    SimulatedServing,
    SimulatedTraffic,
)
from oserve.perf.table import ShapePerformance
from oserve.plan.deploy import place_deployment
from oserve.plan.place import place_replicas
from oserve.plan.planning import deployment_plan
from oserve.plan.problem import PlanProblem
from oserve.plan.search import Planned, plan_deployment
from oserve.study.ours import OServeTuner
from oserve.study.policy import Conduct, PolicyStart, PolicyView

_SOLVE_S = 5.0
# With fewer recent requests no decision is made.
_ENOUGH = 20
# A plan must gain this share of the goodput before its cost is considered.
_LEAST_GAIN = 0.02


def window_types(tuner: OServeTuner, seen: PolicyView) -> tuple[WorkloadType, ...]:
    """Return the scene's workload types at the rates of the recent requests (last value)."""
    scene = tuner.scene
    model_types = scene.demand.types
    centres = np.log1p([[kind.prompt_tokens, kind.output_tokens] for kind in model_types])
    points = np.log1p(np.stack([seen.recent.prompt_tokens, seen.recent.output_tokens], axis=1))
    index = np.argmin(((points[:, None, :] - centres[None]) ** 2).sum(axis=2), axis=1)
    counts = np.bincount(index, minlength=len(model_types))
    return tuple(
        replace(kind, arrival_rate_rps=float(count) / seen.recent_s)
        for kind, count in zip(model_types, counts, strict=True)
    )


def goodput(tuner: OServeTuner, serving: SimulatedServing, traffic: SimulatedTraffic) -> float:
    """Return how many requests of a short trace meet the SLO, on warm replicas."""
    return float(met(tuner.simulator.run(serving, traffic), tuner.scene.slo).sum())


def switch_cost(tuner: OServeTuner, seen: PolicyView, target: DeploymentPlan) -> float:
    """Return how many requests miss their SLO while changed replicas load, at the recent rate.

    Devices of changed replicas serve nothing while they load; their share of the requests counts as
    lost, which is what happens near capacity.
    """
    now = set(seen.plan.replicas)
    changed = [spec for spec in target.replicas if spec not in now]
    scene = tuner.scene
    devices = len(scene.devices)
    rate = len(seen.recent) / max(seen.recent_s, 1.0)
    away_s = sum(
        len(spec.devices) * scene.phases.load_s(scene.weights_bytes(spec.shape)) for spec in changed
    )
    return rate * away_s / devices


def replaced(
    tuner: OServeTuner, serving: SimulatedServing, current: DeploymentPlan
) -> DeploymentPlan:
    """Return the deployment of a serving, placed so that common replicas stay."""
    placed = place_replicas(serving.shapes, tuner.scene.devices, current=current)
    shares = serving.plan.routing_shares
    if not shares:
        return replace(serving.plan, replicas=placed.replicas)
    by_shape: dict[object, list[str]] = {}
    for spec in placed.replicas:
        by_shape.setdefault(spec.shape, []).append(spec.id)
    shape_of = {spec.id: spec.shape for spec in serving.plan.replicas}
    renamed: dict[str, dict[str, float]] = {}
    for kind, row in shares.items():
        total: dict[object, float] = {}
        for name, share in row.items():
            total[shape_of[name]] = total.get(shape_of[name], 0.0) + share
        renamed[kind] = {
            name: share / len(by_shape[shape])
            for shape, share in total.items()
            for name in by_shape[shape]
        }
    return replace(serving.plan, replicas=placed.replicas, routing_shares=renamed)


@dataclass(slots=True, kw_only=True)
class Switching:
    """Plans each interval for last-value rates; switches only if that pays within ``horizon_s``.

    Candidates are the linear programme's plan for the recent rates, and ``library``: deployments
    that did well in tuning. Each is simulated on the recent requests, and so is the present plan.
    """

    tuner: OServeTuner
    serving: SimulatedServing
    library: Sequence[SimulatedServing]
    horizon_s: float
    conduct: Conduct = field(default_factory=Conduct)

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        if len(seen.recent) < _ENOUGH:
            return None
        levers = self.serving.levers
        stay = goodput(self.tuner, SimulatedServing(plan=seen.plan, levers=levers), seen.recent)
        if stay >= len(seen.recent) * (1.0 - _LEAST_GAIN):
            return None
        best: tuple[float, DeploymentPlan] | None = None
        for plan in self._candidates(seen):
            gain = (
                goodput(self.tuner, SimulatedServing(plan=plan, levers=levers), seen.recent) - stay
            )
            worth = gain / seen.recent_s * self.horizon_s
            if not self.conduct.free:
                worth -= switch_cost(self.tuner, seen, plan)
            if (
                worth > 0
                and gain > _LEAST_GAIN * len(seen.recent)
                and (best is None or worth > best[0])
            ):
                best = (worth, plan)
        return None if best is None else best[1]

    def _candidates(self, seen: PolicyView) -> list[DeploymentPlan]:
        plans = [replaced(self.tuner, item, seen.plan) for item in self.library]
        planned = programme_plan(self.tuner, seen)
        if planned is not None:
            plans.append(planned)
        return [plan for plan in plans if set(plan.replicas) != set(seen.plan.replicas)]


def programme_plan(tuner: OServeTuner, seen: PolicyView) -> DeploymentPlan | None:
    """Return the linear programme's best plan for the recent rates, close to the present one."""
    found = planned_for(tuner, seen)
    if found is None:
        return None
    problem, planned = found
    return deployment_plan(tuner.question, place_deployment(problem, planned.best))


def planned_for(tuner: OServeTuner, seen: PolicyView) -> tuple[PlanProblem, Planned] | None:
    """Return the search's result for the recent rates; ``None`` if no request arrived.

    Of each form (tensor and pipeline parallel size, precision, kind) only the chunk budget and
    sequences that serve these rates best alone are candidates; more would take seconds to solve.
    """
    types = window_types(tuner, seen)
    if sum(kind.arrival_rate_rps for kind in types) <= 0:
        return None
    problem = tuner.planned.problem
    best: dict[tuple[object, ...], tuple[float, ShapePerformance]] = {}
    for option in problem.options:
        shape = option.shape
        form = (
            shape.tensor_parallel_size,
            shape.pipeline_parallel_size,
            shape.precision,
            shape.device_kind,
        )
        scale = scale_alone(option, types)
        if form not in best or scale > best[form][0]:
            best[form] = (scale, option)
    options = tuple(option for _, option in best.values())
    problem = replace(problem, types=types, options=options, current=seen.plan)
    return problem, plan_deployment(problem, candidates=0, time_limit_s=_SOLVE_S)


def scale_alone(option: ShapePerformance, types: Sequence[WorkloadType]) -> float:
    """Return the multiple of the rates that one replica serves: 1 / sum of rate / capacity."""
    load = 0.0
    for kind, capacity in zip(types, option.capacity_rps, strict=True):
        if kind.arrival_rate_rps > 0:
            load += kind.arrival_rate_rps / capacity if capacity > 0 else math.inf
    return 1.0 / load if load > 0 else 0.0


@dataclass(slots=True, kw_only=True)
class Reload:
    """Reloads the best homogeneous deployment for last-value rates, by the linear model.

    All replicas stop and start cold at once, each interval that predicts a gain of ``min_gain``.
    """

    tuner: OServeTuner
    serving: SimulatedServing
    min_gain: float = 0.1
    conduct: Conduct = field(default_factory=lambda: Conduct(decides=True, staged=False))

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        if len(seen.recent) < _ENOUGH:
            return None
        types = window_types(self.tuner, seen)
        problem = self.tuner.planned.problem
        devices = len(problem.devices)
        scales = {
            option.shape: scale_alone(option, types) * (devices // option.shape.device_count)
            for option in problem.options
            if option.shape.precision is self.tuner.scene.precision
        }
        best = max(scales, key=lambda shape: (scales[shape], repr(shape)))
        running = scales.get(seen.plan.replicas[0].shape, 0.0)
        if scales[best] < running * (1 + self.min_gain):
            return None
        return replaced(self.tuner, self.tuner.homogeneous(best, self.serving.levers), seen.plan)


@dataclass(slots=True, kw_only=True)
class Oracle:
    """Knows the requests of the next interval and all output lengths; switches cost nothing.

    Not a strict bound: it chooses the best of its ``library`` for each interval by itself, with the
    levers of the best static setting.
    """

    tuner: OServeTuner
    serving: SimulatedServing
    library: Sequence[SimulatedServing]
    conduct: Conduct = field(
        default_factory=lambda: Conduct(decides=True, start=PolicyStart.FREE, knows_outputs=True)
    )
    _traffic: SimulatedTraffic | None = None

    def initial(self, scale: float) -> SimulatedServing:
        self._traffic = self.tuner.scene.traffic.faster(scale)
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        if self._traffic is None:
            return None
        coming = self._traffic.between(seen.now_s, seen.now_s + self.tuner.scene.interval_s)
        if not len(coming):
            return None
        levers = self.serving.levers
        stay = goodput(self.tuner, SimulatedServing(plan=seen.plan, levers=levers), coming)
        best, chosen = stay + _LEAST_GAIN * len(coming), None
        for item in self.library:
            if best >= len(coming):
                break
            plan = replaced(self.tuner, item, seen.plan)
            got = goodput(self.tuner, SimulatedServing(plan=plan, levers=levers), coming)
            if got > best:
                best, chosen = got, plan
        return chosen
