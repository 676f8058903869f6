"""Other systems' policies, each on the best homogeneous deployment with the best chunk budget.

That shape is found in hindsight, which none of the originals does. It stands for what an expert
would set up before the policy takes over.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from oserve.core import DeploymentPlan
from oserve.evaluate.simulator import (
    Floats,
    Ints,
    Levers,
    Routing,
    SimulatedServing,
    SimulatedTraffic,
)
from oserve.perf import TokenCosts
from oserve.sim.types import Rebalance
from oserve.study.policy import Conduct, Fixed, Policy, PolicyView
from oserve.study.tune import Tuner


def llumnix(tuner: Tuner) -> Policy:
    """Dispatch by freeness, live migration from full to free replicas."""
    levers = Levers(routing=Routing.FREENESS, rebalance=Rebalance())
    return Fixed(serving=replace(tuner.best_chunk.serving, levers=levers))


def llmd(tuner: Tuner) -> Policy:
    """Least predicted latency: outstanding work and the request's own, by its length bucket."""
    levers = Levers(routing=Routing.LEAST_WORK)
    return Fixed(serving=replace(tuner.best_chunk.serving, levers=levers))


@dataclass(slots=True, kw_only=True)
class Dynamo:
    """As many replicas of one shape as the forecast of the mean load needs, with cold starts.

    ``replica_work``: the profiled load of one replica within the SLO, in expected engine seconds
    per second, by ``costs``. The forecast is an exponential moving average of past rates, times the
    work of a recent request (Dynamo's planner predicts mean lengths, too), times ``headroom``.
    """

    serving: SimulatedServing
    replica_work: float
    costs: TokenCosts
    interval_s: float
    headroom: float = 1.1
    weight: float = 0.5
    conduct: Conduct = field(default_factory=lambda: Conduct(decides=True))

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        forecast = 0.0
        for count in seen.counts.sum(axis=1):
            rate = float(count) / self.interval_s
            forecast = rate if forecast == 0.0 else forecast + self.weight * (rate - forecast)
        replicas = self.serving.plan.replicas
        work = forecast * request_work_s(self.costs, seen.recent)
        needed = math.ceil(work * self.headroom / self.replica_work)
        kept = replicas[: max(1, min(len(replicas), needed))]
        if set(kept) == set(seen.plan.replicas):
            return None
        return replace(seen.plan, replicas=kept)


def dynamo(tuner: Tuner) -> Policy:
    """See ``Dynamo``. The router knows the outstanding work of each replica."""
    found = tuner.best_chunk
    replicas = found.serving.plan.replicas
    costs = tuner.simulator.costs(replicas[0].shape)
    learned = tuner.scene.learned
    work = found.scale * learned.rate_rps * request_work_s(costs, learned)
    return Dynamo(
        serving=replace(found.serving, levers=Levers(routing=Routing.LEAST_WORK)),
        replica_work=work / len(replicas),
        costs=costs,
        interval_s=tuner.scene.interval_s,
    )


def request_work_s(costs: TokenCosts, traffic: SimulatedTraffic) -> float:
    """The engine seconds expected for a mean request; 0 without requests."""
    if not len(traffic):
        return 0.0
    prompt, output = float(traffic.prompt_tokens.mean()), float(traffic.output_tokens.mean())
    return prompt * costs.prefill_s_per_token + output * costs.decode_s_per_token


@dataclass(slots=True, kw_only=True)
class AiBrix:
    """Each length class has its own replicas; their number follows its share of the work.

    All replicas are of one shape, so one changes its class without a restart. Requests overflow to
    replicas of other classes as they do in OServe.
    """

    tuner: Tuner
    serving: SimulatedServing
    conduct: Conduct = field(default_factory=lambda: Conduct(decides=True))

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        learned = self.tuner.scene.learned
        classes = self.serving.plan.length_classes
        bounds = [item.max_prompt_tokens for item in classes[:-1]]
        index = np.searchsorted(np.array(bounds), learned.prompt_tokens, side="left")
        counts = np.bincount(index, minlength=len(classes))
        plan = replace(self.serving.plan, routing_shares=self._shares(counts))
        return replace(self.serving, plan=plan)

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        shares = self._shares(seen.counts[-1])
        if shares == seen.plan.routing_shares:
            return None
        return replace(seen.plan, routing_shares=shares)

    def _shares(self, counts: Ints) -> Mapping[str, Mapping[str, float]]:
        """Consecutive replicas for each class, at least one; the rest by largest remainder."""
        plan = self.serving.plan
        names = [spec.id for spec in plan.replicas]
        classes = plan.length_classes
        if len(names) < len(classes) or not counts.sum():
            return {}
        work = counts * self._work()
        quota = work / work.sum() * len(names)
        given = np.maximum(1, np.floor(quota)).astype(int)
        while given.sum() != len(names):
            missing = int(np.sign(len(names) - given.sum()))
            slack = np.where((given > 1) | (missing > 0), (quota - given) * missing, -np.inf)
            given[int(np.argmax(slack))] += missing
        ends = np.cumsum(given)
        return {
            item.name: dict.fromkeys(names[end - count : end], 1.0 / count)
            for item, count, end in zip(classes, given.tolist(), ends.tolist(), strict=True)
        }

    def _work(self) -> Floats:
        """The engine seconds of a mean request, by length class."""
        shape = self.serving.plan.replicas[0].shape
        costs = self.tuner.simulator.costs(shape)
        learned = self.tuner.scene.learned
        classes = self.serving.plan.length_classes
        bounds = [item.max_prompt_tokens for item in classes[:-1]]
        index = np.searchsorted(np.array(bounds), learned.prompt_tokens, side="left")
        tokens = np.bincount(index, learned.prompt_tokens, len(classes))
        prompts = tokens / np.maximum(1, np.bincount(index, minlength=len(classes)))
        outputs = np.array([item.output_tokens for item in classes])
        work: Floats = prompts * costs.prefill_s_per_token + outputs * costs.decode_s_per_token
        return work


def aibrix(tuner: Tuner) -> Policy:
    """See ``AiBrix``."""
    serving = replace(tuner.best_chunk.serving, levers=Levers(routing=Routing.POOLS))
    return AiBrix(tuner=tuner, serving=serving)
