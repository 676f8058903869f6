"""The controller runtime: a controller with its planner, start times and routing shares.

The live server and the simulated one share it: both feed it once a second and carry out what it
decides. Time is passed in with each call.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from oserve.control.controller import Controller
from oserve.control.decision import Decision, Mode, Trigger
from oserve.control.evaluation import (
    CandidateScore,
    DecisionInput,
    SimulatedScore,
    score_candidate,
    score_candidates,
)
from oserve.control.following import FollowScore, follow, present_load
from oserve.control.ladder import Ladder, Shapes, shapes_of
from oserve.control.ladder_cut import cut_ladder
from oserve.control.ladder_table import ladder_rows
from oserve.control.load_facts import LoadFacts
from oserve.control.monitor import LAST_S
from oserve.control.node_view import unusable_devices
from oserve.control.plan_parts import extended, fitting, typed_plan
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.policy import ControlPolicy
from oserve.control.shelf import LadderNeed, LadderShelf, ShelvedLadder
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import (
    DeploymentPlan,
    NodePhase,
    NodeState,
    Observation,
    ReplicaPhase,
    ReplicaSpec,
)
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.experts import Combination
from oserve.forecast.forecaster import QUANTILES, Forecaster
from oserve.forecast.simple import periods_of

# The candidates that are simulated, the best by the linear model first.
_MOST_SIMULATED = 5
_OVERLOAD_REST_S, _SURE_S = 5.0, 60.0
# The searches of a decision about nodes take at most this long.
_AT_ONCE_S = 2.0
# The mix of fewer requests is chance.
_FEWEST_REQUESTS = 100

Scorer = Callable[[DecisionInput, CandidateScore], SimulatedScore]
"""Scores a switch by simulation; its score replaces the one of the planner's linear model."""


def controller_for(plan: DeploymentPlan, names: Sequence[str], policy: ControlPolicy) -> Controller:
    """A controller without any history."""
    interval_s = float(policy.interval_s)
    return Controller(
        plan,
        policy=policy,
        forecaster=Forecaster(
            Combination(len(names), periods_of(interval_s)),
            names,
            interval_s=interval_s,
            quantiles=_quantiles(policy),
        ),
        detector=ChangeDetector(names),
    )


def _quantiles(policy: ControlPolicy) -> tuple[float, ...]:
    """The forecaster's quantiles, with the one that a deployment must hold."""
    wanted = set(QUANTILES)
    if policy.follow is not None:
        wanted.add(policy.follow.quantile)
    return tuple(sorted(wanted))


class ControllerRuntime:
    """Runs one controller. ``plan`` is the plan in force at the start.

    Routing shares stay for ``shares_interval_s``. ``scorer`` simulates the planner's candidates,
    since the error of its model is as large as most gains. ``speeds`` estimates the real speed of
    replicas, by which the planner is corrected.
    """

    def __init__(
        self,
        plan: DeploymentPlan,
        *,
        policy: ControlPolicy,
        planner: TablePlanner,
        starts: StartTimes,
        shares_interval_s: float,
        scorer: Scorer | None = None,
        speeds: SpeedEstimator | None = None,
    ) -> None:
        self._speeds = speeds
        self.planner = planner
        self.starts = starts
        names = [kind.name for kind in planner.facts.types]
        self.controller = controller_for(self.typed(plan), names, policy)
        self._shares_interval_s = shares_interval_s
        self._scorer = scorer
        self._shares_s = 0.0
        self._shared: tuple[frozenset[ReplicaSpec], DeploymentPlan] | None = None
        self.shelf = LadderShelf()
        self._overload_s = -math.inf
        self._lead_s = 0.0

    def observe(
        self, now_s: float, batches: Sequence[Batch], observation: Observation, queued: int = 0
    ) -> Trigger | None:
        """Once a second: add counts and an observation; returns why a decision is due."""
        states = observation.replicas
        gauges = {
            "running": float(sum(state.running for state in states)),
            "waiting": float(sum(state.waiting for state in states)),
            "kv_cache_usage": max((state.kv_cache_usage for state in states), default=0.0),
            "queued": float(queued),
        }
        self.starts.observe(observation)
        self._join(observation)
        self.see_nodes(observation.node_states)
        speeds = None if self._speeds is None else self._speeds.observe(observation)
        if speeds is not None:
            self.planner.correct(speeds)
            # Solve the shares again at once.
            self._shared = None
        trigger = self.count(now_s, batches, gauges)
        return Trigger.NODE if self.controller.nodes_due else trigger

    def _join(self, observation: Observation) -> None:
        """Plan for the devices of nodes that have come since the start, too."""
        if not observation.node_states:
            return
        facts = self.planner.facts
        known = {device.id for device in facts.devices}
        fresh = tuple(device for device in observation.devices if device.id not in known)
        if fresh:
            self.planner.learn(replace(facts, devices=facts.devices + fresh))
            self.controller.join(frozenset(device.id for device in fresh))

    def renew(self, facts: PlannerFacts) -> None:
        """Plan for a cluster that is known better: more devices, other shapes, another network.

        Another ladder is needed then; until it is there the present one serves.
        """
        self.planner.learn(facts)
        self.shelf.outdate()
        self._shared = None
        if self.controller.policy.follow is None:
            self.controller.reconsider()

    def see_nodes(self, states: Sequence[NodeState]) -> None:
        """Plan for the devices of the nodes that are in use from now on."""
        devices = self.planner.facts.devices
        unusable = frozenset(unusable_devices(devices, states))
        if unusable != self.planner.unusable:
            self.planner.leave_out(unusable)
        draining = NodePhase.DRAINING.value
        names = {s.name for s in states if not s.reachable or s.word == draining}
        left = frozenset(device.id for device in devices if device.node in names)
        self.controller.see_nodes(unusable, left)

    def count(
        self, now_s: float, batches: Sequence[Batch], gauges: Mapping[str, float] | None = None
    ) -> Trigger | None:
        """``observe`` without the replicas."""
        trigger = self.controller.monitor.observe(now_s, batches, gauges)
        return trigger if trigger is not None else self._overload(now_s)

    def _overload(self, now_s: float) -> Trigger | None:
        """Whether more load arrives than the current plan holds.

        First after a few seconds, then ever more seldom while it stays overloaded.
        """
        controller = self.controller
        policy, ladder, monitor = controller.policy.follow, self.shelf.ladder, controller.monitor
        if policy is None or ladder is None:
            return None
        shapes = shapes_of(controller.present.replicas)
        ladder = ladder.including(shapes)
        present = ladder.find(shapes)
        if present is None:
            return None
        load = present_load(
            ladder,
            now=monitor.recent_rps(),
            last=monitor.last_rps(),
            last_s=LAST_S,
            burstiness=monitor.burstiness,
        )
        if load <= ladder.capacity(present, policy.goal):
            controller.overloaded_since_s = -1.0
            return None
        if controller.overloaded_since_s < 0:
            controller.overloaded_since_s = now_s
        age_s = now_s - controller.overloaded_since_s
        rest_s = max(_OVERLOAD_REST_S, min(age_s - _SURE_S, controller.policy.interval_s))
        if now_s - self._overload_s < rest_s:
            return None
        self._overload_s = now_s
        return Trigger.LOAD

    # -- ladders --------------------------------------------------------------------------------
    def ladder_need(self, now_s: float) -> LadderNeed | None:
        """What the next ladder must be built for; ``None`` while the present one fits."""
        follow = self.controller.policy.follow
        if follow is None:
            return None
        monitor = self.controller.monitor
        facts = monitor.load_facts(follow.quantile, follow.fall_after_s)
        mix = facts.mix
        if sum(mix) * facts.mix_s < _FEWEST_REQUESTS:
            mix = tuple(kind.arrival_rate_rps for kind in self.planner.facts.types)
        total = sum(mix)
        mix = tuple(round(rate / total if total > 0 else 1.0 / len(mix), 3) for rate in mix)
        present = shapes_of(self.controller.present.replicas)
        speeds = self.planner.speeds
        bursts = tuple(round(item, 1) for item in facts.burstiness)
        if not self.shelf.needs(mix, present, speeds, now_s, bursts):
            return None
        return LadderNeed(
            mix=mix,
            present=present,
            speeds=speeds,
            burstiness=bursts,
            work=self.planner.work,
            cluster=self.shelf.cluster,
        )

    def prepare_switches(self) -> None:
        """Place the rungs near the plan in force, and predict the switches to them.

        Decisions find them; in a thread, since it may take a second.
        """
        follow, ladder = self.controller.policy.follow, self.shelf.ladder
        if follow is None or ladder is None:
            return
        current = self.controller.present
        ladder = self._usable(ladder, shapes_of(current.replicas))
        rows = ladder_rows(ladder, follow.goal, ladder.loads, headroom=follow.headroom)
        for shapes in dict.fromkeys(row.shapes for row in rows):
            self.planner.switch(current, shapes)

    def learn_ladder(self, need: LadderNeed, ladder: Ladder) -> None:
        """Use a ladder that was built for a need.

        With the first one of a cluster that has grown, a decision about its nodes is due.
        """
        if self.shelf.cluster and need.cluster == self.shelf.cluster and self.shelf.is_outdated:
            self.controller.reconsider()
        self.shelf.add(
            ShelvedLadder(
                ladder=ladder,
                speeds=need.speeds,
                present=need.present,
                bursts=need.burstiness,
                cluster=need.cluster,
            )
        )

    def routed(
        self, plan: DeploymentPlan, observation: Observation, now_s: float
    ) -> DeploymentPlan:
        """The plan with routing shares for the replicas that serve and the requests that come."""
        ready = frozenset(s.spec for s in observation.replicas if s.phase is ReplicaPhase.READY)
        rates = self.controller.monitor.now_rps()
        if self.controller.policy.mode is not Mode.AUTO or not ready:
            return plan
        if sum(rates) <= 0 and ready == set(plan.replicas) and plan.planned_types:
            return plan
        fresh = now_s - self._shares_s < self._shares_interval_s
        if self._shared is not None and self._shared[0] == ready and fresh:
            return replace(self._shared[1], id=plan.id)
        serving = sorted(ready, key=lambda spec: spec.id)
        routed = replace(plan, replicas=tuple(serving))
        if self.controller.policy.follow is None:
            shares = self.planner.shares(serving, rates)
            routed = self.planner.with_shares(routed, shares)
        else:
            # As the ladder's deployments were simulated.
            routed = self.planner.evenly_shared(routed)
        self._shares_s = now_s
        self._shared = (ready, routed)
        return routed

    # -- decisions ------------------------------------------------------------------------------
    def decide(
        self, now_s: float, trigger: Trigger, *, switching: bool = False
    ) -> tuple[Decision, CandidateScore | FollowScore | None]:
        """Make a whole decision at once; returns it with the score it is based on."""
        inputs = self.controller.decision_input(now_s, of_nodes=trigger is Trigger.NODE)
        score = self.evaluate(inputs)
        decision = self.controller.decide(
            inputs, score, now_s=now_s, trigger=trigger, switching=switching
        )
        return decision, score

    def evaluate(self, inputs: DecisionInput) -> CandidateScore | FollowScore | None:
        """Return the best candidate with its score. Without a ladder this is slow."""
        if inputs.follows and inputs.load is not None:
            followed = self._followed(inputs, inputs.load)
            if followed is not None or not inputs.of_nodes:
                return followed
        inputs = replace(inputs, speeds=self.planner.speeds)
        if inputs.of_nodes:
            return self._of_nodes(inputs)
        found = score_candidates(inputs, self.planner)
        automatic = inputs.given is None and not inputs.shrink_to
        if self._scorer is not None and automatic:
            found = self._simulated(inputs, found[:_MOST_SIMULATED], self._scorer)
        best = max(found, key=lambda item: item.net_gain, default=None)
        return None if best is None else replace(best, plan=self.typed(best.plan))

    def _of_nodes(self, inputs: DecisionInput) -> CandidateScore | None:
        """The best plan for the devices in use, by the linear model alone, since it is quick.

        If no plan gains much, the present one takes up again what came back.
        """
        planner = self.planner
        if not any(sum(rates) > 0 for rates in inputs.plan_for):
            usual = tuple(kind.arrival_rate_rps for kind in planner.facts.types)
            step = replace(inputs.steps[0], probabilities={usual: 1.0}, expected=usual)
            inputs = replace(inputs, plan_for=(usual,), now_rps=usual, steps=(step,))
        usual_s, planner.most_s = planner.most_s, _AT_ONCE_S / max(1, len(inputs.plan_for))
        try:
            found = score_candidates(inputs, planner)
        finally:
            planner.most_s = usual_s
        best = max(found, key=lambda item: item.net_gain, default=None)
        least = self.controller.policy.min_gain
        if inputs.earlier is not None and (
            best is None or best.net_gain <= least * best.current_rps * best.lasts_s
        ):
            wider = extended(inputs.current, inputs.earlier, planner.devices)
            if wider is not None:
                shares = planner.shares(wider.replicas, inputs.now_rps)
                best = score_candidate(inputs, planner.with_shares(wider, shares), planner)
        return None if best is None else replace(best, plan=self.typed(best.plan))

    def _usable(self, ladder: Ladder, present: Shapes) -> Ladder:
        """The ladder for the devices in use."""
        ladder = ladder.including(present)
        if not self.planner.unusable:
            return ladder
        return cut_ladder(ladder, fitting(self.planner.devices), kept=present)

    def _followed(self, inputs: DecisionInput, facts: LoadFacts) -> FollowScore | None:
        """The place on the ladder; ``None`` without one that has the current plan."""
        policy, ladder = self.controller.policy, self.shelf.ladder
        if ladder is None or policy.follow is None:
            return None
        mine = shapes_of(inputs.current.replicas)
        found = follow(
            self._usable(ladder, mine).without(self.planner.barred, mine),
            facts,
            policy.follow,
            current=inputs.current,
            switch=lambda shapes: self.planner.switch(inputs.current, shapes),
            lead_s=self._lead_s + policy.interval_s,
            drain_limit_s=inputs.drain_limit_s,
        )
        if found is None:
            return None
        if found.seconds > 0:
            self._lead_s = found.seconds
        return replace(found, plan=self.typed(found.plan))

    def _simulated(
        self, inputs: DecisionInput, found: Sequence[CandidateScore], scorer: Scorer
    ) -> list[CandidateScore]:
        """Simulate the candidates; stop once the current plan serves what no other can exceed."""
        enough_rps = sum(inputs.expected_rps) / (1.0 + self.controller.policy.min_gain)
        current = set(inputs.current.replicas)
        scores = []
        for item in found:
            if set(item.plan.replicas) == current:
                scores.append(item)
                continue
            score = scorer(inputs, replace(item, plan=self.typed(item.plan)))
            scores.append(item.as_simulated(score))
            if score.current_rps >= enough_rps:
                break
        return scores

    def typed(self, plan: DeploymentPlan) -> DeploymentPlan:
        """The plan with the types that are counted here; each gets the shares of its class."""
        facts = self.planner.facts
        return typed_plan(plan, [kind.name for kind in facts.types], facts.centres)
