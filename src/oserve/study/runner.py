"""One policy through one scene: the live control loop over a simulated fleet on a virtual clock.

While a switch is under way the loop takes a round a second, as the live one does; while nothing
changes a round would do nothing (reconcile is level-triggered), so time goes on to the next
decision at once.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.rollout import staged
from oserve.core import Action, DeploymentPlan, Observation, ReplicaSpec, VirtualClock
from oserve.evaluate.simulator import LATEST_S, Ints, Serving, Simulator, Traffic, surely_failed
from oserve.sim.cluster import Life
from oserve.sim.fleet import Fleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.phases import Phases
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.study.door import FreeCluster
from oserve.study.moving import TransferCluster, TransferTimes
from oserve.study.policy import Moment, Policy, Seen, Start, Steering
from oserve.study.scene import Scene

_ROUND_S = 1.0
# Intervals that a policy may look back on when it re-scores plans.
_RECENT_INTERVALS = 3
_CHECKS = 8
FREE = Phases(start_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A switch that was decided: when, and the deployment aimed at (shape names and counts)."""

    at_s: float
    deployment: tuple[tuple[str, int], ...]
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What came of it. ``failed_early``: stopped since its attainment could not be reached."""

    results: FleetResults
    traffic: Traffic
    changes: tuple[Change, ...]
    switches: int
    device_s: float
    energy_j: float
    failed_early: bool = False


def deployment_of(plan: DeploymentPlan) -> tuple[tuple[str, int], ...]:
    """Shape names with their counts."""
    counts: dict[str, int] = {}
    for spec in plan.replicas:
        counts[spec.shape.name] = counts.get(spec.shape.name, 0) + 1
    return tuple(sorted(counts.items()))


def run_policy(
    scene: Scene,
    policy: Policy,
    simulator: Simulator,
    scale: float,
    *,
    judge_only: bool = False,
    traffic: Traffic | None = None,
) -> Run:
    """Serve the scene's traffic ``scale`` times as fast.

    ``judge_only``: end as soon as more requests have missed the SLO than may (5 %).
    """
    played = (scene.traffic if traffic is None else traffic).faster(scale)
    return asyncio.run(
        _Course(scene, policy, simulator, played, scale, judge_only=judge_only).play()
    )


class _Course:
    """One run."""

    def __init__(
        self,
        scene: Scene,
        policy: Policy,
        simulator: Simulator,
        traffic: Traffic,
        scale: float,
        *,
        judge_only: bool,
    ) -> None:
        self._scene, self._policy, self._simulator = scene, policy, simulator
        self._traffic = traffic
        self._judge_only = judge_only
        conduct = policy.conduct
        self._serving: Serving = policy.initial(scale)
        expected = traffic.output_tokens if conduct.knows_outputs else None
        self._requests = simulator.requests(self._serving, traffic, expected=expected)
        self._fleet: Fleet = simulator.fleet(self._serving, self._requests)
        self._clock = VirtualClock()
        self._door = _DOORS[conduct.start](
            self._fleet,
            self._add,
            scene.devices,
            self._clock,
            phases=FREE if conduct.free else scene.phases,
            weights_bytes=scene.weights_bytes,
        )
        if isinstance(self._door, TransferCluster):
            self._door.times = TransferTimes(scene)
        self._target = self._serving.plan
        self._observation: Observation | None = None
        self._loop = ControlLoop(
            self._door,
            self._clock,
            self._target,
            policy=ReconcilePolicy(drain_limit_s=policy.conduct.drain_limit_s),
            interval_s=_ROUND_S,
            observed=self._saw,
            rollout=staged if conduct.staged and not conduct.free else _at_once,
        )
        self._steersman = cast("Steering", policy) if conduct.steers else None
        self._arrived = 0
        self._open: Ints = np.zeros(0, dtype=np.int64)
        self._moving = True
        self._routed: DeploymentPlan | None = None
        self._changes: list[Change] = []
        self._switches = 0
        self._end_s = traffic.duration_s + LATEST_S

    async def play(self) -> Run:
        """From the first request to the end of the last."""
        scene, conduct = self._scene, self._policy.conduct
        self._aim(self._target)
        self._door.warm = True
        await self._loop.step()
        self._door.warm = False
        if self._steersman is not None:
            self._steersman.begin(self._traffic)
        next_decision = scene.interval_s if conduct.decides else np.inf
        checks = [self._traffic.duration_s * (k + 1) / _CHECKS for k in range(_CHECKS)]
        failed = False
        while self._fleet.ended < len(self._traffic) and self._clock.now() < self._end_s:
            now_s = self._clock.now()
            moment = min(next_decision, self._end_s)
            if self._steersman is not None or not self._steady():
                moment = min(moment, now_s + _ROUND_S)
            if self._judge_only and checks:
                moment = min(moment, checks[0])
            if moment >= self._end_s:
                self._fleet.run(limit_s=self._end_s)
                break
            await self._clock.advance(max(0.0, moment - now_s))
            await self._round()
            if self._steersman is not None and moment <= self._traffic.duration_s:
                await self._steer(self._steersman)
            if self._judge_only and checks and moment >= checks[0]:
                checks = [at for at in checks if at > moment]
                failed = surely_failed(self._fleet.results(), scene.slo)
                if failed:
                    break
            if moment >= next_decision:
                next_decision += scene.interval_s
                if moment >= self._traffic.duration_s:
                    next_decision = np.inf
                elif self._steady():
                    await self._decide()
        return self._finish(failed)

    def _add(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        self._simulator.add(self._fleet, spec, self._serving.levers, ready_at_s=ready_at_s)

    def _steady(self) -> bool:
        wanted = set(self._target.replicas)
        alive = {life.spec for life in self._door.lives if life.end_s is None}
        held = alive if not self._policy.conduct.free else alive & wanted
        return self._door.settled and held == wanted

    async def _round(self) -> None:
        """Observe and act; while nothing changes there is nothing to do."""
        moving = not self._steady()
        if moving or self._moving:
            await self._loop.step()
        else:
            self._door.catch_up(self._clock.now())
        self._moving = moving

    def _saw(self, observation: Observation, actions: tuple[Action, ...]) -> None:
        del actions
        self._observation = observation

    async def _steer(self, steersman: Steering) -> None:
        """Tell what came and ended since, and do as is wished."""
        self._observation = await self._door.observe()
        now_s = self._clock.now()
        came = int(np.searchsorted(self._traffic.arrival_s, now_s))
        open_ = np.concatenate([self._open, np.arange(self._arrived, came)])
        over, status = self._fleet.ended_among(open_)
        steer = steersman.second(
            Moment(
                now_s=now_s,
                observation=self._observation,
                came=(self._arrived, came),
                ended=tuple(zip(over.tolist(), status.tolist(), strict=True)),
                plan=self._target,
                switching=not self._steady(),
                queued=self._fleet.queued,
            )
        )
        self._arrived, self._open = came, np.setdiff1d(open_, over, assume_unique=True)
        if steer.plan is not None:
            await self._go(steer.plan)
        if steer.routed is not None and steer.routed is not self._routed:
            self._routed = steer.routed
            self._simulator.route(self._fleet, steer.routed, self._serving.levers)

    async def _decide(self) -> None:
        target = self._policy.decide(self._seen())
        if target is not None:
            await self._go(target)

    async def _go(self, target: DeploymentPlan) -> None:
        moved = set(target.replicas) != set(self._target.replicas)
        self._switches += moved
        self._target = target
        self._aim(target)
        if moved:
            await self._round()

    def _aim(self, plan: DeploymentPlan) -> None:
        self._simulator.route(self._fleet, plan, self._serving.levers)
        self._loop.plan = plan
        self._changes.append(
            Change(at_s=self._clock.now(), deployment=deployment_of(plan), plan=plan)
        )

    def _seen(self) -> Seen:
        now_s, interval_s = self._clock.now(), self._scene.interval_s
        recent_s = min(now_s, _RECENT_INTERVALS * interval_s)
        results = self._fleet.results()
        low, high = np.searchsorted(self._traffic.arrival_s, [now_s - recent_s, now_s])
        ended = results.status[low:high] == Status.COMPLETED
        believed = self._requests.expected_output_tokens[low:high]
        outputs = np.where(ended, self._traffic.output_tokens[low:high], believed)
        recent = Traffic(
            arrival_s=self._traffic.arrival_s[low:high] - (now_s - recent_s),
            prompt_tokens=self._traffic.prompt_tokens[low:high],
            output_tokens=outputs,
        )
        return Seen(
            now_s=now_s,
            recent=recent,
            recent_s=recent_s,
            counts=self._counts(now_s),
            fleet=self._fleet.observe(),
            plan=self._target,
        )

    def _counts(self, now_s: float) -> Ints:
        """Arrivals so far by interval and length class."""
        interval_s = self._scene.interval_s
        classes = len(self._target.workload_types)
        high = int(np.searchsorted(self._traffic.arrival_s, now_s))
        window = (self._traffic.arrival_s[:high] // interval_s).astype(np.int64)
        windows = max(1, round(now_s / interval_s))
        cell = np.minimum(window, windows - 1) * classes + self._requests.class_index[:high]
        return np.bincount(cell, minlength=windows * classes).reshape(windows, classes)

    def _finish(self, failed: bool) -> Run:
        results = self._fleet.results()
        finished = results.finish_s[np.isfinite(results.finish_s)]
        end_s = float(finished.max()) if len(finished) else results.now_s
        device_s, energy_j = _resources(self._simulator, self._door.lives, results, end_s)
        return Run(
            results=results,
            traffic=self._traffic,
            changes=tuple(self._changes),
            switches=self._switches,
            device_s=device_s,
            energy_j=energy_j,
            failed_early=failed,
        )


def _at_once(
    target: DeploymentPlan,
    observation: Observation,
    lost: frozenset[str],
    held: frozenset[str],
) -> DeploymentPlan:
    del observation, lost, held
    return target


_DOORS: Mapping[Start, type[FleetCluster]] = {
    Start.COLD: FleetCluster,
    Start.TRANSFER: TransferCluster,
    Start.FREE: FreeCluster,
}


def _resources(
    simulator: Simulator, lives: Sequence[Life], results: FleetResults, end_s: float
) -> tuple[float, float]:
    """Device-seconds that replicas held, and the joules they drew, up to ``end_s``."""
    device_s = energy_j = 0.0
    # The fleet numbers replicas in the order in which they were started.
    for life, totals in zip(lives, results.totals, strict=True):
        lived_s = max(0.0, min(end_s, life.end_s or end_s) - life.start_s)
        busy = min(1.0, totals.busy_s / lived_s) if lived_s else 0.0
        device_s += lived_s * len(life.spec.devices)
        energy_j += lived_s * simulator.source.power_w(life.spec.shape, busy)
    return device_s, energy_j
