"""The controller: watch, foresee, weigh, decide; once per interval, at once when traffic breaks.

Pure: time and counts come in, decisions go out; the planner and the values of plans are passed in
(see ``evaluation``). A decision takes three steps, so that the slow one may run elsewhere: ``ask``
makes the question, ``appraise`` answers it, ``judge`` decides. Guards hold in every mode: no switch
within the minimum dwell of the last, no more of them an hour than allowed, none while one is under
way, none to a plan that serves less of what comes now. A person's own wish is bound by none.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from oserve.control.decision import Decision, Reason, Trigger, Verdict
from oserve.control.evaluation import Appraiser, Question, Weighed, appraise, signature
from oserve.control.lifetime import Lifetime
from oserve.control.monitor import TrafficMonitor
from oserve.control.policy import HOUR_S, ControlPolicy, Standing, reason_for, verdict_for
from oserve.control.switch_regret import Regret
from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.forecaster import Forecaster

# More than any plan is taken to last.
_NEVER_S = 1e9


class Controller:
    """Decides for one plan; ``forecaster`` and ``detector`` must be of the same types."""

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
        self.watch = TrafficMonitor(policy, forecaster, detector)
        self.decisions: deque[Decision] = deque(maxlen=policy.decisions)
        self._lifetime = Lifetime(
            prior_s=policy.lasts_s, most_s=policy.longest_s, lag_s=policy.interval_s
        )
        self._regret = Regret()
        self._switches: list[float] = []
        self._number = 0
        self._version = 0
        self._held_until_s = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the workload types."""
        return self.watch.collector.names

    def reached(self, plan: DeploymentPlan) -> None:
        """A switch ended in this plan, which may not be the one that was decided on."""
        if plan != self.plan:
            self.plan = plan
            self._version += 1

    def ask(
        self,
        now_s: float,
        *,
        given: DeploymentPlan | None = None,
        present: Sequence[ReplicaSpec] = (),
    ) -> Question:
        """What is to be weighed now; ``given`` is a plan that a person proposes.

        ``present``: the replicas there are, where the plan's could not all be started.
        """
        policy = self.policy
        watch = self.watch
        idle_s = now_s - max(watch.last_arrival_s, 0.0)
        idle = policy.shrink_after_s > 0 and idle_s >= policy.shrink_after_s
        shrink = idle and watch.last_arrival_s >= 0 and not watch.shrunk and given is None
        return Question(
            at_s=now_s,
            version=self._version,
            current=replace(self.plan, replicas=tuple(present)) if present else self.plan,
            now_rps=watch.now_rps(),
            steps=watch.steps(),
            lasts_s=self._lasts_s("", now_s),
            lasting={name: self._lasts_s(name, now_s) for name in self._lifetime.known},
            plan_for=watch.usual() if shrink else watch.likely(),
            given=given,
            shrink_to=policy.floor_replicas if shrink else 0,
            drain_s=watch.drain_s(),
            drain_limit_s=policy.drain_limit_s,
            in_order=policy.in_order,
            past=watch.past(),
            before=watch.before_rps(),
            back_s=policy.min_dwell_s,
        )

    def _lasts_s(self, signature: str, now_s: float) -> float:
        """For how long this deployment is expected to be the best."""
        return max(1.0, self._lifetime.expected_s(signature, now_s))

    def judge(
        self,
        question: Question,
        weighed: Weighed | None,
        *,
        now_s: float,
        trigger: Trigger,
        switching: bool = False,
    ) -> Decision:
        """Decide, and if it is for a switch, make its plan the current one.

        ``switching``: the last switch is not over. A question that was asked of another plan than
        the one in force now is answered with keeping that.
        """
        switching = switching or question.version != self._version
        if weighed is not None and question.given is None and not question.shrink_to:
            self._compare(weighed, now_s, switching=switching)
        watch = self.watch
        standing = Standing(
            now_s=now_s,
            trigger=trigger,
            switches=tuple(self._switches),
            switching=switching,
            shrunk=watch.shrunk,
            watched=watch.last_arrival_s >= 0,
            held=now_s < self._held_until_s,
            missed=math.inf if watch.shrunk else self._regret.requests,
            known=self._lifetime.knows,
        )
        reason = reason_for(self.policy, standing, question, weighed)
        verdict = verdict_for(self.policy, trigger, reason)
        decision = self._record(question, weighed, now_s, trigger, verdict, reason)
        if verdict is Verdict.SWITCH and weighed is not None:
            watch.shrunk = reason is Reason.ZERO_TRAFFIC
            self._held_until_s = now_s + self.policy.hold_s if reason is Reason.MANUAL else 0.0
            self._regret.reset(now_s)
            self.plan = weighed.plan
            self._lifetime.takes_over(signature(self.plan))
            self._version += 1
            # A person's switches count as well: it is the replicas that need their rest.
            if weighed.cost.changed or reason is not Reason.MANUAL:
                self._switches = [s for s in self._switches if now_s - s < HOUR_S] + [now_s]
        return decision

    def _compare(self, weighed: Weighed, now_s: float, *, switching: bool) -> None:
        """Note which plan is the best now, and what keeping the present one costs.

        Of several that are better in turns the first stands for all.
        """
        more_rps = weighed.candidate_rps - weighed.current_rps
        slack_rps = self.policy.min_gain * weighed.current_rps
        current = signature(self.plan)
        best = signature(weighed.plan) if more_rps > slack_rps else current
        if best != current and self._lifetime.preferred not in {"", current}:
            best = self._lifetime.preferred
        self._lifetime.prefers(best, now_s)
        if switching:
            self._regret.skip(now_s)
        else:
            began_s = self.watch.began_s
            self._regret.judged(now_s, more_rps, slack_rps=slack_rps, began_s=began_s)

    def decide(
        self, now_s: float, trigger: Trigger, appraiser: Appraiser, *, switching: bool = False
    ) -> Decision:
        """All three steps at once."""
        question = self.ask(now_s)
        return self.judge(
            question,
            appraise(question, appraiser),
            now_s=now_s,
            trigger=trigger,
            switching=switching,
        )

    def _record(
        self,
        question: Question,
        weighed: Weighed | None,
        now_s: float,
        trigger: Trigger,
        verdict: Verdict,
        reason: Reason,
    ) -> Decision:
        numbers: dict[str, Any] = {}
        if weighed is not None:
            numbers = {
                "candidate_plan": weighed.plan.id,
                "lasts_s": weighed.lasts_s,
                "current_rps": weighed.current_rps,
                "candidate_rps": weighed.candidate_rps,
                "gain_requests": weighed.gain,
                "cost_requests": weighed.cost.requests,
                "switch_s": weighed.cost.seconds,
                "lost_requests": weighed.cost.lost,
                "touched_requests": weighed.cost.touched,
                "changed_replicas": weighed.cost.changed,
                "pays_after_s": weighed.pays_after_s if weighed.pays_after_s < _NEVER_S else None,
                "missed_requests": self._regret.requests,
            }
        self._number += 1
        decision = Decision(
            number=self._number,
            at_s=now_s,
            trigger=trigger,
            verdict=verdict,
            reason=reason,
            current_plan=question.current.id,
            forecast=self.watch.forecast(),
            **numbers,
        )
        self.decisions.append(decision)
        return decision

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain data that ``restore`` takes: all but the plan and the records of decisions."""
        return {
            **self.watch.state(),
            "shrunk": self.watch.shrunk,
            "lifetime": self._lifetime.state(),
            "regret": self._regret.state(),
            "switches": list(self._switches),
            "number": self._number,
            "held_until_s": self._held_until_s,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; of the same types. Raises OServeError if it is not."""
        self.watch.restore(state)
        self._restore_own(state)

    def restore_course(self, state: Mapping[str, Any]) -> None:
        """Of ``state`` only what does not depend on types."""
        self.watch.restore_course(state)
        self._restore_own(state)

    def _restore_own(self, state: Mapping[str, Any]) -> None:
        self.watch.shrunk = bool(state["shrunk"])
        self._lifetime.restore(state["lifetime"])
        # What was remembered by a version without it is taken up all the same.
        self._regret.restore(state.get("regret", Regret().state()))
        self._switches = [float(at_s) for at_s in state["switches"]]
        self._number = int(state["number"])
        self._held_until_s = float(state["held_until_s"])
