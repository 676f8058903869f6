"""The controller: watch, foresee, weigh, decide; once per interval, at once when traffic breaks.

Pure: time and counts come in, decisions go out; the planner and the values of plans are passed in
(see ``appraisal``). A decision takes three steps, so that the slow one may run elsewhere: ``ask``
makes the question, ``appraise`` answers it, ``judge`` decides. Guards hold in every mode: no switch
within the minimum dwell of the last, no more of them an hour than allowed, none while one is under
way, none to a plan that serves less of what comes now. A person's own wish is bound by none.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from oserve.control.appraisal import Appraiser, Question, Rates, Step, Weighed, appraise, signature
from oserve.control.collector import Collector
from oserve.control.decision import Decision, Reason, Trigger, TypeForecast, Verdict
from oserve.control.lifetime import Lifetime
from oserve.control.policy import HOUR_S, ControlPolicy, Standing, reason_for, verdict_for
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, ReplicaSpec
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.forecaster import Forecaster
from oserve.forecast.retype import replayed
from oserve.workload.columns import Floats

# Counts of other processes come a little late, so the last second is left for later.
_LAG_S = 1
_PARTS = 6
_FEWEST_S = 3
_BETTER = {Reason.NOT_LONG_ENOUGH, Reason.GAIN_EXCEEDS_COST}
# Near capacity judgements differ from one to the next: a gain that is too small proves nothing.
_IS_BEST = {Reason.SAME_PLAN, Reason.BELOW_PRESENT_NEED, Reason.COST_EXCEEDS_GAIN}
# More than any plan is taken to last.
_NEVER_S = 1e9
# What came of late is told in pieces of so long, and for up to two periods.
_PIECE_S, _PERIOD_S = 15, 300
# Rates before a change are those of so long, or of less where that is all there is.
_BEFORE_S = (900, 300, 60, 10)
# Of requests on one replica, the stay of the longest over the mean.
_LONGEST = 2.0


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
        self.collector = Collector(forecaster.names, size_s=max(3600, 4 * policy.interval_s))
        self.decisions: deque[Decision] = deque(maxlen=policy.decisions)
        self._forecaster = forecaster
        self._detector = detector
        self._lifetime = Lifetime(
            prior_s=policy.lasts_s, most_s=policy.longest_s, lag_s=policy.interval_s
        )
        self._switches: list[float] = []
        self._number = 0
        self._version = 0
        self._window_end_s = -1
        self._detected_s = -1
        self._change_s: float | None = None
        self._again_s: float | None = None
        # For how long another plan was the better one, up to the last judgement, and whether then.
        self._better_s = 0.0
        self._judged_s = -math.inf
        self._was_better = False
        self._began_s = -1
        self._last_arrival_s = -1.0
        self._shrunk = False
        self._held_until_s = 0.0
        self._usual: Floats = np.zeros(len(forecaster.names))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the workload types."""
        return self.collector.names

    # -- watching -------------------------------------------------------------------------------
    def observe(
        self,
        now_s: float,
        batches: Sequence[Batch] = (),
        gauges: Mapping[str, float] | None = None,
    ) -> Trigger | None:
        """Once a second: what was counted since; tells whether a decision is due."""
        for batch in batches:
            self.collector.add(batch)
        self.collector.tick(now_s, gauges)
        end_s = int(now_s) - _LAG_S
        if self._detected_s < 0 or end_s - self._detected_s > self.collector.size_s // 2:
            self._detected_s = end_s
        while self._detected_s < end_s:
            self._detected_s += 1
            self._detect(now_s, self._detected_s)
        if self._window_end_s < 0:
            self._window_end_s = end_s
        due = self._close_windows(end_s)
        # Nobody needs to be sure of rates to bring back replicas that were given up.
        settle_s = min(_FEWEST_S, self.policy.settle_s) if self._shrunk else self.policy.settle_s
        if self._change_s is not None and now_s >= self._change_s + settle_s:
            self._change_s = None
            self._shift()
            self._look_again(now_s)
            return Trigger.CHANGE
        if self._again_s is not None and now_s >= self._again_s:
            self._look_again(now_s)
            return Trigger.CHANGE
        return Trigger.INTERVAL if due else None

    def _detect(self, now_s: float, end_s: int) -> None:
        """Look at one second for a change of the traffic."""
        counts = self.collector.window(end_s, 1).counts
        arrived = float(np.nansum(counts)) > 0
        if arrived:
            self._last_arrival_s = float(end_s)
        changes = self._detector.update(counts)
        if changes or (arrived and self._shrunk):
            if self._change_s is None:
                self._change_s = now_s
                self._again_s = None
            self._began_s = end_s - min((change.ticks for change in changes), default=1)

    def _look_again(self, now_s: float) -> None:
        """When what has changed is half as old again, unless the interval comes first.

        By then another plan may have been the better one for long enough.
        """
        age_s = now_s - self._began_s
        self._again_s = now_s + age_s / 2 if age_s < self.policy.interval_s else None

    def _shift(self) -> None:
        """Tell the forecaster the rates since the change began."""
        self._forecaster.shift(np.array(self.now_rps()) * self._forecaster.interval_s)

    def _close_windows(self, end_s: int) -> bool:
        width_s = self.policy.interval_s
        due = False
        missed = (end_s - self._window_end_s) // width_s
        if missed * width_s > self.collector.size_s - width_s:
            self._forecaster.skip(missed - 1)
            self._window_end_s += (missed - 1) * width_s
        while end_s - self._window_end_s >= width_s:
            self._window_end_s += width_s
            parts = next(p for p in (_PARTS, 5, 4, 3, 2, 1) if width_s % p == 0)
            window = self.collector.window(self._window_end_s, width_s, parts=parts)
            self._forecaster.update(window.counts, window.parts)
            if np.nansum(window.counts) > 0:
                self._usual = 0.8 * self._usual + 0.2 * np.nan_to_num(window.counts) / width_s
            due = True
        return due

    def now_rps(self) -> Rates:
        """Requests/s of each type of late, and of nothing before the last change."""
        end_s = max(1, self.collector.newest_s)
        width_s = min(self.policy.now_s, max(_FEWEST_S, end_s - self._began_s))
        rates = self.collector.rates_rps(end_s, width_s)
        return tuple(np.nan_to_num(rates).tolist())

    def drain_s(self) -> float:
        """Seconds that a replica of late needs to end what it has; 0 where nothing tells.

        What replicas hold over what ends per second is how long a request stays there (Little's
        law), queues and all; the last of them stays longer.
        """
        gauges = self.collector.gauges
        held = gauges.get("running", 0.0) + gauges.get("waiting", 0.0)
        ended_rps = self.collector.ended_rps(max(1, self.collector.newest_s), self.policy.now_s)
        return _LONGEST * held / ended_rps if ended_rps > 0 else 0.0

    def forecast(self) -> tuple[TypeForecast, ...]:
        """Of the next interval, by type."""
        found = self._forecaster.forecast()
        now = self.now_rps()
        low, high = found.quantile_rps(found.quantiles[0]), found.quantile_rps(found.quantiles[-1])
        return tuple(
            TypeForecast(
                name=name,
                now_rps=now[index],
                expected_rps=_number(found.rates_rps[0, index]),
                low_rps=_number(low[0, index]),
                high_rps=_number(high[0, index]),
            )
            for index, name in enumerate(found.names)
        )

    def reached(self, plan: DeploymentPlan) -> None:
        """A switch ended in this plan, which may not be the one that was decided on."""
        if plan != self.plan:
            self.plan = plan
            self._version += 1

    # -- deciding -------------------------------------------------------------------------------
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
        idle_s = now_s - max(self._last_arrival_s, 0.0)
        idle = policy.shrink_after_s > 0 and idle_s >= policy.shrink_after_s
        shrink = idle and self._last_arrival_s >= 0 and not self._shrunk and given is None
        mean = self._forecaster.forecast().rates_rps.mean(axis=0)
        high = self._forecaster.forecast().quantile_counts[-2].mean(axis=0)
        plan_for = [mean, high / self._forecaster.interval_s]
        if shrink:
            plan_for = [self._usual]
        return Question(
            at_s=now_s,
            version=self._version,
            current=replace(self.plan, replicas=tuple(present)) if present else self.plan,
            now_rps=self.now_rps(),
            steps=self._steps(),
            lasts_s=self._lasts_s("", now_s),
            lasting={name: self._lasts_s(name, now_s) for name in self._lifetime.known},
            plan_for=tuple(tuple(np.nan_to_num(rates).tolist()) for rates in plan_for),
            given=given,
            shrink_to=policy.floor_replicas if shrink else 0,
            drain_s=self.drain_s(),
            drain_limit_s=policy.drain_limit_s,
            in_order=policy.in_order,
            past=self._past(),
            before=self._before_rps(),
            back_s=policy.min_dwell_s,
        )

    def _past(self) -> tuple[tuple[Rates, float], ...]:
        """Rates of late, with the seconds that each held.

        They begin where the periods do within which requests are ordered by how fresh they are.
        """
        end_s = self.collector.newest_s
        first_s = end_s - end_s % _PERIOD_S - _PERIOD_S
        found: list[tuple[Rates, float]] = []
        for start_s in range(max(0, first_s), end_s, _PIECE_S):
            width_s = min(_PIECE_S, end_s - start_s)
            rates = self.collector.rates_rps(start_s + width_s, width_s)
            if found or not np.isnan(rates).any():
                found.append((tuple(np.nan_to_num(rates).tolist()), float(width_s)))
        return tuple(found)

    def _before_rps(self) -> Rates:
        """Requests/s of each type before the last change; empty where none is known of."""
        held = range(1, self.collector.size_s - (self.collector.newest_s - self._began_s))
        for width_s in _BEFORE_S if self._began_s > 0 else ():
            if width_s in held:
                rates = self.collector.rates_rps(self._began_s, width_s)
                if not np.isnan(rates).any():
                    return tuple(rates.tolist())
        return ()

    def _lasts_s(self, signature: str, now_s: float) -> float:
        """For how long this deployment is expected to be the best."""
        return max(1.0, self._lifetime.expected_s(signature, now_s))

    def _steps(self) -> tuple[Step, ...]:
        """The forecast's quantiles, each for the chances nearest to it, step after step."""
        found = self._forecaster.forecast()
        ends = [0.0, *((a + b) / 2 for a, b in pairwise(found.quantiles)), 1.0]
        rates = np.nan_to_num(found.quantile_counts / found.interval_s)
        steps = []
        for step in range(rates.shape[1]):
            chances: dict[Rates, float] = {}
            for level, (low, high) in enumerate(pairwise(ends)):
                key = tuple(rates[level, step].tolist())
                chances[key] = chances.get(key, 0.0) + high - low
            expected = tuple(np.nan_to_num(found.rates_rps[step]).tolist())
            steps.append(Step(seconds=found.interval_s, chances=chances, expected=expected))
        return tuple(steps)

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
        if weighed is not None and question.given is None and not question.shrink_to:
            more = weighed.candidate_rps - weighed.current_rps
            better = more > self.policy.min_gain * weighed.current_rps
            self._prefer(signature(weighed.plan) if better else "", now_s)
        standing = Standing(
            now_s=now_s,
            trigger=trigger,
            switches=tuple(self._switches),
            switching=switching or question.version != self._version,
            shrunk=self._shrunk,
            watched=self._last_arrival_s >= 0,
            held=now_s < self._held_until_s,
            better_s=self._better_for(now_s),
            known=self._lifetime.knows,
        )
        reason = reason_for(self.policy, standing, question, weighed)
        self._note_better(reason, now_s)
        verdict = verdict_for(self.policy, trigger, reason)
        decision = self._record(question, weighed, now_s, trigger, verdict, reason)
        if verdict is Verdict.SWITCH and weighed is not None:
            self._shrunk = reason is Reason.ZERO_TRAFFIC
            self._held_until_s = now_s + self.policy.hold_s if reason is Reason.MANUAL else 0.0
            self._better_s, self._was_better = 0.0, False
            self.plan = weighed.plan
            self._lifetime.takes_over(signature(self.plan))
            self._version += 1
            # A person's switches count as well: it is the replicas that need their rest.
            if weighed.cost.changed or reason is not Reason.MANUAL:
                self._switches = [s for s in self._switches if now_s - s < HOUR_S] + [now_s]
        return decision

    def _prefer(self, better: str, now_s: float) -> None:
        """Note which plan is the best, the current one if no other is ``better``.

        Of several that are better in turns the first stands for all.
        """
        current = signature(self.plan)
        if better and self._lifetime.preferred not in {"", current}:
            better = self._lifetime.preferred
        self._lifetime.prefers(better or current, now_s)

    def _better_for(self, now_s: float) -> float:
        """For how long another plan has been the better one, if one is: since a change at least."""
        if self._shrunk:
            return math.inf
        if self._began_s > max(self._judged_s, 0.0):
            return now_s - self._began_s
        return self._better_s + (now_s - self._judged_s if self._was_better else 0.0)

    def _note_better(self, reason: Reason, now_s: float) -> None:
        better = reason in _BETTER
        if better and not self._shrunk:
            self._better_s = self._better_for(now_s)
        elif reason in _IS_BEST or self._began_s > self._judged_s:
            self._better_s = 0.0
        self._judged_s, self._was_better = now_s, better

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
                "better_s": self._better_s,
            }
        self._number += 1
        decision = Decision(
            number=self._number,
            at_s=now_s,
            trigger=trigger,
            verdict=verdict,
            reason=reason,
            current_plan=question.current.id,
            forecast=self.forecast(),
            **numbers,
        )
        self.decisions.append(decision)
        return decision

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain data that ``restore`` takes: all but the plan and the records of decisions."""
        return {
            "collector": self.collector.state(),
            "forecaster": self._forecaster.state(),
            "detector": self._detector.state(),
            "lifetime": self._lifetime.state(),
            "switches": list(self._switches),
            "number": self._number,
            "began_s": self._began_s,
            "window_end_s": self._window_end_s,
            "last_arrival_s": self._last_arrival_s,
            "shrunk": self._shrunk,
            "held_until_s": self._held_until_s,
            "usual": self._usual.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; of the same types. Raises OServeError if it is not."""
        self._forecaster.restore(state["forecaster"])
        self._detector.restore(state["detector"])
        self.collector.restore(state["collector"])
        self._usual = np.array(state["usual"], dtype=np.float64)
        self.restore_course(state)

    def restore_course(self, state: Mapping[str, Any]) -> None:
        """Of ``state`` only what does not depend on types."""
        self._lifetime.restore(state["lifetime"])
        self._switches = [float(at_s) for at_s in state["switches"]]
        self._number = int(state["number"])
        self._began_s = int(state.get("began_s", -1))
        self._window_end_s = int(state["window_end_s"])
        self._last_arrival_s = float(state["last_arrival_s"])
        self._shrunk = bool(state["shrunk"])
        self._held_until_s = float(state["held_until_s"])

    def replay_history(self, history: Floats) -> None:
        """Windows of counts, (n, k), oldest first, for a forecaster that has seen none."""
        replayed(self._forecaster, history)


def _number(value: Any) -> float:
    return float(np.nan_to_num(value))
