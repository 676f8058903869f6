"""The controller, switch by switch, against static deployments and an oracle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oserve.control.decision import Decision
from oserve.control.policy import ControlPolicy
from oserve.core import Objective
from oserve.evaluate.simulator import Routing, SimulatedServing, SimulatedTraffic
from oserve.study.controller_policy import ControllerPolicy, controller_policy, with_start
from oserve.study.counterfactual import SwitchWorth, switch_worths
from oserve.study.ours import OServeTuner
from oserve.study.policy import Fixed, Policy, PolicyStart
from oserve.study.run import Run
from oserve.study.runner import run_policy
from oserve.study.switching import Oracle, Reload
from oserve.study.tune import MeasuredServing


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCourse:
    """One policy at one load; ``worths`` of its switches where they were asked for."""

    policy: str
    factor: float
    p99_e2e_s: float
    p99_ttft_s: float
    goodput_rps: float
    slo_attainment: float
    switches: int
    hours: float
    worths: tuple[SwitchWorth, ...] = ()
    decisions: tuple[Decision, ...] = ()
    changes: tuple[tuple[float, tuple[tuple[str, int], ...]], ...] = ()

    @property
    def switches_per_hour(self) -> float:
        """Over the whole course."""
        return self.switches / self.hours


def contenders(
    tuner: OServeTuner, serving: SimulatedServing, control: ControlPolicy | None = None
) -> dict[str, Policy]:
    """The policies to compare, by name; those of OServe begin with ``serving``."""
    transfer = controller_policy(
        tuner, start=PolicyStart.TRANSFER, serving=serving, control=control
    )
    linear = controller_policy(
        tuner, start=PolicyStart.TRANSFER, serving=serving, control=control, simulated=False
    )
    return {
        "static-best": Fixed(serving=tuner.best.serving),
        "static-best-tuned": Fixed(serving=tuner.best_tuned.serving),
        "oserve-static": Fixed(serving=serving),
        "reload": Reload(tuner=tuner, serving=tuner.best_chunk.serving),
        "linear table": linear,
        "controller, reload": with_start(tuner.scene, transfer, PolicyStart.COLD),
        "controller, transfer": transfer,
        "follower, transfer": controller_policy(
            tuner,
            start=PolicyStart.TRANSFER,
            serving=serving,
            control=control,
            objective=Objective.LATENCY,
        ),
        "oracle": Oracle(tuner=tuner, serving=serving, library=library(tuner, transfer)),
    }


def own(tuner: OServeTuner) -> MeasuredServing:
    """OServe's static serving, as far as this experiment searches it.

    It is the tuned serving, with the freshest first where that helps. Requests go to the replica
    with the least expected work, so that no old routing shares favour one deployment.
    """
    tuned = tuner.best_tuned
    levers = replace(tuned.serving.levers, routing=Routing.LEAST_WORK)
    found = tuner.race([replace(tuned.serving, levers=levers)], tuned)
    return tuner.race(tuner.ordered(replace(found.serving, levers=levers)), found)


def library(tuner: OServeTuner, policy: ControllerPolicy) -> list[SimulatedServing]:
    """Every homogeneous deployment that the controller may choose, and the static best."""
    rows = policy.facts.table
    found = [tuner.homogeneous(row.shape, policy.serving.levers) for row in rows]
    return [policy.serving, *found]


def courses(
    tuner: OServeTuner,
    factors: Sequence[float],
    *,
    drawings: Sequence[SimulatedTraffic] = (),
    names: Sequence[str] = (),
    control: ControlPolicy | None = None,
    played: SimulatedTraffic | None = None,
) -> list[LoadCourse]:
    """Every contender at multiples of what static-best-tuned carries.

    ``played``: the traffic to measure, if it is not the one that settings are searched on.
    ``drawings``: other samples of the traffic, to measure switches on. ``names``: only these
    policies.
    """
    found = []
    serving = own(tuner).serving
    policies = contenders(tuner, serving, control)
    if played is not None:
        tuner.scene = replace(tuner.scene, traffic=played)
    for factor in factors:
        scale = factor * tuner.best_tuned.scale
        for name, policy in policies.items():
            if names and name not in names:
                continue
            found.append(_course(tuner, name, policy, factor, scale, drawings))
    return found


def _course(
    tuner: OServeTuner,
    name: str,
    policy: Policy,
    factor: float,
    scale: float,
    drawings: Sequence[SimulatedTraffic],
) -> LoadCourse:
    run = run_policy(tuner.scene, policy, tuner.simulator, scale)
    found = course_of(tuner, name, factor, run)
    if not isinstance(policy, ControllerPolicy):
        return found
    return replace(
        found,
        decisions=run.decisions,
        worths=switch_worths(tuner, policy, run, scale, drawings),
    )


def course_of(tuner: OServeTuner, name: str, factor: float, run: Run) -> LoadCourse:
    """The figures of a run."""
    summary = run.results.summary(tuner.scene.slo)
    return LoadCourse(
        policy=name,
        factor=factor,
        p99_e2e_s=summary.e2e_s.p99,
        p99_ttft_s=summary.ttft_s.p99,
        goodput_rps=summary.goodput_rps,
        slo_attainment=summary.slo_attainment,
        switches=run.switches,
        hours=run.traffic.duration_s / 3600.0,
        changes=tuple((change.at_s, change.deployment) for change in run.changes),
    )
