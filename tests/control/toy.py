"""A toy to control: four devices, two types, a shape that suits each, and traffic by the second."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oserve.control.controller import Controller
from oserve.control.decision import Decision, DecisionVerdict, Mode, Reason, Trigger
from oserve.control.evaluation import best_candidate
from oserve.control.loop import ControlLoop
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.policy import ControlPolicy
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.rollout import settled
from oserve.control.tally import Batch
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Observation,
    ReplicaShape,
    ReplicaSpec,
    VirtualClock,
    WorkloadType,
)
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.experts import Combination
from oserve.forecast.forecaster import Forecaster
from oserve.perf import ShapePerformance
from oserve.plan import check_plan
from oserve.sim import Phases, SimulatedCluster

NAMES = ("chat", "docs")
DEVICES = tuple(Device(id=f"d{n}", kind="x") for n in range(4))
START_S = 20.0
TYPES = (
    WorkloadType(name="chat", prompt_tokens=100, output_tokens=200, arrival_rate_rps=1),
    WorkloadType(name="docs", prompt_tokens=4000, output_tokens=100, arrival_rate_rps=1),
)
CLASSES = (LengthClass(name="short", max_prompt_tokens=600), LengthClass(name="long"))


def row(name: int, *capacity: float) -> ShapePerformance:
    return ShapePerformance(
        shape=ReplicaShape(max_num_batched_tokens=name, device_kind="x"),
        capacity_rps=capacity,
        latency_s=(1.0, 2.0),
        power_w=1.0,
    )


TABLE = (row(512, 8.0, 1.0), row(4096, 2.0, 4.0))


def planner(start_s: float = START_S) -> TablePlanner:
    return TablePlanner(
        PlannerFacts(
            devices=DEVICES,
            types=TYPES,
            centres=((100, 200), (4000, 100)),
            classes=CLASSES,
            class_mix={"short": {"chat": 1.0}, "long": {"docs": 1.0}},
            table=TABLE,
            row_of=lambda _spec: None,
            start_s=lambda _spec: start_s,
            min_gain=0.0,
        )
    )


def plan_of(*rows: int) -> DeploymentPlan:
    """A plan with these rows of the table, one on each device."""
    made = planner()
    replicas = tuple(
        ReplicaSpec(id=f"first{n}", shape=TABLE[row].shape, devices=(f"d{n}",))
        for n, row in enumerate(rows)
    )
    plan = DeploymentPlan(id="first", replicas=replicas, length_classes=CLASSES, routing_shares={})
    return made.with_shares(plan, made.shares(replicas, (1.0, 1.0)))


def make_controller(plan: DeploymentPlan, **policy: Any) -> Controller:
    chosen = ControlPolicy(**policy)
    forecaster = Forecaster(Combination(2), NAMES, interval_s=chosen.interval_s)
    return Controller(plan, policy=chosen, forecaster=forecaster, detector=ChangeDetector(NAMES))


Traffic = Callable[[int], Sequence[float]]


@dataclass
class World:
    """A controller at work on a simulated cluster, second by second."""

    controller: Controller
    planner: TablePlanner
    start_s: float = START_S
    devices: tuple[Device, ...] = DEVICES
    decisions: list[Decision] = field(default_factory=list)
    served: float = 0.0

    def __post_init__(self) -> None:
        self.clock = VirtualClock()
        self.cluster = SimulatedCluster(
            self.devices, self.clock, phases=Phases(start_s=self.start_s)
        )
        self.loop = ControlLoop(
            self.cluster, self.clock, self.controller.plan, policy=ReconcilePolicy()
        )
        self.second = 0
        self.seen: Observation | None = None

    async def run(self, traffic: Traffic, seconds: int) -> None:
        """The cluster refuses to give a device twice, so every run checks that."""
        for _ in range(seconds):
            await self.loop.step()
            self.seen = await self.cluster.observe()
            switching = not settled(self.loop.plan, self.seen, frozenset())
            counts = list(traffic(self.second))
            batch = Batch(names=NAMES, arrivals={self.second: counts})
            trigger = self.controller.monitor.observe(self.second + 0.999, [batch])
            if trigger is not None and self.controller.policy.mode is not Mode.OFF:
                self.decide(trigger, switching)
            self.second += 1
            await self.clock.advance(1.0)

    def decide(self, trigger: Trigger, switching: bool) -> None:
        now_s = self.second + 0.999
        question = self.controller.decision_input(now_s)
        weighed = best_candidate(question, self.planner)
        decision = self.controller.decide(
            question, weighed, now_s=now_s, trigger=trigger, switching=switching
        )
        self.decisions.append(decision)
        if decision.verdict is DecisionVerdict.SWITCH:
            check_plan(self.controller.plan, self.devices)
            self.loop.plan = self.controller.plan

    @property
    def switches(self) -> list[Decision]:
        return [item for item in self.decisions if item.verdict is DecisionVerdict.SWITCH]


def make_world(*rows: int, start_s: float = START_S, **policy: Any) -> World:
    defaults: dict[str, Any] = {"interval_s": 20, "min_dwell_s": 60.0, "lasts_s": 600.0}
    controller = make_controller(plan_of(*rows), **{**defaults, **policy})
    return World(controller=controller, planner=planner(start_s), start_s=start_s)


def with_plan_id(plan: DeploymentPlan, name: str) -> DeploymentPlan:
    return replace(plan, id=name)


def waits_its_price(decisions: Sequence[Decision]) -> None:
    """Whoever switches for a gain has missed as much as that costs, and who waits has not."""
    for item in decisions:
        if item.reason in {Reason.GAIN_EXCEEDS_COST, Reason.NOT_LONG_ENOUGH}:
            assert item.pays_after_s is not None
            price = item.pays_after_s * (item.candidate_rps - item.current_rps)
            enough = item.missed_requests >= price * (1 - 1e-9)
            assert enough == (item.reason is Reason.GAIN_EXCEEDS_COST), item
