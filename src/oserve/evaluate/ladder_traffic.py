"""The requests on which a ladder's deployments are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oserve.control.load_facts import LoadRates
from oserve.core import OServeError
from oserve.evaluate.capacities import LengthSamples, merged
from oserve.evaluate.simulator import Floats, Ints, SimulatedTraffic

# A run lasts so long at load 1, and has at least so many requests at low loads.
_RUN_S = 300.0
_FEWEST, _MOST = 2000, 12_000
_BURST_S = 20.0
_LEAST_FACTOR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LadderTraffic:
    """The requests of a ladder at load 1; ``kinds``: the workload type of each, as an index."""

    requests: SimulatedTraffic
    kinds: Ints
    rates: LoadRates

    def at(self, load: float) -> tuple[SimulatedTraffic, Ints]:
        """The requests that come at a load, fewer of them at low loads, and their types."""
        count = len(self.requests)
        first = round(max(min(count, _FEWEST), count * min(1.0, load)))
        played = self.requests.faster(load)
        return played.part(0, first, 0.0), self.kinds[:first]


def drawn_traffic(
    lengths: Sequence[LengthSamples], rates: LoadRates, *, burstiness: Sequence[float], seed: int
) -> LadderTraffic:
    """Arrivals at these rates, with lengths of each type.

    ``burstiness``, by type: the relative variance of the rate between pieces of some seconds; 0 is
    Poisson. Raises OServeError if no type has both a rate and lengths.
    """
    draw = np.random.default_rng(seed)
    total = math.fsum(
        rate for item, rate in zip(lengths, rates, strict=True) if len(item.prompt_tokens)
    )
    if total <= 0:
        raise OServeError(
            "no workload type has both a rate and lengths",
            place="planning",
            remedy="give planning.rates, or a trace with requests",
        )
    count = min(_MOST, max(_FEWEST, total * _RUN_S))
    seconds = count / total
    parts, kinds = [], []
    for kind, (item, rate, variance) in enumerate(zip(lengths, rates, burstiness, strict=True)):
        number = round(rate * seconds)
        if number and len(item.prompt_tokens):
            arrival_s = _arrivals(number, seconds, variance, draw)
            parts.append(item.drawn(arrival_s, draw))
            kinds.append(np.full(number, kind, dtype=np.int64))
    order = np.argsort(np.concatenate([part.arrival_s for part in parts]), kind="stable")
    return LadderTraffic(requests=merged(parts), kinds=np.concatenate(kinds)[order], rates=rates)


def _arrivals(number: int, seconds: float, variance: float, draw: np.random.Generator) -> Floats:
    """So many arrivals, sorted; their rate varies from piece to piece."""
    # More pieces than requests change nothing.
    pieces = max(1, math.ceil(min(_MOST, seconds / _BURST_S)))
    factor = np.ones(pieces) if variance <= 0 else draw.gamma(1 / variance, variance, pieces)
    edges = np.concatenate([[0.0], np.cumsum(factor + _LEAST_FACTOR)])
    # Arrivals are uniform in the cumulated rate, which maps back to time piece by piece.
    at = np.sort(draw.uniform(0.0, edges[-1], number))
    arrival_s: Floats = np.interp(at, edges, np.linspace(0.0, seconds, pieces + 1))
    return arrival_s
