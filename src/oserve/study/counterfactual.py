"""The gain of each switch of a run, against the same traffic without the switch.

Run k makes the first k switches at their times and none after. The gain of switch k is the number
of requests within the SLO that run k has more than run k - 1. Requests count that arrive from a
minute before the switch, since they may still run, until the next switch. Other samples of the same
traffic, with the same switches at the same times, tell how much of that is noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.ladder import MISSED
from oserve.evaluate.attainment import met
from oserve.evaluate.simulator import (
    Floats,
    Mask,
    SimulatedTraffic,
)
from oserve.study.controller_policy import ControllerPolicy
from oserve.study.run import Run
from oserve.study.runner import run_policy
from oserve.study.tune import Tuner

_BEFORE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchWorth:
    """``gains``: requests within the SLO, with the switch less without it, by traffic sample.

    The first sample is the traffic of the run. ``expected``: the net gain that the controller
    expected. ``saved``: where latency is the objective, how much less E2E there is with the switch,
    in requests of the mean E2E without it; a request within the SLO counts ``MISSED`` of these.
    """

    at_s: float
    deployment: tuple[tuple[str, int], ...]
    gains: tuple[int, ...]
    expected: float
    saved: tuple[float, ...] = ()

    @property
    def values(self) -> tuple[float, ...]:
        """What the switch was worth, by sample: requests within the SLO, or those and latency."""
        if not self.saved:
            return tuple(float(gain) for gain in self.gains)
        pairs = zip(self.gains, self.saved, strict=True)
        return tuple(MISSED * gain + saved for gain, saved in pairs)

    @property
    def mean(self) -> float:
        """Over the drawings."""
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 for a single drawing."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0

    @property
    def harmful(self) -> bool:
        """Whether it lost more than noise explains."""
        return self.mean + 2.0 * self.error < 0


def switch_worths(
    tuner: Tuner,
    policy: ControllerPolicy,
    run: Run,
    scale: float,
    drawings: Sequence[SimulatedTraffic] = (),
) -> tuple[SwitchWorth, ...]:
    """The gain of every switch of a run; ``drawings`` are other traffic samples, before scaling."""
    moves = list(run.changes[1:])
    script = [(change.at_s, change.plan) for change in moves]
    expected = [
        item.gain_requests - item.cost_requests
        for item in run.decisions
        if item.verdict == "switch"
    ]
    ends = [change.at_s for change in moves[1:]] + [float("inf")]
    gains: list[list[int]] = [[] for _ in moves]
    saved: list[list[float]] = [[] for _ in moves]
    follows = policy.control.follow is not None
    for traffic in (tuner.scene.traffic, *drawings) if moves else ():
        runs = [
            _served(tuner, replace(policy, script=script[:count]), scale, traffic)
            for count in range(len(moves) + 1)
        ]
        arrival_s = traffic.arrival_s / scale
        for number, (change, end_s) in enumerate(zip(moves, ends, strict=True)):
            counted = (arrival_s >= change.at_s - _BEFORE_S) & (arrival_s < end_s)
            (without, slow_s), (within, fast_s) = runs[number], runs[number + 1]
            gains[number].append(int(within[counted].sum()) - int(without[counted].sum()))
            if follows:
                usual_s = max(float(slow_s[counted].mean()), 1e-9) if counted.any() else 1.0
                saved[number].append(float((slow_s - fast_s)[counted].sum()) / usual_s)
    return tuple(
        SwitchWorth(
            at_s=change.at_s,
            deployment=change.deployment,
            gains=tuple(each),
            expected=worth,
            saved=tuple(less),
        )
        for change, each, less, worth in zip(moves, gains, saved, expected, strict=True)
    )


def jittered(traffic: SimulatedTraffic, *, seed: int, by_s: float = 2.0) -> SimulatedTraffic:
    """Another sample of a single trace: arrivals move by up to ``by_s`` seconds."""
    draw = np.random.default_rng(seed)
    moved = np.maximum(0.0, traffic.arrival_s + draw.uniform(-by_s, by_s, len(traffic)))
    order = np.argsort(moved, kind="stable")
    return SimulatedTraffic(
        arrival_s=moved[order],
        prompt_tokens=traffic.prompt_tokens[order],
        output_tokens=traffic.output_tokens[order],
    )


def _served(
    tuner: Tuner, policy: ControllerPolicy, scale: float, traffic: SimulatedTraffic
) -> tuple[Mask, Floats]:
    """Which requests met the SLO, and the E2E of each; those that never ended count to the end."""
    results = run_policy(tuner.scene, policy, tuner.simulator, scale, traffic=traffic).results
    ended_s = np.where(np.isfinite(results.finish_s), results.finish_s, results.now_s)
    return met(results, tuner.scene.slo), ended_s - results.arrival_s
