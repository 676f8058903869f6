"""The evaluation workload: the traffic on which a switch is simulated.

First the recent traffic, so that the requests that wait and run at the time of the decision do so
in the simulation, too. Then the expected rates, for as long as the candidate is taken to stay the
best. Then the rates before the last change: until the controller can switch back, and until what
the way back leaves behind has been served (see ``control.evaluation``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oserve.control.evaluation import DecisionInput, TypeRates
from oserve.evaluate.capacities import LengthSamples, merged
from oserve.evaluate.simulator import Mask, SimulatedTraffic

# A backlog goes first when a period of the queue's freshest-first order begins, so its cost shows
# within a period. Without that order it shows sooner.
_PERIOD_S = 300.0
# Without a history, the expected rates are taken to have held for so long.
_WARM_S = 60.0
_MOST_SIMULATED_S = 600.0
_MOST_REQUESTS = 60_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationWorkload:
    """``now_s``: the time of the decision. From ``then_s`` on, the rates before the change hold.

    At ``back_s`` the controller can switch back.
    """

    traffic: SimulatedTraffic
    now_s: float
    then_s: float
    back_s: float

    @property
    def lasting_s(self) -> float:
        """Seconds at the expected rates."""
        return self.then_s - self.now_s

    @property
    def expected(self) -> Mask:
        """The requests that arrive at the expected rates, after the decision."""
        arrival_s = self.traffic.arrival_s
        return (arrival_s >= self.now_s) & (arrival_s < self.then_s)

    @property
    def later(self) -> Mask:
        """The requests that arrive after those."""
        return self.traffic.arrival_s >= self.then_s


def evaluation_workload(
    inputs: DecisionInput, lasts_s: float, lengths: Sequence[LengthSamples], *, seed: int
) -> EvaluationWorkload:
    """The workload for a candidate that is taken to stay the best for ``lasts_s`` seconds.

    ``lengths``: request lengths by workload type.
    """
    rates = inputs.expected_rps
    past = _recent(inputs.past) or ((rates, _WARM_S),)
    most_s = _MOST_REQUESTS / max(sum(rates), 1e-9)
    lasts_s = min(lasts_s, _MOST_SIMULATED_S, most_s)
    stages = [*past, (rates, lasts_s), (inputs.before, inputs.back_s + _PERIOD_S)]
    now_s = sum(seconds for _, seconds in past)
    then_s = now_s + lasts_s
    return EvaluationWorkload(
        traffic=poisson_stages(lengths, stages, seed=seed),
        now_s=now_s,
        then_s=then_s,
        back_s=then_s + inputs.back_s,
    )


def _recent(past: Sequence[tuple[TypeRates, float]]) -> tuple[tuple[TypeRates, float], ...]:
    """The past, less whole periods at its start where it has more requests than are simulated."""
    left = list(past)
    while (
        sum(sum(rates) * seconds for rates, seconds in left) > _MOST_REQUESTS
        and sum(seconds for _, seconds in left) >= 2 * _PERIOD_S
    ):
        dropped_s = 0.0
        while dropped_s < _PERIOD_S:
            dropped_s += left.pop(0)[1]
    return tuple(left)


def poisson_stages(
    lengths: Sequence[LengthSamples], stages: Sequence[tuple[TypeRates, float]], *, seed: int
) -> SimulatedTraffic:
    """Poisson arrivals of all types, stage after stage.

    A stage is the rates of the types in requests/s, and the seconds for which they hold.
    """
    draw = np.random.default_rng(seed)
    parts = []
    start_s = 0.0
    for rates, seconds in stages:
        for item, rate in zip(lengths, rates, strict=False):
            if len(item.prompt_tokens):
                # Given their number, Poisson arrivals are uniform in time.
                arrival_s = np.sort(draw.uniform(0.0, seconds, draw.poisson(rate * seconds)))
                parts.append(item.drawn(start_s + arrival_s, draw))
        start_s += seconds
    return merged(parts)
