"""The controller: monitor, forecast, score, decide; once an interval, and when traffic changes.

Pure: times and counts come in, decisions go out. The planner and the values of plans are passed in
(see ``evaluation``). A decision takes three steps, so that the slow one may run in another thread:
``decision_input`` collects the facts, ``evaluation`` scores candidates, ``decide`` decides. Guards
hold in every mode: no switch within the minimum dwell of the last, no more switches an hour than
allowed, none during another switch, none to a plan that serves less of the current traffic. An
operator's plan is bound by none of them.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from oserve.control.decision import (
    Decision,
    DecisionVerdict,
    LadderPlace,
    Reason,
    Trigger,
)
from oserve.control.evaluation import CandidateScore, DecisionInput, signature
from oserve.control.following import FollowScore
from oserve.control.lifetime import Lifetime
from oserve.control.monitor import TrafficMonitor
from oserve.control.node_view import remaining
from oserve.control.policy import (
    HOUR_S,
    ControlPolicy,
    DecisionContext,
    follow_reason_for,
    is_absorbed,
    reason_for,
    verdict_for,
)
from oserve.control.switch_regret import SwitchRegret
from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.forecaster import Forecaster

# Longer than any plan lasts.
_NEVER_S = 1e9


class Controller:
    """Decides for one plan; ``forecaster`` and ``detector`` must be of the same workload types."""

    def __init__(
        self,
        plan: DeploymentPlan,
        *,
        policy: ControlPolicy,
        forecaster: Forecaster,
        detector: ChangeDetector,
    ) -> None:
        self.policy = policy
        self.plan = plan
        self.monitor = TrafficMonitor(policy, forecaster, detector)
        self.decisions: deque[Decision] = deque(maxlen=policy.decisions)
        self._lifetime = Lifetime(
            prior_s=policy.lasts_s, most_s=policy.longest_s, lag_s=policy.interval_s
        )
        self._regret = SwitchRegret()
        self._switches: list[float] = []
        self._falls: list[float] = []
        self.overloaded_since_s = -1.0
        """When more load came than the plan in force holds; negative while it holds."""
        self._number = 0
        self._version = 0
        self._unusable: frozenset[str] = frozenset()
        self._left: frozenset[str] = frozenset()
        self._decided_without: frozenset[str] = frozenset()
        self._earlier: DeploymentPlan | None = None
        self._held_until_s = 0.0
        self._reconsiders = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the workload types."""
        return self.monitor.collector.names

    def reached(self, plan: DeploymentPlan) -> None:
        """A switch ended in this plan, which may differ from the one that was decided on."""
        if plan != self.plan:
            self.plan = plan
            self._version += 1

    # -- nodes ----------------------------------------------------------------------------------
    def see_nodes(self, unusable: frozenset[str], left: frozenset[str]) -> None:
        """The devices that no plan may use; ``left``: those whose replicas do not serve on."""
        self._unusable, self._left = unusable, left

    def join(self, devices: frozenset[str]) -> None:
        """There are more devices, and no plan has been made with them."""
        self._decided_without |= devices

    def reconsider(self) -> None:
        """More is known of the nodes than at the last decision about them: decide again."""
        self._reconsiders = True

    @property
    def nodes_due(self) -> bool:
        """Whether the usable devices differ from those of the last decision about nodes."""
        return self._reconsiders or self._unusable != self._decided_without

    def accept_nodes(self) -> None:
        """Decide no further about the present nodes."""
        self._decided_without = self._unusable
        self._reconsiders = False
        if not self._unusable:
            self._earlier = None

    @property
    def present(self) -> DeploymentPlan:
        """The plan in force without what nodes took away."""
        return remaining(self.plan, self._left)

    # -- the input of a decision ----------------------------------------------------------------
    def decision_input(
        self,
        now_s: float,
        *,
        given: DeploymentPlan | None = None,
        present: Sequence[ReplicaSpec] = (),
        of_nodes: bool = False,
    ) -> DecisionInput:
        """The facts to decide on now; ``given`` is a plan that an operator proposes.

        ``present``: the replicas that exist, where not all of the plan could be started.
        ``of_nodes``: see ``DecisionInput``.
        """
        policy = self.policy
        monitor = self.monitor
        shrink = given is None and not of_nodes and self._is_idle(now_s)
        return DecisionInput(
            at_s=now_s,
            version=self._version,
            current=replace(self.plan, replicas=tuple(present)) if present else self.present,
            now_rps=monitor.now_rps(),
            steps=monitor.steps(),
            lasts_s=self._lasts_s("", now_s),
            lasting={name: self._lasts_s(name, now_s) for name in self._lifetime.known},
            plan_for=monitor.usual() if shrink else monitor.likely(),
            given=given,
            shrink_to=policy.floor_replicas if shrink else 0,
            drain_s=monitor.drain_s(),
            drain_limit_s=policy.drain_limit_s,
            in_order=policy.in_order,
            past=monitor.past(),
            before=monitor.before_rps(),
            age_s=monitor.age_s(),
            back_s=policy.min_dwell_s,
            unusable=self._unusable,
            of_nodes=of_nodes,
            earlier=self._earlier,
            load=(
                None
                if policy.follow is None
                else monitor.load_facts(policy.follow.quantile, policy.follow.fall_after_s)
            ),
        )

    def _is_idle(self, now_s: float) -> bool:
        """Whether no request arrived for so long that replicas should stop."""
        policy, monitor = self.policy, self.monitor
        if policy.shrink_after_s <= 0 or monitor.last_arrival_s < 0 or monitor.shrunk:
            return False
        return now_s - monitor.last_arrival_s >= policy.shrink_after_s

    def _lasts_s(self, signature: str, now_s: float) -> float:
        """How long this deployment is expected to stay the best."""
        return max(1.0, self._lifetime.expected_s(signature, now_s))

    # -- the decision ---------------------------------------------------------------------------
    def decide(
        self,
        inputs: DecisionInput,
        score: CandidateScore | FollowScore | None,
        *,
        now_s: float,
        trigger: Trigger,
        switching: bool = False,
    ) -> Decision:
        """Decide, and for a switch make its plan the current one.

        ``switching``: the last switch has not ended. If the input is of another plan than the one
        in force, the verdict is to keep the latter.
        """
        switching = switching or inputs.version != self._version
        decision = self._decided(inputs, score, now_s, trigger, switching=switching)
        if inputs.of_nodes and decision.reason is not Reason.SWITCH_UNDER_WAY:
            self._decided_without = inputs.unusable
            self._reconsiders = False
            if not inputs.unusable:
                self._earlier = None
        return decision

    def _decided(
        self,
        inputs: DecisionInput,
        score: CandidateScore | FollowScore | None,
        now_s: float,
        trigger: Trigger,
        *,
        switching: bool,
    ) -> Decision:
        if inputs.follows and not isinstance(score, CandidateScore):
            return self._follow(inputs, score, now_s=now_s, trigger=trigger, switching=switching)
        if isinstance(score, FollowScore):
            raise TypeError("a score of the ladder for an input without loads")
        if score is not None and inputs.given is None and not inputs.shrink_to:
            self._compare(score, now_s, switching=switching)
        context = self._context(now_s, trigger, switching=switching)
        reason = reason_for(self.policy, context, inputs, score)
        verdict = verdict_for(self.policy, trigger, reason)
        decision = self._record(inputs, score, now_s, trigger, verdict, reason)
        if verdict is DecisionVerdict.SWITCH and score is not None:
            self._switch(score.plan, now_s, reason, changes=score.cost.changed > 0)
        return decision

    def _follow(
        self,
        inputs: DecisionInput,
        score: FollowScore | None,
        *,
        now_s: float,
        trigger: Trigger,
        switching: bool,
    ) -> Decision:
        """Decide by the place on the ladder."""
        if score is not None:
            if switching:
                self._regret.skip(now_s)
            elif is_absorbed(score, now_s, since_s=self.overloaded_since_s):
                self._regret.reset(now_s)
            else:
                slack = self.policy.min_gain * score.current_cost * score.loads.rate_rps
                began_s = max(float(self.monitor.began_s), self.overloaded_since_s)
                self._regret.update(now_s, score.gain_per_s, slack_rps=slack, began_s=began_s)
        context = self._context(now_s, trigger, switching=switching)
        reason = follow_reason_for(self.policy, context, inputs, score)
        verdict = verdict_for(self.policy, trigger, reason)
        decision = self._decision(inputs, now_s, trigger, verdict, reason)
        if score is not None:
            decision = replace(
                decision,
                candidate_plan=score.plan.id,
                switch_s=score.seconds,
                touched_requests=score.touched,
                changed_replicas=score.changed,
                place=LadderPlace(
                    load=score.loads.now,
                    expected_load=score.loads.expected,
                    required_load=score.loads.required,
                    rung=score.rung,
                    current_cost=score.current_cost,
                    candidate_cost=score.candidate_cost,
                    gain_per_s=score.gain_per_s,
                    regret=self._regret.requests,
                    price=score.price,
                ),
            )
        self.decisions.append(decision)
        if verdict is DecisionVerdict.SWITCH and score is not None:
            if reason is not Reason.LOAD_RISES or not score.climbs:
                self._falls = [s for s in self._falls if now_s - s < HOUR_S] + [now_s]
            self._switch(score.plan, now_s, reason, changes=score.changed > 0)
        return decision

    def _context(self, now_s: float, trigger: Trigger, *, switching: bool) -> DecisionContext:
        monitor = self.monitor
        return DecisionContext(
            now_s=now_s,
            trigger=trigger,
            switches=tuple(self._switches),
            switching=switching,
            shrunk=monitor.shrunk,
            watched=monitor.last_arrival_s >= 0,
            held=now_s < self._held_until_s,
            missed=math.inf if monitor.shrunk else self._regret.requests,
            known=self._lifetime.knows,
            falls=tuple(self._falls),
        )

    def _switch(self, plan: DeploymentPlan, now_s: float, reason: Reason, *, changes: bool) -> None:
        """Make a plan the current one; ``changes``: replicas must start for it."""
        if self._earlier is None and self.present is not self.plan:
            # What the devices that left held, to be taken up again when they are back.
            self._earlier = self.plan
        self.monitor.shrunk = reason is Reason.ZERO_TRAFFIC
        self._held_until_s = now_s + self.policy.hold_s if reason is Reason.MANUAL else 0.0
        self._regret.reset(now_s)
        self.plan = plan
        self._lifetime.takes_over(signature(self.plan))
        self._version += 1
        # An operator's switches count for the guards, too: replicas need time to settle.
        if changes or reason is not Reason.MANUAL:
            self._switches = [s for s in self._switches if now_s - s < HOUR_S] + [now_s]

    def _compare(self, score: CandidateScore, now_s: float, *, switching: bool) -> None:
        """Record which plan is the best now, and update the regret of keeping the current one.

        If several plans take turns as the best one, the first of them stands for all.
        """
        more_rps = score.candidate_rps - score.current_rps
        slack_rps = self.policy.min_gain * score.current_rps
        current = signature(self.plan)
        best = signature(score.plan) if more_rps > slack_rps else current
        if best != current and self._lifetime.preferred not in {"", current}:
            best = self._lifetime.preferred
        self._lifetime.prefers(best, now_s)
        if switching:
            self._regret.skip(now_s)
        else:
            began_s = self.monitor.began_s
            self._regret.update(now_s, more_rps, slack_rps=slack_rps, began_s=began_s)

    def _record(
        self,
        inputs: DecisionInput,
        score: CandidateScore | None,
        now_s: float,
        trigger: Trigger,
        verdict: DecisionVerdict,
        reason: Reason,
    ) -> Decision:
        decision = self._decision(inputs, now_s, trigger, verdict, reason)
        if score is not None:
            decision = replace(
                decision,
                candidate_plan=score.plan.id,
                lasts_s=score.lasts_s,
                current_rps=score.current_rps,
                candidate_rps=score.candidate_rps,
                gain_requests=score.gain,
                cost_requests=score.cost.requests,
                switch_s=score.cost.seconds,
                lost_requests=score.cost.lost,
                touched_requests=score.cost.touched,
                changed_replicas=score.cost.changed,
                pays_after_s=score.pays_after_s if score.pays_after_s < _NEVER_S else None,
                missed_requests=self._regret.requests,
            )
        self.decisions.append(decision)
        return decision

    def _decision(
        self,
        inputs: DecisionInput,
        now_s: float,
        trigger: Trigger,
        verdict: DecisionVerdict,
        reason: Reason,
    ) -> Decision:
        self._number += 1
        return Decision(
            number=self._number,
            at_s=now_s,
            trigger=trigger,
            verdict=verdict,
            reason=reason,
            current_plan=inputs.current.id,
            forecast=self.monitor.forecast(),
        )

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain data for ``restore``: all but the plan and the records of decisions."""
        return {
            **self.monitor.state(),
            "shrunk": self.monitor.shrunk,
            "lifetime": self._lifetime.state(),
            "regret": self._regret.state(),
            "switches": list(self._switches),
            "falls": list(self._falls),
            "number": self._number,
            "held_until_s": self._held_until_s,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, of the same types. Raises OServeError if they differ."""
        self.monitor.restore(state)
        self._restore_own(state)

    def restore_course(self, state: Mapping[str, Any]) -> None:
        """Continue from the part of ``state`` that does not depend on workload types."""
        self.monitor.restore_course(state)
        self._restore_own(state)

    def _restore_own(self, state: Mapping[str, Any]) -> None:
        self.monitor.shrunk = bool(state["shrunk"])
        self._lifetime.restore(state["lifetime"])
        # Older versions stored no regret.
        self._regret.restore(state.get("regret", {}))
        self._switches = [float(at_s) for at_s in state["switches"]]
        self._falls = [float(at_s) for at_s in state.get("falls", ())]
        self._number = int(state["number"])
        self._held_until_s = float(state["held_until_s"])
