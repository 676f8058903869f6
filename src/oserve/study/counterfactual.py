"""What each switch of a run was worth: the same traffic again, without it.

Run k makes the first k switches at their moments and none after. Switch k is then worth what run k
has of requests within the SLO more than run k - 1, among those that come from a minute before it
(they may still be running) until the next. Other drawings of the same traffic, with the same
switches at the same moments, tell how much of that is luck.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.evaluate.simulator import SimulatedTraffic, met
from oserve.study.controller_policy import ControllerPolicy
from oserve.study.runner import Run, run_policy
from oserve.study.tune import Tuner

_BEFORE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchWorth:
    """``gains``: requests within the SLO more than without, in each drawing, the run's own first.

    ``expected``: what the controller took gain less cost to be.
    """

    at_s: float
    deployment: tuple[tuple[str, int], ...]
    gains: tuple[int, ...]
    expected: float

    @property
    def mean(self) -> float:
        """Over the drawings."""
        return float(np.mean(self.gains))

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 for a single drawing."""
        count = len(self.gains)
        return float(np.std(self.gains, ddof=1) / np.sqrt(count)) if count > 1 else 0.0

    @property
    def harmful(self) -> bool:
        """Whether it lost more than luck explains."""
        return self.mean + 2.0 * self.error < 0


def switch_worths(
    tuner: Tuner,
    policy: ControllerPolicy,
    run: Run,
    scale: float,
    drawings: Sequence[SimulatedTraffic] = (),
) -> tuple[SwitchWorth, ...]:
    """Of every switch of a run; ``drawings`` as the scene's traffic, before scaling."""
    moves = list(run.changes[1:])
    script = [(change.at_s, change.plan) for change in moves]
    expected = [
        item.gain_requests - item.cost_requests
        for item in run.decisions
        if item.verdict == "switch"
    ]
    ends = [change.at_s for change in moves[1:]] + [float("inf")]
    gains: list[list[int]] = [[] for _ in moves]
    for traffic in (tuner.scene.traffic, *drawings) if moves else ():
        good = [
            _good(tuner, replace(policy, script=script[:count]), scale, traffic)
            for count in range(len(moves) + 1)
        ]
        arrival_s = traffic.arrival_s / scale
        for number, (change, end_s) in enumerate(zip(moves, ends, strict=True)):
            counted = (arrival_s >= change.at_s - _BEFORE_S) & (arrival_s < end_s)
            more = int(good[number + 1][counted].sum()) - int(good[number][counted].sum())
            gains[number].append(more)
    return tuple(
        SwitchWorth(
            at_s=change.at_s, deployment=change.deployment, gains=tuple(each), expected=worth
        )
        for change, each, worth in zip(moves, gains, expected, strict=True)
    )


def jittered(traffic: SimulatedTraffic, *, seed: int, by_s: float = 2.0) -> SimulatedTraffic:
    """Another drawing of a trace of which there is only one: arrivals moved by up to ``by_s``."""
    draw = np.random.default_rng(seed)
    moved = np.maximum(0.0, traffic.arrival_s + draw.uniform(-by_s, by_s, len(traffic)))
    order = np.argsort(moved, kind="stable")
    return SimulatedTraffic(
        arrival_s=moved[order],
        prompt_tokens=traffic.prompt_tokens[order],
        output_tokens=traffic.output_tokens[order],
    )


def _good(
    tuner: Tuner, policy: ControllerPolicy, scale: float, traffic: SimulatedTraffic
) -> np.ndarray:
    run = run_policy(tuner.scene, policy, tuner.simulator, scale, traffic=traffic)
    return met(run.results, tuner.scene.slo)
