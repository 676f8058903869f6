"""What the control plane of a large cluster costs, and how soon it goes on without lost nodes.

    .venv/bin/python benchmarks/nodes/plane.py [--nodes 128] [--lose 16] [--gateways 4] [--json]

Nodes of eight devices are simulated behind the cluster interface, on a virtual clock; everything
above it is the server's own code: the judgement of nodes, the control loop, the controller with
its planner, the status document, the routing table, and the hub's replies to gateway processes.
The lines to the nodes (heartbeats, engines' metrics) are not part of it. Some nodes lose power at
the same time, and get it back later. Reported are, of the server's side,

- CPU per simulated second by part, and the bytes of the hub's replies,
- simulated seconds from the loss until no replica on a lost node is routed to,
- and until the decision, with the CPU time and the wall time that the decision itself took,
- simulated seconds until the new plan serves, and from the end of the hold-down to full use.

Capacities are invented but plausible: wide replicas suit long prompts. Times are of one core.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import msgspec

from oserve.control.decision import DecisionVerdict, Trigger
from oserve.control.loop import ControlLoop
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.policy import ControlPolicy
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.rollout import settled
from oserve.control.routing import routing_table
from oserve.control.runtime import ControllerRuntime
from oserve.control.starts import StartTimes
from oserve.control.status import gauges, status_document
from oserve.control.tally import Batch
from oserve.core import (
    Action,
    DeploymentPlan,
    Device,
    LengthClass,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    VirtualClock,
    WorkloadType,
)
from oserve.gateway.process.messages import HubReply
from oserve.gateway.process.packed_table import packed
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.perf import ShapePerformance
from oserve.sim import Faults, Phases, SimulatedCluster
from oserve.sim.phases import NodeLoss

NODE_SIZE = 8
ROUND_S = 0.5
REPLIES_PER_S = 10
START_S = 40.0
LOSS_S, BACK_S, END_S = 60.0, 200.0, 420.0
CLASSES = (
    LengthClass(name="short", max_prompt_tokens=600),
    LengthClass(name="long"),
)
TYPES = (("short", 250.0, 200.0), ("long", 4000.0, 150.0))
LOAD = 0.8


def table() -> tuple[ShapePerformance, ...]:
    """Rows for widths, depths and chunk budgets."""
    rows = []
    for width, depth, chunk in product((1, 2, 4, 8), (1, 2), (512, 2048, 8192)):
        size = width * depth
        speed = size * width**-0.25 * depth**-0.12
        short = 4.0 * speed * (1.0 if chunk < 4096 else 0.9)
        long = 0.5 * speed * (0.85 if chunk < 1024 else 1.0) * (1.15 if width >= 4 else 1.0)
        rows.append(
            ShapePerformance(
                shape=ReplicaShape(
                    tensor_parallel_size=width,
                    pipeline_parallel_size=depth,
                    max_num_batched_tokens=chunk,
                    device_kind="gpu",
                ),
                capacity_rps=(short if size > 1 else 0.0, long if size > 2 else 0.0),
                latency_s=(4.0 / width**0.7, 9.0 / width**0.7),
                power_w=350.0 * size,
            )
        )
    return tuple(rows)


@dataclass
class Plane:
    """The server's side of a cluster of ``nodes`` nodes, ``lose`` of which lose power."""

    nodes: int
    lose: int
    gateways: int
    clock: VirtualClock = field(default_factory=VirtualClock)
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seen: dict[str, Any] = field(default_factory=dict)
    reply_bytes: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.devices = tuple(
            Device(id=f"n{node:03}/gpu:{n}", kind="gpu", node=f"n{node:03}")
            for node in range(self.nodes)
            for n in range(NODE_SIZE)
        )
        # Neighbours, such as a rack, hold replicas of one shape.
        self.lost = {f"n{node:03}" for node in range(self.lose)}
        self.planner = TablePlanner(
            PlannerFacts(
                devices=self.devices,
                types=tuple(
                    WorkloadType(
                        name=name, prompt_tokens=prompt, output_tokens=output, arrival_rate_rps=1.0
                    )
                    for name, prompt, output in TYPES
                ),
                centres=tuple((prompt, output) for _, prompt, output in TYPES),
                classes=CLASSES,
                class_mix={name: {name: 1.0} for name, _, _ in TYPES},
                table=table(),
                row_of=lambda _spec: None,
                start_s=lambda _spec: START_S,
            )
        )
        whole = self.nodes * NODE_SIZE
        self.rates = (LOAD * whole * 1.8, LOAD * whole * 0.18)
        empty = DeploymentPlan(id="none", replicas=(), length_classes=CLASSES, routing_shares={})
        plan = self.planner.candidates(self.rates, empty)[0]
        self.cluster = SimulatedCluster(
            self.devices,
            self.clock,
            phases=Phases(start_s=START_S),
            faults=Faults(
                node_losses=tuple(
                    NodeLoss(node=name, at_s=LOSS_S, back_s=BACK_S) for name in sorted(self.lost)
                )
            ),
        )
        self.cluster.warm = True
        self.policy = ReconcilePolicy()
        self.loop = ControlLoop(
            self.cluster, self.clock, plan, policy=self.policy, observed=self._publish
        )
        self.runtime = ControllerRuntime(
            plan,
            policy=ControlPolicy(),
            planner=self.planner,
            starts=StartTimes(START_S),
            shares_interval_s=5.0,
        )
        self.observation: Observation | None = None

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began_s = time.process_time()
        yield
        self.cpu_s[part] += time.process_time() - began_s

    async def run(self) -> None:
        """Rounds until the end; a decision takes no simulated time."""
        second = 0
        while self.clock.now() < END_S:
            before_s = sum(self.cpu_s.values())
            began_s = time.process_time()
            await self.loop.step()
            inside_s = sum(self.cpu_s.values()) - before_s
            self.cpu_s["judge, reconcile"] += time.process_time() - began_s - inside_s
            self.cluster.warm = False
            self.rounds += 1
            if self.clock.now() >= second:
                self._count(second)
                second += 1
            await self.clock.advance(ROUND_S)

    def _publish(self, observation: Observation, _actions: tuple[Action, ...]) -> None:
        self.observation = observation
        now_s, plan = self.clock.now(), self.loop.plan
        with self._timed("shares"):
            routed = self.runtime.routed(plan, observation, now_s)
        with self._timed("table"):
            routes = routing_table(routed, observation, ordered=True, expected=True)
        with self._timed("status"):
            document = status_document(plan, observation, self.policy, model="m", version="0")
            snapshot = ClusterSnapshot(
                status=msgspec.Raw(msgspec.json.encode(document)), gauges=gauges(observation)
            )
        changed = routes != self.seen.get("routes")
        self.seen["routes"] = routes
        with self._timed("hub"):
            for number in range(round(REPLIES_PER_S * ROUND_S) * self.gateways):
                first = changed and number < self.gateways
                whole = self.rounds % 10 == 0 and number < self.gateways
                reply = HubReply(
                    version=1,
                    counted=0,
                    snapshot=snapshot if whole else ClusterSnapshot(),
                    table=packed(routes) if first else None,
                    whole=whole,
                )
                self.reply_bytes += len(msgspec.json.encode(reply))
        self._watch(observation, {item.id for item in routes.replicas})

    def _watch(self, observation: Observation, routed: set[str]) -> None:
        """Note when something happened first."""
        now_s, plan = self.clock.now(), self.loop.plan
        on_lost = {
            spec.id
            for spec in self.seen.setdefault("first", plan).replicas
            if any(device.split("/")[0] in self.lost for device in spec.devices)
        }
        if now_s >= LOSS_S and not routed & on_lost:
            self.seen.setdefault("routed_around_s", now_s - LOSS_S)
        ready = sum(
            len(state.spec.devices)
            for state in observation.replicas
            if state.phase is ReplicaPhase.READY
        )
        if now_s <= LOSS_S:
            self.seen["devices_before"] = ready
        at_plan = settled(self.loop.nodes.runnable(plan, observation), observation, frozenset())
        if "decided_s" in self.seen and at_plan:
            self.seen.setdefault("new_plan_serves_s", now_s - LOSS_S)
        if now_s >= BACK_S + 60.0 and at_plan and plan is not self.seen["first"]:
            self.seen.setdefault("devices_after", ready)
        if now_s > BACK_S and ready >= self.seen["devices_before"]:
            self.seen.setdefault("full_after_return_s", now_s - BACK_S)

    def _count(self, second: int) -> None:
        names = self.runtime.controller.names
        batch = Batch(names=names, arrivals={second: list(self.rates)})
        assert self.observation is not None
        with self._timed("count"):
            trigger = self.runtime.observe(second + 0.9, (batch,), self.observation)
        if trigger is not Trigger.NODE:
            return
        began_s, wall_s = time.process_time(), time.perf_counter()
        decision, _ = self.runtime.decide(second + 0.9, trigger)
        took = (time.process_time() - began_s, time.perf_counter() - wall_s)
        key = "decided" if self.planner.unusable else "returned"
        if f"{key}_s" not in self.seen:
            since_s = LOSS_S if key == "decided" else BACK_S
            self.seen[f"{key}_s"] = self.clock.now() - since_s
            self.seen[f"{key}_cpu_s"], self.seen[f"{key}_wall_s"] = took
            self.seen[f"{key}_devices"] = len(self.planner.devices)
            self.seen[f"{key}_line"] = decision.line
        if decision.verdict is DecisionVerdict.SWITCH:
            self.loop.plan = self.runtime.controller.plan

    def report(self) -> dict[str, Any]:
        """All figures as JSON values."""
        per_s = {part: round(took / END_S, 5) for part, took in sorted(self.cpu_s.items())}
        found = {key: value for key, value in self.seen.items() if key not in {"routes", "first"}}
        return {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "nodes": self.nodes,
            "replicas": len(self.seen["first"].replicas),
            "rounds": self.rounds,
            "cpu_share_by_part": per_s,
            "cpu_share": round(sum(per_s.values()), 4),
            "gateways": self.gateways,
            "hub_bytes_per_s": round(self.reply_bytes / END_S),
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in sorted(found.items())},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=128)
    parser.add_argument("--lose", type=int, default=16)
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plane = Plane(nodes=options.nodes, lose=options.lose, gateways=options.gateways)
    asyncio.run(plane.run())
    report = plane.report()
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        return
    for key, value in report.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
