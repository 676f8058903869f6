"""The live controller and the simulated one make the same decisions from the same observations."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from oserve.app.controller import ControllerService
from oserve.config import load_settings
from oserve.config.policies import control_policy
from oserve.control.decision import Decision, DecisionVerdict
from oserve.control.evaluation import CandidateScore
from oserve.control.following import FollowScore
from oserve.control.planning import planner_for
from oserve.control.recording import (
    ObservationRecorder,
    observed_seconds,
)
from oserve.control.starts import StartTimes
from oserve.core import OServeError
from oserve.evaluate.simulator import SimulatedServing, SimulatedTraffic, Simulator
from oserve.evaluate.switch_scorer import SwitchScorer, model_of
from oserve.evaluate.switch_simulation import simulated_facts
from oserve.evaluate.verification import SERVED_AS, common_slo
from oserve.evaluate.workload import poisson_stages
from oserve.plan.planning import PlanRequest
from oserve.sim.phases import Phases
from oserve.startup.deployment import ServerDeployment, prepare
from oserve.study.controller_policy import ControllerPolicy, ControllerSession
from oserve.study.policy import Conduct
from oserve.study.runner import run_policy
from oserve.study.scene import Scene

CHATS, DOCUMENTS = (20.0, 0.1), (0.5, 12.0)
# Documents come long enough for a switch to them to pay, should chats return.
STAGES = ((CHATS, 40.0), (DOCUMENTS, 100.0))
START_S = 3.0
SLOTS = 4


def deployment(model: str, folder: Path) -> ServerDeployment:
    return prepare(
        load_settings(
            None,
            {
                "model": model,
                "state_dir": str(folder / "state"),
                "cluster.devices": "cpu",
                "cluster.cpu_slots": SLOTS,
                "cluster.cpu_flags": "avx2",
                "planning.rates": "chats:60x120=6,documents:1500x20=0.2",
                "planning.objective": "capacity",
                "planning.slo_ttft_ms": 2000,
                "planning.slo_tpot_ms": 100,
                "control.decision_interval_s": 20,
                "control.start_s": START_S,
                "control.min_dwell_s": 20,
            },
            {},
        )
    )


Outcomes = list[tuple[Decision, CandidateScore | FollowScore | None]]


class Kept:
    """A controller policy that keeps its session."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self.conduct = policy.conduct
        self.initial = policy.initial
        self.decide = policy.decide
        self.sessions: list[ControllerSession] = []
        self._policy = policy

    def begin(self, traffic: SimulatedTraffic) -> ControllerSession:
        self.sessions.append(self._policy.begin(traffic))
        return self.sessions[-1]


def simulated(given: ServerDeployment, request: PlanRequest) -> tuple[Outcomes, bytes]:
    """Serve chats, then documents, on a virtual clock under the controller of the server."""
    settings = given.settings
    model = model_of(request, min_gain=settings.control.min_gain)
    starts = StartTimes(settings.control.start_s)
    control = control_policy(settings, given.mode)
    recorder = ObservationRecorder()
    policy = ControllerPolicy(
        serving=SimulatedServing(plan=given.plan, levers=SERVED_AS),
        facts=simulated_facts(planner_for(request, starts).facts, SwitchScorer(model)),
        starts_s=settings.control.start_s,
        control=control,
        conduct=Conduct(drain_limit_s=control.drain_limit_s),
        model=model,
        source=request.source,
        speeds=given.speeds,
        shares_interval_s=settings.control.shares_interval_s,
        recorder=recorder,
    )
    scene = Scene(
        name="server",
        model=request.model,
        devices=given.devices,
        traffic=poisson_stages(model.lengths, STAGES, seed=1),
        demand=request.demand,
        source=request.source,
        context=4096,
        shapes=request.shapes,
        slo=common_slo(request.limits),
        phases=Phases(start_s=START_S),
        interval_s=float(settings.control.decision_interval_s),
    )
    kept = Kept(policy)
    run_policy(scene, kept, Simulator(request.source), 1.0)
    return kept.sessions[0].outcomes, recorder.encoded()


async def live(given: ServerDeployment, request: PlanRequest, recording: bytes) -> Outcomes:
    """The decision path of a server, with its worker process, fed with the recording."""
    service = ControllerService(given, request, now_s=0.0)
    found = []
    try:
        for second in observed_seconds(recording):
            trigger = service.observe(
                second.now_s, second.batches, second.observation, second.queued
            )
            if trigger is not None:
                found.append(
                    await service.decide(second.now_s, trigger, switching=second.switching)
                )
    finally:
        service.close()
    return found


def encoded(items: Sequence[object]) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(list(items)))


# Without the compiled kernel it takes half a minute.
@pytest.mark.slow
def test_the_same_observations_give_the_same_bytes(model: str, tmp_path: Path) -> None:
    given = deployment(model, tmp_path)
    request = given.plan_request
    assert request is not None  # the settings name a model and rates
    found, recording = simulated(given, request)
    assert encoded(found) == encoded(asyncio.run(live(given, request, recording)))
    # The comparison has a point only if there are switches, and scores that were simulated.
    assert any(decision.verdict is DecisionVerdict.SWITCH for decision, _ in found)
    scores = [score for _, score in found if isinstance(score, CandidateScore)]
    assert any(np.isfinite(score.pays_after_s) for score in scores)


def test_other_bytes_are_no_recording() -> None:
    with pytest.raises(OServeError, match="no recording"):
        list(observed_seconds(b'{"devices": 3}'))
