"""Other systems' policies decide as documented."""

import numpy as np
import pytest

from oserve.evaluate.simulator import SimulatedTraffic
from oserve.sim.types import FleetObservation
from oserve.study.ours import OServeTuner
from oserve.study.peers import Dynamo, request_work_s
from oserve.study.policy import PolicyView
from oserve.study.tune import JSQ
from study.scenes import small_scene

TUNER = OServeTuner(small_scene())
SHAPE = TUNER.forms((512,))[-1]
SERVING = TUNER.homogeneous(SHAPE, JSQ)
COSTS = TUNER.simulator.costs(SHAPE)


def seen(requests: int, output_tokens: int) -> PolicyView:
    """A last interval of 10 s with so many requests."""
    recent = SimulatedTraffic(
        arrival_s=np.linspace(0.0, 9.0, requests),
        prompt_tokens=np.full(requests, 100),
        output_tokens=np.full(requests, output_tokens),
    )
    return PolicyView(
        now_s=10.0,
        recent=recent,
        recent_s=10.0,
        counts=np.array([[requests]]),
        fleet=FleetObservation(now_s=10.0, queued=0, arrivals=np.array([requests]), replicas=()),
        plan=SERVING.plan,
    )


@pytest.mark.parametrize(
    ("requests", "output_tokens", "replicas"), [(10, 100, 1), (20, 100, 2), (10, 250, 2), (0, 1, 1)]
)
def test_dynamo_needs_as_many_replicas_as_the_recent_work(
    requests: int, output_tokens: int, replicas: int
) -> None:
    usual = request_work_s(COSTS, seen(10, 100).recent)
    policy = Dynamo(
        serving=SERVING, replica_work=1.2 * usual, costs=COSTS, interval_s=10.0, headroom=1.1
    )
    plan = policy.decide(seen(requests, output_tokens)) or SERVING.plan
    assert len(plan.replicas) == replicas
