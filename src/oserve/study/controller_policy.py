"""The live controller as a policy in the simulator, fed as on a server.

Each virtual second the controller receives what the gateway's request estimator makes of the
requests that arrived and ended; it never sees the length of an answer before the request ends. It
scores switches with the code of the server (``evaluate``). Decisions take no virtual time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from oserve.control.decision import Decision, DecisionVerdict, Mode
from oserve.control.evaluation import CandidateScore
from oserve.control.following import FollowPolicy, FollowScore
from oserve.control.ladder import Goal
from oserve.control.planner import PlannerFacts, TablePlanner
from oserve.control.planning import planner_for
from oserve.control.policy import ControlPolicy
from oserve.control.recording import ObservationRecorder, ObservedSecond, decide_second
from oserve.control.runtime import ControllerRuntime
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan, Objective, ReplicaShape
from oserve.evaluate.capacities import lengths_by_type
from oserve.evaluate.ladder_maker import LadderCache, LadderFeed, ladder_model
from oserve.evaluate.simulator import Routing, SimulatedServing, SimulatedTraffic
from oserve.evaluate.switch_scorer import EvaluationModel, SwitchScorer, model_of
from oserve.evaluate.switch_simulation import SwitchSimulation, simulated_facts
from oserve.gateway.settings import MoveSettings
from oserve.perf.corrected import Speeds
from oserve.perf.table import PerformanceSource
from oserve.study.ours import OServeTuner
from oserve.study.policy import Conduct, Moment, PolicyStart, PolicyUpdate, PolicyView
from oserve.study.scene import Scene
from oserve.study.traffic_counter import TrafficCounter
from oserve.study.transfers import scene_switch_facts, usual_start_s
from oserve.switching.prices import SwitchPrices

_SHARES_INTERVAL_S = 5.0
_DRAIN_LIMIT_S = MoveSettings().drain_limit_s or math.inf
_CHUNKS = (512, 1024, 2048)
_MIN_PLAN_GAIN = 0.03
# The share of requests that an hour's plan must serve in time, with some room for chance.
_ATTAINMENT = {Objective.LATENCY: 0.96, Objective.ENERGY: 0.99}
_LADDER_CHUNKS = (512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerPolicy:
    """Every run begins with ``facts`` and ``starts_s``; ``control`` is the policy as on a server.

    ``model``: what switches are simulated with; ``None``: the linear model decides. ``script``: go
    to these plans at these seconds, and make no decisions. ``source``: the step times that the
    controller assumes and corrects by the observed ones; ``None``: ``speeds`` stay as they are.
    ``recorder`` records what the controller observes. ``ladders``: follow the load on these.
    """

    serving: SimulatedServing
    facts: PlannerFacts
    starts_s: float
    control: ControlPolicy
    conduct: Conduct
    model: EvaluationModel | None = None
    script: Sequence[tuple[float, DeploymentPlan]] | None = None
    source: PerformanceSource | None = None
    speeds: Speeds = field(default_factory=Speeds)
    shares_interval_s: float = _SHARES_INTERVAL_S
    recorder: ObservationRecorder | None = None
    ladders: LadderCache | None = None

    @property
    def shapes(self) -> Sequence[tuple[ReplicaShape, int]]:
        """The shapes of the first plan, with counts."""
        return self.serving.shapes

    def initial(self, scale: float) -> SimulatedServing:
        """See ``Policy``."""
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        """See ``Policy``: this policy decides in its session."""
        del seen
        return None

    def begin(self, traffic: SimulatedTraffic) -> "ControllerSession":
        """See ``ControlledPolicy``. A session remembers nothing of others."""
        return ControllerSession(self, traffic)

    def runtime(self) -> ControllerRuntime:
        """A controller runtime that has seen nothing yet."""
        starts = StartTimes(self.starts_s)
        # A planner keeps the last basis of its linear programmes, which may tip a tie, so every
        # run has a planner of its own.
        planner = TablePlanner(replace(self.facts, start_s=starts.start_s))
        planner.correct(self.speeds)
        scorer = None
        if self.model is not None:
            scorer = SwitchSimulation(SwitchScorer(self.model), planner)
        speed = None
        if self.source is not None:
            speed = SpeedEstimator(self.source)
            speed.speeds = self.speeds
        return ControllerRuntime(
            self.serving.plan,
            policy=self.control,
            planner=planner,
            starts=starts,
            shares_interval_s=self.shares_interval_s,
            scorer=scorer,
            speeds=speed,
        )


class ControllerSession:
    """One run under a controller; see ``PolicySession``."""

    def __init__(self, policy: ControllerPolicy, traffic: SimulatedTraffic) -> None:
        self.runtime = policy.runtime()
        self.counter = TrafficCounter(self.runtime.controller.plan, traffic)
        self.outcomes: list[tuple[Decision, CandidateScore | FollowScore | None]] = []
        """The decisions so far, each with the score that it was based on."""
        self._policy = policy
        self._feed = None if policy.ladders is None else LadderFeed(policy.ladders)

    @property
    def decisions(self) -> Sequence[Decision]:
        """See ``PolicySession``."""
        return [decision for decision, _ in self.outcomes]

    def second(self, moment: Moment) -> PolicyUpdate:
        """Count what arrived and ended; decide if a decision is due."""
        policy, runtime = self._policy, self.runtime
        plan = self._scripted(moment.now_s)
        # A script needs the current rates for routing shares only.
        if policy.script is None or self._shares_count:
            plan = self._observed(moment) or plan
        target = plan or moment.plan
        if not self._shares_count:
            return PolicyUpdate(plan=plan)
        routed = runtime.routed(target, moment.observation, moment.now_s)
        return PolicyUpdate(plan=plan, routed=routed)

    def reached(self, plan: DeploymentPlan) -> None:
        """See ``PolicySession``."""
        self.runtime.controller.reached(self.runtime.typed(plan))

    @property
    def _shares_count(self) -> bool:
        """Whether the gateway routes by shares."""
        return self._policy.serving.levers.routing is Routing.POOLS

    def _observed(self, moment: Moment) -> DeploymentPlan | None:
        """Tell the runtime what was observed; return the plan that it switches to."""
        policy, runtime = self._policy, self.runtime
        second = ObservedSecond(
            now_s=moment.now_s,
            batches=(self.counter.batch(moment),),
            observation=moment.observation,
            queued=moment.queued,
            switching=moment.switching,
        )
        if policy.recorder is not None:
            policy.recorder.add(second)
        if policy.script is not None or policy.control.mode is Mode.OFF:
            runtime.observe(second.now_s, second.batches, second.observation, second.queued)
            return None
        if self._feed is not None:
            self._feed.tick(runtime, second.now_s)
        found = decide_second(runtime, second)
        if found is None:
            return None
        self.outcomes.append(found)
        decision, _ = found
        return runtime.controller.plan if decision.verdict is DecisionVerdict.SWITCH else None

    def _scripted(self, now_s: float) -> DeploymentPlan | None:
        due = [plan for at_s, plan in self._policy.script or () if at_s == now_s]
        return due[-1] if due else None


def controller_policy(
    tuner: OServeTuner,
    *,
    start: PolicyStart,
    serving: SimulatedServing | None = None,
    simulated: bool = True,
    control: ControlPolicy | None = None,
    objective: Objective = Objective.CAPACITY,
    mixed: bool = True,
) -> ControllerPolicy:
    """The controller, starting from a serving (by default the best static one of OServe).

    ``simulated``: capacities and switches are simulated, as on a server with ``control.simulate``;
    else the linear model decides. ``objective``: latency and energy follow the load on a ladder,
    with deployments of two shapes if ``mixed``.
    """
    scene = tuner.scene
    first = serving or tuner.everything.serving
    levers = first.levers
    fresh = levers.order is not None and levers.order.freshest_first_s > 0
    bounds = replace(
        control or ControlPolicy(),
        interval_s=round(scene.interval_s),
        now_s=min(30, round(scene.interval_s)),
        in_order=not fresh and levers.gateway.demote_after_s is None,
    )
    facts = _linear_facts(tuner, first)
    model = None
    ladders = None
    if objective is not Objective.CAPACITY:
        goal = Goal(objectives=(objective,) * len(facts.types), attainment=_ATTAINMENT[objective])
        bounds = replace(bounds, follow=FollowPolicy(goal=goal))
        seqs = first.plan.replicas[0].shape.max_num_seqs
        request = replace(tuner.question, shapes=tuple(tuner.forms(_LADDER_CHUNKS, seqs)))
        lengths = lengths_by_type(scene.learned, facts.centres)
        made = ladder_model(request, goal, lengths=lengths, levers=levers)
        ladders = LadderCache(replace(made, mixed=mixed))
    elif simulated:
        model = model_of(
            tuner.question,
            lengths=lengths_by_type(scene.learned, facts.centres),
            levers=levers,
            min_gain=bounds.min_gain,
        )
        facts = simulated_facts(facts, SwitchScorer(model))
    policy = ControllerPolicy(
        serving=first,
        facts=facts,
        starts_s=0.0,
        control=bounds,
        conduct=Conduct(),
        model=model,
        source=scene.source,
        ladders=ladders,
    )
    return with_start(scene, policy, start)


def with_start(scene: Scene, policy: ControllerPolicy, start: PolicyStart) -> ControllerPolicy:
    """The same controller on a cluster whose replicas start in another way."""
    cold_s = max(scene.phases.load_s(scene.weights_bytes(item)) for item, _ in policy.shapes)
    moves = start is PolicyStart.TRANSFER
    usual_s = usual_start_s(scene.switch_costs) if moves else cold_s
    # Streams move as by the gateway's default. Restarts wait for the running requests.
    limit_s = _DRAIN_LIMIT_S if moves else policy.conduct.drain_limit_s
    legs = SwitchPrices(scene_switch_facts(scene)).legs if moves else None
    return replace(
        policy,
        facts=replace(policy.facts, legs=legs),
        starts_s=usual_s,
        conduct=replace(policy.conduct, start=start, drain_limit_s=limit_s),
        control=replace(policy.control, drain_limit_s=limit_s),
    )


def _linear_facts(tuner: OServeTuner, serving: SimulatedServing) -> PlannerFacts:
    """The planner's facts as on a server, for every form with the usual chunk budgets."""
    shapes = tuner.forms(_CHUNKS, serving.plan.replicas[0].shape.max_num_seqs)
    request = replace(tuner.question, shapes=tuple(shapes), candidates=0, min_gain=_MIN_PLAN_GAIN)
    return planner_for(request, StartTimes(0.0)).facts
