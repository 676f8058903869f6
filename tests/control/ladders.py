"""Ladders by hand, and a controller that follows them on a virtual clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from oserve.control.decision import Decision, DecisionVerdict, Mode, Trigger
from oserve.control.evaluation import Leg
from oserve.control.following import FollowPolicy
from oserve.control.ladder import (
    Goal,
    Ladder,
    LadderDeployment,
    LoadScore,
    Shapes,
    shapes_of,
)
from oserve.control.load_facts import LoadFacts
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.policy import ControlPolicy
from oserve.control.runtime import ControllerRuntime
from oserve.control.shelf import LadderNeed
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Objective,
    ReplicaShape,
    ReplicaSpec,
    WorkloadType,
)
from oserve.perf import ShapePerformance

LATENCY = Goal(objectives=(Objective.LATENCY,))
ENERGY = Goal(objectives=(Objective.ENERGY,))
CAPACITY = Goal(objectives=(Objective.CAPACITY,))

NODES = 2
DEVICES = tuple(Device(id=f"d{n}", kind="x", node=f"n{n // 4}") for n in range(4 * NODES))
CLASSES = (LengthClass(name="all", output_tokens=100),)
SWITCH_S = 10.0


def shape(tensor: int) -> ReplicaShape:
    return ReplicaShape(tensor_parallel_size=tensor, device_kind="x")


def everywhere(tensor: int) -> Shapes:
    """All devices in replicas of this size."""
    return ((shape(tensor), len(DEVICES) // tensor),)


def score(
    load: float,
    attainment: float,
    e2e_s: float = 1.0,
    *,
    p99_s: float | None = None,
    joules: float = 100.0,
    kinds: int = 1,
    by_type: Sequence[float] = (),
) -> LoadScore:
    return LoadScore(
        load=load,
        attainment=attainment,
        type_attainment=tuple(by_type) or (attainment,) * kinds,
        type_e2e_s=(e2e_s,) * kinds,
        p50_e2e_s=e2e_s,
        p99_e2e_s=3.0 * e2e_s if p99_s is None else p99_s,
        p50_ttft_s=0.1,
        p99_ttft_s=0.3,
        joules=joules,
    )


def rung(
    shapes: Shapes, holds: float, e2e_s: float, *, joules: float = 100.0, kinds: int = 1
) -> LadderDeployment:
    """A deployment that holds up to a load, and whose attainment then falls."""
    loads = (0.1, holds, holds + 0.05, holds + 0.3)
    shares = (1.0, 1.0, 0.9, 0.5)
    return LadderDeployment(
        shapes=shapes,
        scores=tuple(
            score(
                load, share, e2e_s * (1.0 + 0.2 * load), joules=joules / (0.2 + load), kinds=kinds
            )
            for load, share in zip(loads, shares, strict=True)
        ),
    )


def ladder_of(*deployments: LadderDeployment, rate_rps: float = 10.0, kinds: int = 1) -> Ladder:
    return Ladder(
        names=tuple(f"type{n}" for n in range(kinds)),
        rates=(rate_rps / kinds,) * kinds,
        work=(1.0,) * kinds,
        loads=(0.1, 0.5, 1.0),
        deployments=deployments,
    )


def three_rungs(**options: Any) -> Ladder:
    """The wider the replicas, the faster their answers and the less load they carry."""
    return ladder_of(
        rung(everywhere(4), 0.4, 1.0, joules=100.0, **options),
        rung(everywhere(2), 0.7, 1.6, joules=80.0, **options),
        rung(everywhere(1), 1.0, 2.5, joules=60.0, **options),
        **options,
    )


def plan_for(shapes: Shapes) -> DeploymentPlan:
    replicas, first = [], 0
    for each, count in shapes:
        for _ in range(count):
            devices = tuple(device.id for device in DEVICES[first : first + each.device_count])
            replicas.append(ReplicaSpec(id=f"first{first}", shape=each, devices=devices))
            first += each.device_count
    return DeploymentPlan(
        id="first", replicas=tuple(replicas), length_classes=CLASSES, routing_shares={}
    )


def waves(old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> list[Leg]:
    """A switch without restarts, one node after the other."""
    found = []
    for node in range(NODES):
        mine = {device.id for device in DEVICES if device.node == f"n{node}"}
        gone = tuple(s for s in old if s not in new and s.devices[0] in mine)
        come = tuple(s for s in new if s not in old and s.devices[0] in mine)
        if gone or come:
            found.append(Leg(started=come, retired=gone, seconds=SWITCH_S))
    return found


def planner(kinds: int = 1) -> TablePlanner:
    types = tuple(
        WorkloadType(name=f"type{n}", prompt_tokens=100, output_tokens=100, arrival_rate_rps=1.0)
        for n in range(kinds)
    )
    return TablePlanner(
        PlannerFacts(
            devices=DEVICES,
            types=types,
            centres=((100.0, 100.0),) * kinds,
            classes=CLASSES,
            class_mix={"all": {kind.name: 1.0 / kinds for kind in types}},
            table=tuple(
                ShapePerformance(
                    shape=shape(tensor),
                    capacity_rps=(float(tensor),) * kinds,
                    latency_s=(1.0,) * kinds,
                    power_w=1.0,
                )
                for tensor in (1, 2, 4)
            ),
            row_of=lambda _spec: None,
            start_s=lambda _spec: 30.0,
            legs=waves,
        )
    )


# Placing takes longer than all else in these tests, so what they found is kept.
PLANNERS = (planner(1), planner(2))

Load = Callable[[int], float]


@dataclass
class Follower:
    """A controller on a virtual clock; switches take as long as their legs say."""

    runtime: ControllerRuntime
    rate_rps: float = 10.0
    kinds: int = 1
    decisions: list[Decision] = field(default_factory=list)
    second: int = 1000
    busy_until_s: float = 0.0

    def run(self, load: Load, seconds: int, *, seed: int | None = 0) -> None:
        """``load`` by second since the first; without a seed requests come evenly."""
        draw = np.random.default_rng(seed)
        names = self.runtime.controller.names
        for _ in range(seconds):
            mean = max(0.0, load(self.second - 1000)) * self.rate_rps / self.kinds
            counts = [
                mean if seed is None else float(draw.poisson(mean)) for _ in range(self.kinds)
            ]
            now_s = self.second + 0.999
            batch = Batch(names=names, arrivals={self.second: counts})
            self.tick(self.runtime.count(now_s, [batch]), now_s)
            self.second += 1

    def tick(self, trigger: Trigger | None, now_s: float) -> None:
        if trigger is None:
            return
        decision, _ = self.runtime.decide(now_s, trigger, switching=now_s < self.busy_until_s)
        self.decisions.append(decision)
        if decision.verdict is DecisionVerdict.SWITCH:
            self.busy_until_s = now_s + decision.switch_s

    @property
    def switches(self) -> list[Decision]:
        return [item for item in self.decisions if item.verdict is DecisionVerdict.SWITCH]

    @property
    def shapes(self) -> Shapes:
        return shapes_of(self.runtime.controller.plan.replicas)

    def step(self, load: LoadFacts, seconds: float) -> Decision:
        """Decide once on these facts, without any counting."""
        controller = self.runtime.controller
        controller.monitor.last_arrival_s = float(self.second)
        self.second += round(seconds)
        now_s = float(self.second)
        inputs = replace(controller.decision_input(now_s), load=load)
        decision = controller.decide(
            inputs,
            self.runtime.evaluate(inputs),
            now_s=now_s,
            trigger=Trigger.INTERVAL,
            switching=now_s < self.busy_until_s,
        )
        self.decisions.append(decision)
        if decision.verdict is DecisionVerdict.SWITCH:
            self.busy_until_s = now_s + decision.switch_s
        return decision


def facts(
    *rates: float,
    coming: float | None = None,
    upper: float | None = None,
    peak: float | None = None,
    last: float | None = None,
    steps: int = 5,
) -> LoadFacts:
    """Rates by type now; the others, if given, are sums, in the same mix."""
    whole = sum(rates)

    def spread(total: float | None) -> tuple[float, ...]:
        if total is None:
            return rates
        return tuple(total * (rate / whole if whole > 0 else 1 / len(rates)) for rate in rates)

    return LoadFacts(
        now=rates,
        last=spread(last),
        last_s=10.0,
        expected=(spread(coming),) * steps,
        upper=(spread(coming if upper is None else upper),) * steps,
        step_s=20.0,
        peaks=(spread(peak),),
        mix=rates,
        mix_s=600.0,
        burstiness=(0.0,) * len(rates),
        watched_s=3600.0,
    )


def learn(runtime: ControllerRuntime, ladder: Ladder) -> None:
    """Give a runtime a ladder, as if it had asked for it."""
    shapes = shapes_of(runtime.controller.plan.replicas)
    need = LadderNeed(
        mix=ladder.rates,
        present=shapes,
        speeds=runtime.planner.speeds,
        burstiness=(0.0,) * len(ladder.rates),
        work=ladder.work,
    )
    runtime.learn_ladder(need, ladder)


def follower(
    shapes: Shapes,
    ladder: Ladder | None = None,
    *,
    goal: Goal = LATENCY,
    follow: FollowPolicy | None = None,
    **policy: Any,
) -> Follower:
    kinds = len(goal.objectives)
    settings = ControlPolicy(
        **{"interval_s": 20, **policy}, follow=follow or FollowPolicy(goal=goal, fall_after_s=300.0)
    )
    runtime = ControllerRuntime(
        plan_for(shapes),
        policy=replace(settings, mode=policy.get("mode", Mode.AUTO)),
        planner=PLANNERS[kinds - 1],
        starts=StartTimes(30.0),
        shares_interval_s=5.0,
    )
    if ladder is not None:
        learn(runtime, ladder)
    return Follower(runtime=runtime, kinds=kinds)
