"""The live controller in the simulator: counted, asked and followed as on a server.

Each (virtual) second it is fed what ``gateway.estimator`` makes of the requests that came and
ended; it never sees the length of an answer before that ends. What a decision takes to compute
takes no virtual time.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from oserve.control.decision import Decision, Mode, Verdict
from oserve.control.dispatch.table import RoutingTable
from oserve.control.evaluation import Question, Weighed
from oserve.control.planner import TablePlanner
from oserve.control.planning import planner_for
from oserve.control.policy import ControlPolicy
from oserve.control.runtime import ControllerRuntime, Scorer, SimulatedScore
from oserve.control.speed import SpeedEstimator
from oserve.control.starts import StartTimes
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan, ReplicaShape
from oserve.evaluate.capacities import Lengths, simulated_table
from oserve.evaluate.simulator import Mask, Routing, Serving, Simulator, Traffic, met
from oserve.evaluate.switch_simulation import HOPELESS
from oserve.evaluate.workload import Prospect, prospect
from oserve.gateway.estimator import RequestEstimate, RequestEstimator
from oserve.gateway.settings import MoveSettings
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.table import PerformanceSource
from oserve.sim.types import Status
from oserve.study.moving import TransferTimes
from oserve.study.ours import OServeTuner
from oserve.study.policy import Conduct, Fixed, Moment, Policy, Start, Steer
from oserve.study.runner import Run, run_policy
from oserve.study.scene import Scene
from oserve.workload.chances import TypeChances
from oserve.workload.output import KnownAtArrival

_SHARES_INTERVAL_S = 5.0
_DRAIN_LIMIT_S = MoveSettings().drain_limit_s or math.inf
_CHUNKS = (512, 1024, 2048)


@dataclass(slots=True, kw_only=True)
class Steered:
    """What ``planner`` knows and ``starts_s`` begin each run; ``control`` as on a server.

    ``doubts``: a simulation must confirm switches (``scorer``). ``script``: instead of following
    decisions, go to these plans at these seconds. ``source``: what step times are taken to be,
    which is corrected by those that are seen; ``None``: it is not, and ``speeds`` hold.
    """

    serving: Serving
    planner: TablePlanner
    starts_s: float
    control: ControlPolicy
    conduct: Conduct
    doubts: bool = False
    scorer: Scorer | None = None
    script: Sequence[tuple[float, DeploymentPlan]] | None = None
    source: PerformanceSource | None = None
    speeds: Speeds = field(default_factory=Speeds)
    decisions: list[Decision] = field(default_factory=list)
    _helm: ControllerRuntime | None = None
    _counts: "Counts | None" = None
    _traffic: Traffic | None = None

    @property
    def shapes(self) -> Sequence[tuple[ReplicaShape, int]]:
        """What serves at first, with counts."""
        return self.serving.shapes

    def initial(self, scale: float) -> Serving:
        del scale
        return self.serving

    def decide(self, seen: object) -> DeploymentPlan | None:
        del seen
        return None

    def begin(self, traffic: Traffic) -> None:
        """A run begins; nothing is remembered of others."""
        starts = StartTimes(self.starts_s)
        # A planner remembers the last basis of its programmes, which may tip a tie.
        planner = TablePlanner(replace(self.planner.facts, start_s=starts.start_s))
        planner.correct(self.speeds)
        self._helm = ControllerRuntime(
            self.serving.plan,
            policy=self.control,
            planner=planner,
            starts=starts,
            shares_interval_s=_SHARES_INTERVAL_S,
            scorer=self.scorer,
            watch=None if self.source is None else SpeedEstimator(self.source),
        )
        self._counts = Counts(self._helm.controller.plan, traffic)
        self._traffic = traffic
        self.decisions = []

    def second(self, moment: Moment) -> Steer:
        """A second has passed: count it, decide where that is due."""
        helm = self._helm
        assert helm is not None
        assert self._counts is not None
        trigger = None
        if self._counting:
            batch = self._counts.batch(moment)
            trigger = helm.observe(moment.now_s, [batch], moment.observation, moment.queued)
        plan = self._scripted(moment.now_s)
        if trigger is not None and self.script is None and self.control.mode is not Mode.OFF:
            question = helm.controller.ask(moment.now_s)
            decision = helm.controller.judge(
                question,
                helm.weighed(question),
                now_s=moment.now_s,
                trigger=trigger,
                switching=moment.switching,
            )
            self.decisions.append(decision)
            if decision.verdict is Verdict.SWITCH:
                plan = helm.controller.plan
        target = plan or moment.plan
        if self.serving.levers.routing is not Routing.POOLS:
            return Steer(plan=plan)
        return Steer(plan=plan, routed=helm.routed(target, moment.observation, moment.now_s))

    @property
    def _counting(self) -> bool:
        """A script needs the rates for routing shares only."""
        return self.script is None or self.serving.levers.routing is Routing.POOLS

    def _scripted(self, now_s: float) -> DeploymentPlan | None:
        due = [plan for at_s, plan in self.script or () if at_s == now_s]
        return due[-1] if due else None


def steered(
    tuner: OServeTuner,
    *,
    start: Start,
    serving: Serving | None = None,
    simulated: bool = True,
    control: ControlPolicy | None = None,
) -> Steered:
    """The controller, beginning with a serving (by default the best static one of OServe).

    ``simulated``: capacities in its table are simulated ones, and a simulation must confirm a
    switch; else all is the linear model's.
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
    policy = Steered(
        serving=first,
        planner=table_planner(tuner, first, simulated=simulated),
        starts_s=0.0,
        control=bounds,
        conduct=Conduct(steers=True),
        doubts=simulated,
        source=scene.source,
    )
    return started(tuner, policy, start)


def started(tuner: OServeTuner, policy: Steered, start: Start) -> Steered:
    """The same controller where replicas start in another way."""
    scene = tuner.scene
    cold_s = max(scene.phases.load_s(scene.weights_bytes(item)) for item, _ in policy.shapes)
    usual_s = TransferTimes(scene).usual_s if start is Start.TRANSFER else cold_s
    # Streams go on elsewhere as by the gateway's default; who restarts replicas waits for them.
    limit_s = _DRAIN_LIMIT_S if start is Start.TRANSFER else policy.conduct.drain_limit_s
    made = replace(
        policy,
        starts_s=usual_s,
        conduct=replace(policy.conduct, start=start, drain_limit_s=limit_s),
        control=replace(policy.control, drain_limit_s=limit_s),
    )
    return replace(made, scorer=SwitchSimulation(tuner, made)) if policy.doubts else made


class SwitchSimulation:
    """What a switch is worth by simulating it: the expected rates with it and without.

    Requests go to the least work.
    """

    def __init__(self, tuner: OServeTuner, policy: Steered) -> None:
        self._tuner, self._policy = tuner, policy
        self._speeds, self._simulator = Speeds(), tuner.simulator
        self._lengths = lengths_by_type(tuner.scene, policy.planner.facts.centres)
        self._kept: tuple[tuple[Question, float] | None, Mask] = None, np.zeros(0, dtype=bool)

    def __call__(self, question: Question, found: Weighed) -> SimulatedScore:
        """Requests within the SLO, with the switch and without.

        Where a backlog makes all late either way, what counts is what comes after it.
        """
        judged = self._judged(question, found)
        best_rps = max(judged.current_rps, judged.candidate_rps)
        if not question.past or best_rps > HOPELESS * sum(question.steps[0].expected):
            return judged
        return self._judged(replace(question, past=()), found)

    def _judged(self, question: Question, found: Weighed) -> SimulatedScore:
        scene = self._tuner.scene
        ahead = prospect(question, found.lasts_s, self._lengths, seed=scene.seed)
        if not len(ahead.traffic):
            return SimulatedScore(current_rps=0.0, candidate_rps=0.0, worth=0.0)
        levers = replace(self._policy.serving.levers, routing=Routing.LEAST_WORK)
        now, new = (Serving(plan=plan, levers=levers) for plan in (question.current, found.plan))
        self._at(question.speeds)
        # What the present plan does is the same for all candidates.
        if self._kept[0] != (question, ahead.then_s):
            self._kept = (question, ahead.then_s), self._met(Fixed(serving=now), ahead.traffic)
        kept = self._kept[1]
        less = float((kept & ahead.expected).sum())
        # What it would be if the other one had been there all along is soon simulated.
        moved = self._met(Fixed(serving=new), ahead.traffic)
        pays_s = math.inf
        if (moved & ahead.expected).sum() > (1.0 + self._policy.control.min_gain) * less:
            script = ((round(ahead.now_s), found.plan),)
            moves = replace(
                self._policy, serving=now, script=script, source=None, speeds=question.speeds
            )
            moved = self._met(moves, ahead.traffic)
            pays_s = _pays_after_s(ahead, kept, moved)
        more = float((moved & ahead.expected).sum())
        later = float((moved & ahead.later).sum()) - float((kept & ahead.later).sum())
        return SimulatedScore(
            current_rps=less / ahead.lasting_s,
            candidate_rps=more / ahead.lasting_s,
            worth=(more - less) * found.lasts_s / ahead.lasting_s + later,
            pays_after_s=pays_s,
        )

    def _met(self, policy: Policy, traffic: Traffic) -> Mask:
        # A run has an event loop of its own, which another thread must have.
        with ThreadPoolExecutor(1) as other:
            run = other.submit(self._run, policy, traffic).result()
        return met(run.results, self._tuner.scene.slo)

    def _run(self, policy: Policy, traffic: Traffic) -> Run:
        return run_policy(self._tuner.scene, policy, self._simulator, 1.0, traffic=traffic)

    def _at(self, speeds: Speeds) -> None:
        """Simulate replicas of these speeds from now on."""
        if speeds != self._speeds:
            source = self._tuner.simulator.source
            self._speeds, self._simulator = speeds, Simulator(corrected(source, speeds))


def _pays_after_s(ahead: Prospect, kept: Mask, moved: Mask) -> float:
    """From when on the switch would have brought more than it cost, whenever it ends after that."""
    expected = ahead.expected
    later = min(0, int((moved & ahead.later).sum()) - int((kept & ahead.later).sum()))
    brought = np.cumsum(moved[expected].astype(int) - kept[expected].astype(int)) + later
    if not len(brought) or brought[-1] <= 0:
        return math.inf
    behind = np.flatnonzero(brought <= 0)
    if not len(behind):
        return 0.0
    return float(ahead.traffic.arrival_s[expected][behind[-1]]) - ahead.now_s


def table_planner(tuner: OServeTuner, serving: Serving, *, simulated: bool) -> TablePlanner:
    """The planner as on a server, for every form with the usual chunk budgets."""
    scene = tuner.scene
    shapes = tuner.forms(_CHUNKS, serving.plan.replicas[0].shape.max_num_seqs)
    question = replace(tuner.question, shapes=tuple(shapes), candidates=0, min_gain=0.03)
    planner = planner_for(question, StartTimes(0.0))
    if not simulated:
        return planner
    facts = planner.facts
    table = simulated_table(
        tuner.simulator,
        facts.table,
        lengths_by_type(scene, facts.centres),
        devices=scene.devices,
        classes=facts.classes,
        levers=serving.levers,
        slo=scene.slo,
        seed=scene.seed,
    )
    return TablePlanner(replace(facts, table=table))


def lengths_by_type(scene: Scene, centres: Sequence[tuple[float, float]]) -> list[Lengths]:
    """The lengths of the learned traffic, by the type that each request is of."""
    chances, learned = TypeChances(centres), scene.learned
    lengths = zip(learned.prompt_tokens.tolist(), learned.output_tokens.tolist(), strict=True)
    kinds = np.array([chances.kind(prompt, output) for prompt, output in lengths])
    return [
        Lengths(
            prompt_tokens=learned.prompt_tokens[kinds == kind],
            output_tokens=learned.output_tokens[kinds == kind],
        )
        for kind in range(len(centres))
    ]


class Counts:
    """What the gateway would have counted, second by second, for the types of a plan."""

    def __init__(self, plan: DeploymentPlan, traffic: Traffic) -> None:
        self._traffic = traffic
        self._foresight = RequestEstimator()
        self._foresight.follow(
            RoutingTable(
                plan_id=plan.id,
                workload_types=plan.workload_types,
                routing_shares=plan.routing_shares,
                replicas=(),
                types=plan.types,
            )
        )
        self._open: dict[int, RequestEstimate] = {}

    def batch(self, moment: Moment) -> Batch:
        """Of the requests that came and ended since the last."""
        foresight, traffic = self._foresight, self._traffic
        for number in range(*moment.came):
            known = KnownAtArrival(prompt_tokens=int(traffic.prompt_tokens[number]))
            expected = foresight.estimate_known(known, arrived_s=float(traffic.arrival_s[number]))
            foresight.tally.arrived(expected.arrived_s, expected.chances)
            self._open[number] = expected
        for number, status in moment.ended:
            foresight.ended(
                self._open.pop(number),
                completed=status == Status.COMPLETED,
                prompt_tokens=int(traffic.prompt_tokens[number]),
                output_tokens=int(traffic.output_tokens[number]),
                now_s=moment.now_s,
            )
        taken = foresight.tally.take()
        foresight.tally.acknowledge(taken.number)
        return taken
