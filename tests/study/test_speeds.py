"""A profile of yesterday on a machine that is slower today does not promise too much for long."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from oserve.config import load_cluster
from oserve.control.decision import Decision, Mode
from oserve.control.planning import planner_for
from oserve.control.policy import ControlPolicy
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan, ReplicaShape
from oserve.evaluate.simulator import Levers, Routing, SimulatedTraffic, Simulator
from oserve.perf.corrected import CorrectedSource, SpeedKey, Speeds
from oserve.sim.types import Status
from oserve.study.controller_policy import ControllerPolicy, ControllerSession, controller_policy
from oserve.study.ours import OServeTuner
from oserve.study.policy import Moment, PolicyStart, PolicyUpdate
from oserve.study.runner import run_policy
from oserve.study.scene import SceneChoice, make_scene
from oserve.traces import PATTERNS, Slo, synthesise_pattern

SCENE = make_scene(
    SceneChoice(
        model="qwen3-32b",
        devices=load_cluster("2xH100").devices,
        slo=Slo(ttft_s=2.0, tpot_s=0.1),
        chunks=(512,),
        seqs=(64,),
        tensor_parallel_sizes=(1, 2),
        pipeline_parallel_sizes=(1,),
        interval_s=10.0,
        types=2,
    ),
    synthesise_pattern(
        PATTERNS["step"],
        {"chat": 2.0, "documents": 0.2},
        {"chat": 2.0, "documents": 0.2},
        duration_s=45.0,
        seed=1,
    ),
    source_name="synthetic",
)
TUNER = OServeTuner(SCENE)
MANY = (1000.0, 1000.0)


class Promising:
    """A controller policy; notes each second what the planner takes the replicas to serve."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self.conduct = policy.conduct
        self.initial = policy.initial
        self.decide = policy.decide
        self.promised: list[tuple[float, float]] = []
        self._policy = policy
        self._session: ControllerSession | None = None
        self.decisions: Sequence[Decision] = ()

    def begin(self, traffic: SimulatedTraffic) -> "Promising":
        self._session = self._policy.begin(traffic)
        return self

    def second(self, moment: Moment) -> PolicyUpdate:
        assert self._session is not None  # the runner begins before the first second
        update = self._session.second(moment)
        replicas = self._policy.serving.plan.replicas
        served = self._session.runtime.planner.served_rps(replicas, MANY)
        self.promised.append((moment.now_s, served))
        return update

    def reached(self, plan: DeploymentPlan) -> None:
        raise AssertionError(plan.id)  # nothing switches in mode off


@pytest.mark.parametrize("times", [1.0, 1.5])
def test_a_slower_machine_is_believed_within_a_minute(times: float) -> None:
    shape = ReplicaShape(max_num_batched_tokens=512, max_num_seqs=64, device_kind="H100")
    serving = TUNER.homogeneous(shape, Levers(routing=Routing.POOLS))
    plain = controller_policy(
        TUNER,
        start=PolicyStart.COLD,
        serving=serving,
        simulated=False,
        control=ControlPolicy(mode=Mode.OFF),
    )
    policy = Promising(plain)
    # The truth: every step takes so many times as long as the profile says.
    truth = CorrectedSource(SCENE.source, Speeds(known=_all(1.0 / times)))
    run = run_policy(SCENE, policy, Simulator(truth), 1.0)
    assert (run.results.status == Status.COMPLETED).all()
    right = planner_for(replace(TUNER.question, source=truth, shapes=(shape,)), StartTimes(0.0))
    able = right.served_rps(serving.plan.replicas, MANY)
    first, last = policy.promised[0][1], policy.promised[-1][1]
    assert first == pytest.approx(able * times, rel=0.15)
    assert last == pytest.approx(able, rel=0.1)
    too_much = [at_s for at_s, served in policy.promised if served > 1.1 * able]
    assert max(too_much, default=0.0) < 60.0
    if times == 1.0:
        assert too_much == []


def _all(speed: float) -> dict[SpeedKey, float]:
    keys: Sequence[ReplicaShape] = SCENE.shapes
    return {("H100", k.tensor_parallel_size, 1, k.precision): speed for k in keys}
