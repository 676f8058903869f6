"""The traffic on which a switch is judged by simulation: what came, what is expected, what was.

First what came of late, so that what waits and runs at the moment of the decision does so in the
simulation, too; then the expected rates, for as long as they are taken to last; then those of
before the last change, until there can be a way back (see ``control.evaluation``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oserve.control.evaluation import Question, Rates
from oserve.evaluate.capacities import Lengths, merged
from oserve.evaluate.simulator import Mask, Traffic

# Where nothing is known of what came, the expected rates have gone on for so long.
_WARM_S = 60.0
_MOST_SIMULATED_S = 600.0
_MOST_REQUESTS = 60_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prospect:
    """``now_s`` is the moment of the decision, from ``then_s`` on it is as before the change."""

    traffic: Traffic
    now_s: float
    then_s: float

    @property
    def lasting_s(self) -> float:
        """Seconds at the expected rates."""
        return self.then_s - self.now_s

    @property
    def expected(self) -> Mask:
        """Which requests come at the expected rates, after the decision."""
        arrival_s = self.traffic.arrival_s
        return (arrival_s >= self.now_s) & (arrival_s < self.then_s)

    @property
    def later(self) -> Mask:
        """Which come after those."""
        return self.traffic.arrival_s >= self.then_s


def prospect(
    question: Question, lasts_s: float, lengths: Sequence[Lengths], *, seed: int
) -> Prospect:
    """For a plan that is taken to last so long; ``lengths`` by type."""
    rates = question.steps[0].expected
    past = question.past or ((rates, _WARM_S),)
    most_s = _MOST_REQUESTS / max(sum(rates), 1e-9)
    lasts_s = min(lasts_s, _MOST_SIMULATED_S, most_s)
    stages = [*past, (rates, lasts_s), (question.before, question.back_s)]
    now_s = sum(seconds for _, seconds in past)
    return Prospect(traffic=staged(lengths, stages, seed=seed), now_s=now_s, then_s=now_s + lasts_s)


def staged(
    lengths: Sequence[Lengths], stages: Sequence[tuple[Rates, float]], *, seed: int
) -> Traffic:
    """Poisson arrivals of all types at rates (requests/s) that hold for some seconds each."""
    draw = np.random.default_rng(seed)
    parts = []
    start_s = 0.0
    for rates, seconds in stages:
        for item, rate in zip(lengths, rates, strict=False):
            if len(item.prompt_tokens):
                # Given how many come, Poisson arrivals are spread evenly.
                arrival_s = np.sort(draw.uniform(0.0, seconds, draw.poisson(rate * seconds)))
                parts.append(item.drawn(start_s + arrival_s, draw))
        start_s += seconds
    return merged(parts)
