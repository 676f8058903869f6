"""A day of the live controller in the simulator: decisions, switches, seconds and memory by hour.

The mix drifts from short chats to long answers to long documents over the day, the rate with it.

    python experiments/control/day.py [--hours 24] [--load 0.8]
"""

import argparse
import math
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from oserve.control.decision import Decision
from oserve.core import DeploymentPlan, ReplicaShape
from oserve.evaluate.attainment import attainment
from oserve.evaluate.simulator import (
    Levers,
    Routing,
    SimulatedTraffic,
)
from oserve.study.controller_policy import ControllerPolicy, controller_policy
from oserve.study.experiment import Setup, scene
from oserve.study.ours import OServeTuner
from oserve.study.policy import Moment, PolicySession, PolicyStart, PolicyUpdate
from oserve.study.runner import run_policy
from oserve.study.tune import by_length
from oserve.traces import TraceRequest, synthesise_pattern

DAY = {"chat": 3.0, "documents": 3.0, "answers": 0.5}
EVENING = {"chat": 3.0, "documents": 0.5, "answers": 6.0}
NIGHT_SHARE = 0.3


def requests(hours: float, load: float, seed: int) -> list[TraceRequest]:
    """Documents by day, answers in the evening, and two thirds less of all at night."""
    made = synthesise_pattern(
        lambda at: (1.0 - math.cos(2.0 * math.pi * at * hours / 24.0)) / 2.0,
        {name: rate * load for name, rate in DAY.items()},
        {name: rate * load for name, rate in EVENING.items()},
        duration_s=hours * 3600.0,
        seed=seed,
    )
    draw = np.random.default_rng(seed)

    def kept(request: TraceRequest) -> bool:
        day = (1.0 + math.sin(2.0 * math.pi * request.arrival_s / 86400.0)) / 2.0
        return bool(draw.random() < NIGHT_SHARE + (1.0 - NIGHT_SHARE) * day)

    return [request for request in made if kept(request)]


class Hourly:
    """A controller policy that reports its progress, each hour."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self._policy = policy
        self.conduct = policy.conduct
        self.initial = policy.initial
        self.decide = policy.decide

    def begin(self, traffic: SimulatedTraffic) -> PolicySession:
        return HourlySession(self._policy.begin(traffic))


class HourlySession:
    """One run that reports its progress."""

    def __init__(self, session: PolicySession) -> None:
        self._session = session
        self._hour = 0
        self._began_s = time.perf_counter()

    @property
    def decisions(self) -> Sequence[Decision]:
        return self._session.decisions

    def second(self, moment: Moment) -> PolicyUpdate:
        update = self._session.second(moment)
        if moment.now_s >= (self._hour + 1) * 3600.0:
            self._hour += 1
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            switches = sum(item.verdict == "switch" for item in self.decisions)
            print(
                f"hour {self._hour}: {moment.came[1]:,} requests, "
                f"{len(self.decisions)} decisions, {switches} switches, "
                f"{time.perf_counter() - self._began_s:.0f} s, at most {mib:,.0f} MiB",
                flush=True,
            )
        return update

    def reached(self, plan: DeploymentPlan) -> None:
        self._session.reached(plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--load", type=float, default=1.0, help="times the rates")
    parser.add_argument("--model", default="llama-2-70b")
    parser.add_argument("--cluster", default="8xH100")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    asked = Setup(
        trace=None,
        duration_s=given.hours * 3600.0,
        seed=given.seed,
        jobs=1,
        models=(given.model,),
        out=None,
    )
    made = scene(
        asked,
        given.model,
        given.cluster,
        requests(given.hours, given.load, given.seed),
        chunks=(512, 1024),
        seqs=(256,),
        learn_s=3600.0,
    )
    made = replace(made, interval_s=300.0)
    tuner = OServeTuner(made)
    shape = ReplicaShape(
        tensor_parallel_size=4, max_num_batched_tokens=1024, max_num_seqs=256, device_kind="H100"
    )
    levers = Levers(routing=Routing.LEAST_WORK, order=by_length(5.0, freshest_first_s=60.0))
    policy = controller_policy(
        tuner, start=PolicyStart.TRANSFER, serving=tuner.homogeneous(shape, levers)
    )
    run = run_policy(made, Hourly(policy), tuner.simulator, 1.0)
    print(f"{len(run.traffic):,} requests, {attainment(run.results, made.slo):.3f} within the SLO")
    reasons = Counter(str(item.reason) for item in run.decisions)
    print("decisions: " + ", ".join(f"{count} {name}" for name, count in reasons.items()))
    for change in run.changes[1:]:
        words = " + ".join(f"{count} x {name}" for name, count in change.deployment)
        print(f"  {change.at_s / 3600:.2f} h: {words}")


if __name__ == "__main__":
    main()
