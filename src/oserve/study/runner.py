"""One policy through one scene: the live control loop over a simulated fleet on a virtual clock.

During a switch the loop runs a round a second, as the live one does. While nothing changes a round
would do nothing (reconcile is level-triggered), so time advances to the next decision at once.
"""

import asyncio
import math
from collections.abc import Callable, Sequence

import numpy as np

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.rollout import staged
from oserve.core import DeploymentPlan, Observation, ReplicaSpec, VirtualClock
from oserve.evaluate.attainment import surely_failed
from oserve.evaluate.simulator import (
    LATEST_S,
    Ints,
    SimulatedTraffic,
    Simulator,
)
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.phases import Phases
from oserve.sim.types import Status
from oserve.study.policy import (
    ControlledPolicy,
    Moment,
    Policy,
    PolicySession,
    PolicyStart,
    PolicyView,
)
from oserve.study.run import Change, Run, deployment_of
from oserve.study.scene import Scene
from oserve.study.transfers import SceneSwitching, scene_switcher, transfer_phases
from oserve.study.usage import Snapshot, period_uses
from oserve.switching.driver import SwitchOutcome
from oserve.switching.switcher import Switcher
from oserve.traces import Slo

_ROUND_S = 1.0
# Intervals of recent traffic that a policy may know.
_RECENT_INTERVALS = 3
_CHECKS = 8
FREE = Phases(start_s=0.0)


def run_policy(
    scene: Scene,
    policy: Policy,
    simulator: Simulator,
    scale: float,
    *,
    judge_only: bool = False,
    traffic: SimulatedTraffic | None = None,
    marks_s: Sequence[int] = (),
    said: Callable[[float], None] = lambda _: None,
) -> Run:
    """Serve the scene's traffic ``scale`` times as fast.

    ``judge_only``: end as soon as more requests have missed the SLO than allowed (5 %).
    ``marks_s``: ascending seconds at which a period ends. They are whole, so that rounds, which
    come each second, do not shift. ``said`` is called with each.
    """
    played = (scene.traffic if traffic is None else traffic).faster(scale)
    runner = _PolicyRunner(scene, policy, simulator, played, scale)
    runner.marks_s, runner.said = list(marks_s), said
    return asyncio.run(runner.run(_Checks(played.duration_s, scene.slo) if judge_only else None))


class _Checks:
    """Moments at which a run may turn out to miss its SLO attainment."""

    def __init__(self, duration_s: float, slo: Slo) -> None:
        self._slo = slo
        self._left = [duration_s * (k + 1) / _CHECKS for k in range(_CHECKS)]

    @property
    def next_s(self) -> float:
        """The next check; infinite after the last."""
        return self._left[0] if self._left else np.inf

    def fails(self, now_s: float, fleet: SimulatedFleet) -> bool:
        """Make the check that is due, if one is."""
        if now_s < self.next_s:
            return False
        self._left = [at_s for at_s in self._left if at_s > now_s]
        return surely_failed(fleet.results(), self._slo)


class _PolicyRunner:
    """One run of one policy."""

    def __init__(
        self,
        scene: Scene,
        policy: Policy,
        simulator: Simulator,
        traffic: SimulatedTraffic,
        scale: float,
    ) -> None:
        self._scene, self._policy, self._simulator = scene, policy, simulator
        self._traffic = traffic
        conduct = policy.conduct
        self._serving = scene.served(policy.initial(scale))
        expected = traffic.output_tokens if conduct.knows_outputs else None
        self._requests = simulator.requests(self._serving, traffic, expected=expected)
        self._fleet = simulator.fleet(self._serving, self._requests)
        self._clock = VirtualClock()
        moves = conduct.start is PolicyStart.TRANSFER
        self._cluster = FleetCluster(
            self._fleet,
            self._add,
            scene.devices,
            self._clock,
            phases=_phases(scene, conduct.start),
            weights_bytes=scene.weights_bytes,
            overlapping=conduct.free,
            moves_after_s=conduct.drain_limit_s if moves else math.inf,
        )
        self._target = self._serving.plan
        self._loop = ControlLoop(
            self._cluster,
            self._clock,
            self._target,
            policy=ReconcilePolicy(drain_limit_s=conduct.drain_limit_s),
            interval_s=_ROUND_S,
            rollout=staged if conduct.staged and not conduct.free else _at_once,
        )
        self._switcher = self._made_switcher() if moves else None
        self._session: PolicySession | None = None
        self._arrived = 0
        self._open: Ints = np.zeros(0, dtype=np.int64)
        self._was_switching = True
        self._routed: DeploymentPlan | None = None
        self._changes: list[Change] = []
        self._switches = 0
        self._end_s = traffic.duration_s + LATEST_S
        self.marks_s: list[int] = []
        self.said: Callable[[float], None] = lambda _: None
        self._snapshots: list[Snapshot] = []

    async def run(self, checks: _Checks | None = None) -> Run:
        """From the first request to the end of the last; failed ``checks`` end it before."""
        await self._start()
        if isinstance(self._policy, ControlledPolicy):
            self._session = self._policy.begin(self._traffic)
        interval_s = self._scene.interval_s
        decide_s = interval_s if self._policy.conduct.decides else np.inf
        failed = False
        while self._fleet.ended < len(self._traffic) and self._clock.now() < self._end_s:
            moment = self._next_moment(decide_s, checks)
            if moment >= self._end_s:
                self._fleet.run(limit_s=self._end_s)
                break
            await self._clock.advance(max(0.0, moment - self._clock.now()))
            await self._round()
            self._snap(moment)
            if self._session is not None and moment <= self._traffic.duration_s:
                await self._tell(self._session)
            failed = checks is not None and checks.fails(moment, self._fleet)
            if failed:
                break
            if moment >= decide_s:
                arriving = moment < self._traffic.duration_s
                decide_s = decide_s + interval_s if arriving else np.inf
                if arriving and self._is_settled():
                    await self._decide()
        if self._switcher is not None:
            await self._switcher.close()
        return self._outcome(failed)

    async def _start(self) -> None:
        """Start the first plan, warm."""
        self._aim(self._target)
        self._cluster.warm = True
        await self._loop.step()
        self._cluster.warm = False

    def _made_switcher(self) -> Switcher:
        """The switcher of a server, over modelled transfers."""
        return scene_switcher(
            SceneSwitching(
                scene=self._scene,
                cluster=self._cluster,
                loop=self._loop,
                clock=self._clock,
                settle=self._reached,
                publish=self._publish,
            )
        )

    def _next_moment(self, decide_s: float, checks: _Checks | None) -> float:
        moment = min(decide_s, self._end_s)
        if self._session is not None or not self._is_settled():
            moment = min(moment, self._clock.now() + _ROUND_S)
        if self.marks_s:
            moment = min(moment, self.marks_s[0])
        return moment if checks is None else min(moment, checks.next_s)

    def _snap(self, now_s: float) -> None:
        """End the period if a mark is due."""
        if self.marks_s and now_s >= self.marks_s[0]:
            self.marks_s = [at_s for at_s in self.marks_s if at_s > now_s]
            self._snapshots.append(Snapshot(at_s=now_s, totals=self._fleet.take_totals()))
            self.said(now_s)

    def _add(self, spec: ReplicaSpec, ready_at_s: float) -> None:
        self._simulator.add(self._fleet, spec, self._serving.levers, ready_at_s=ready_at_s)

    def _is_settled(self) -> bool:
        if self._switcher is not None and self._switcher.active:
            return False
        wanted = set(self._target.replicas)
        alive = {life.spec for life in self._cluster.lives if life.end_s is None}
        held = alive if not self._policy.conduct.free else alive & wanted
        return self._cluster.settled and held == wanted

    async def _round(self) -> None:
        """Observe and act, unless nothing changes."""
        switching = not self._is_settled()
        if switching or self._was_switching:
            await self._loop.step()
        else:
            self._cluster.catch_up(self._clock.now())
        self._was_switching = switching

    async def _tell(self, session: PolicySession) -> None:
        """Tell a session what arrived and ended since the last second, and follow its update."""
        observation = await self._cluster.observe()
        now_s = self._clock.now()
        came = int(np.searchsorted(self._traffic.arrival_s, now_s))
        open_ = np.concatenate([self._open, np.arange(self._arrived, came)])
        over, status = self._fleet.ended_among(open_)
        update = session.second(
            Moment(
                now_s=now_s,
                observation=observation,
                came=(self._arrived, came),
                ended=tuple(zip(over.tolist(), status.tolist(), strict=True)),
                plan=self._target,
                switching=not self._is_settled(),
                queued=self._fleet.queued,
            )
        )
        self._arrived, self._open = came, np.setdiff1d(open_, over, assume_unique=True)
        if update.plan is not None:
            await self._go(update.plan)
        if update.routed is not None and update.routed is not self._routed:
            self._routed = update.routed
            self._simulator.route(self._fleet, update.routed, self._serving.levers)

    async def _decide(self) -> None:
        target = self._policy.decide(self._seen())
        if target is not None:
            await self._go(target)

    async def _go(self, target: DeploymentPlan) -> None:
        """Make a plan the target."""
        moved = set(target.replicas) != set(self._target.replicas)
        self._switches += moved
        if self._switcher is not None:
            self._record(target)
            self._switcher.want(target, "policy")
            return
        self._target = target
        self._aim(target)
        if moved:
            await self._round()

    def _aim(self, plan: DeploymentPlan) -> None:
        self._simulator.route(self._fleet, plan, self._serving.levers)
        self._loop.plan = plan
        self._record(plan)

    def _record(self, plan: DeploymentPlan) -> None:
        self._changes.append(
            Change(at_s=self._clock.now(), deployment=deployment_of(plan), plan=plan)
        )

    async def _publish(self) -> None:
        """The switcher put a plan in force: route by it, and let the loop act on it."""
        if self._loop.plan is not self._target:
            self._target = self._loop.plan
            self._simulator.route(self._fleet, self._target, self._serving.levers)
        await self._loop.step()

    def _reached(self, outcome: SwitchOutcome) -> None:
        if self._session is not None:
            self._session.reached(outcome.plan)

    def _seen(self) -> PolicyView:
        now_s, interval_s = self._clock.now(), self._scene.interval_s
        recent_s = min(now_s, _RECENT_INTERVALS * interval_s)
        results = self._fleet.results()
        low, high = np.searchsorted(self._traffic.arrival_s, [now_s - recent_s, now_s])
        ended = results.status[low:high] == Status.COMPLETED
        believed = self._requests.expected_output_tokens[low:high]
        outputs = np.where(ended, self._traffic.output_tokens[low:high], believed)
        recent = SimulatedTraffic(
            arrival_s=self._traffic.arrival_s[low:high] - (now_s - recent_s),
            prompt_tokens=self._traffic.prompt_tokens[low:high],
            output_tokens=outputs,
        )
        return PolicyView(
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
        classes = len(self._target.length_classes)
        high = int(np.searchsorted(self._traffic.arrival_s, now_s))
        window = (self._traffic.arrival_s[:high] // interval_s).astype(np.int64)
        windows = max(1, round(now_s / interval_s))
        cell = np.minimum(window, windows - 1) * classes + self._requests.class_index[:high]
        return np.bincount(cell, minlength=windows * classes).reshape(windows, classes)

    def _outcome(self, failed: bool) -> Run:
        results = self._fleet.results()
        finished = results.finish_s[np.isfinite(results.finish_s)]
        end_s = float(finished.max()) if len(finished) else results.now_s
        for snapshot in self._snapshots[-1:]:
            end_s = max(end_s, snapshot.at_s)
        self._snapshots.append(Snapshot(at_s=end_s, totals=results.totals))
        return Run(
            results=results,
            traffic=self._traffic,
            changes=tuple(self._changes),
            switches=self._switches,
            periods=period_uses(
                self._simulator.source, self._scene.devices, self._cluster.lives, self._snapshots
            ),
            failed_early=failed,
            decisions=() if self._session is None else tuple(self._session.decisions),
        )


def _at_once(
    target: DeploymentPlan,
    observation: Observation,
    lost: frozenset[str],
    held: frozenset[str],
) -> DeploymentPlan:
    del observation, lost, held
    return target


def _phases(scene: Scene, start: PolicyStart) -> Phases:
    """The phases of a replica's start."""
    if start is PolicyStart.FREE:
        return FREE
    return transfer_phases(scene) if start is PolicyStart.TRANSFER else scene.phases
