"""The runner: the live loop moves a fleet from plan to plan, and time and devices are paid for."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from oserve.core import (
    DeploymentPlan,
    ReplicaShape,
)
from oserve.evaluate.attainment import attainment
from oserve.evaluate.energy import static_energy
from oserve.evaluate.simulator import (
    Levers,
    Routing,
    SimulatedServing,
    Simulator,
)
from oserve.sim.phases import Phases
from oserve.sim.types import Status
from oserve.study.ours import OServeTuner
from oserve.study.policies import POLICIES
from oserve.study.policy import Conduct, Fixed, Policy, PolicyStart, PolicyView
from oserve.study.run import Run
from oserve.study.runner import run_policy
from oserve.study.switching import replaced
from study.scenes import small_scene

SCENE = small_scene()
QUICK = replace(SCENE, phases=Phases(start_s=2.0))


@dataclass
class Once:
    """Changes to another plan at the first decision."""

    tuner: OServeTuner
    serving: SimulatedServing
    other: SimulatedServing
    conduct: Conduct
    seen: list[PolicyView]

    def initial(self, scale: float) -> SimulatedServing:
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        self.seen.append(seen)
        return None if len(self.seen) > 1 else replaced(self.tuner, self.other, seen.plan)


def shape(tp: int, chunk: int = 512) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=tp,
        max_num_batched_tokens=chunk,
        max_num_seqs=64,
        device_kind="H100",
    )


def switching(conduct: Conduct) -> tuple[OServeTuner, Once]:
    tuner = OServeTuner(QUICK)
    levers = Levers(routing=Routing.LEAST_WORK)
    policy = Once(
        tuner=tuner,
        serving=tuner.homogeneous(shape(2), levers),
        other=tuner.homogeneous(shape(4), levers),
        conduct=conduct,
        seen=[],
    )
    return tuner, policy


def test_a_static_run_is_the_same_as_the_fleet_alone() -> None:
    simulator = Simulator(SCENE.source)
    tuner = OServeTuner(SCENE)
    serving = tuner.homogeneous(shape(2), Levers(routing=Routing.LEAST_REQUESTS))
    alone = simulator.run(serving, SCENE.traffic.faster(1.5))
    run = run_policy(SCENE, Fixed(serving=serving), simulator, 1.5)
    assert np.array_equal(run.results.finish_s, alone.finish_s)
    assert run.switches == 0
    # Every device is held from the first moment to the last.
    finish_s = float(np.nanmax(alone.finish_s))
    assert run.device_s == pytest.approx(4 * finish_s)
    assert 4 * 122 * finish_s < run.energy_j < 4 * 700 * finish_s
    assert run.idle_j == 0.0
    energy = static_energy(SCENE.source, serving.plan, alone, SCENE.devices, finish_s)
    assert energy.serving_j == pytest.approx(run.energy_j)


@pytest.mark.parametrize("staged", [False, True])
def test_a_switch_costs_its_start_and_loses_nothing(staged: bool) -> None:
    tuner, policy = switching(Conduct(decides=True, staged=staged))
    run = run_policy(QUICK, policy, tuner.simulator, 1.0)
    assert run.switches == 1
    assert (run.results.status == Status.COMPLETED).all()
    assert run.results.replays.sum() == 0
    names = run.results.replica_names
    assert len(names) == 3
    later = run.results.replica == 2
    assert later.any()
    # Decided at 10 s, then drained, settled (3 s) and loaded (2 s).
    assert float(run.results.first_token_s[later].min()) > 15.0


def test_requests_go_on_elsewhere_when_a_drain_has_lasted_too_long() -> None:
    def run(limit_s: float) -> Run:
        conduct = Conduct(decides=True, drain_limit_s=limit_s)
        tuner, policy = switching(conduct)
        return run_policy(QUICK, policy, tuner.simulator, 1.0)

    patient, hasty = run(600.0), run(0.5)
    for found in (patient, hasty):
        assert (found.results.status == Status.COMPLETED).all()
        assert np.array_equal(found.results.made_tokens, found.traffic.output_tokens)
    assert patient.results.replays.sum() == 0
    assert hasty.results.replays.sum() > 0


def test_free_switching_takes_no_time() -> None:
    tuner, policy = switching(Conduct(decides=True, start=PolicyStart.FREE))
    run = run_policy(QUICK, policy, tuner.simulator, 1.0)
    later = run.results.replica == 2
    assert 10.0 <= float(run.results.arrival_s[later].min()) < 11.0
    assert (run.results.status == Status.COMPLETED).all()


def test_policies_see_the_past_only() -> None:
    tuner, policy = switching(Conduct(decides=True))
    run_policy(QUICK, policy, tuner.simulator, 1.0)
    first = policy.seen[0]
    arrived = QUICK.traffic.arrival_s < 10.0
    assert len(first.recent) == arrived.sum() == first.counts.sum()
    assert first.now_s == first.recent_s == 10.0
    # Answers that are still being written count with the length expected of their class.
    classes = {item.output_tokens for item in QUICK.demand.classes}
    unlike = first.recent.output_tokens != QUICK.traffic.output_tokens[arrived]
    assert unlike.any()
    assert set(first.recent.output_tokens[unlike].tolist()) <= classes


def test_judging_stops_early_and_agrees() -> None:
    tuner = OServeTuner(SCENE)
    serving = tuner.homogeneous(shape(4, 2048), Levers(routing=Routing.LEAST_REQUESTS))
    policy = Fixed(serving=serving)
    for scale in (0.5, 2.0, 4.0, 8.0):
        whole = run_policy(SCENE, policy, tuner.simulator, scale)
        judged = run_policy(SCENE, policy, tuner.simulator, scale, judge_only=True)
        holds = attainment(whole.results, SCENE.slo) >= 0.95
        assert holds == tuner.simulator.holds(serving, SCENE.traffic.faster(scale), SCENE.slo)
        if judged.failed_early:
            assert not holds
        else:
            assert np.array_equal(judged.results.finish_s, whole.results.finish_s)


@pytest.mark.parametrize(
    "name",
    [
        *("reload", "llumnix", "dynamo", "aibrix", "llmd"),
        pytest.param("oracle", marks=pytest.mark.slow),
    ],
)
def test_every_policy_serves_every_request(name: str) -> None:
    tuner = TUNER
    policy: Policy = POLICIES[name].make(tuner)
    run = run_policy(QUICK, policy, tuner.simulator, 1.0)
    assert (run.results.status == Status.COMPLETED).all()


TUNER = OServeTuner(QUICK)
