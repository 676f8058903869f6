"""Seeded synthetic traces whose mix follows a pattern: a step, a ramp, a flash crowd, a wave.

The caller gives two loads as arrival rates by type. The pattern is the share of the second load at
each time, from 0 to 1:

    rate of a type(t) = (1 - part(t)) * its rate in the first + part(t) * its rate in the second
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping

from oserve.core import OServeError
from oserve.traces.mixes import MIX_TYPES
from oserve.traces.request import TraceRequest
from oserve.traces.synthesise import LengthModel

PatternShare = Callable[[float], float]
"""The share of the second load at a time from 0 (start of the trace) to 1 (its end)."""

PATTERNS: Mapping[str, PatternShare] = {
    "step": lambda at: float(at >= 1 / 3),
    "ramp": lambda at: min(1.0, max(0.0, 2.0 * at - 0.5)),
    "flash crowd": lambda at: float(0.4 <= at < 0.55),
    "square wave": lambda at: float(int(at * 6) % 2),
    "sine": lambda at: (1.0 - math.cos(4.0 * math.pi * at)) / 2.0,
}
"""One step after a third; a ramp over half; a crowd for 15 %; three square and two sine periods."""

CHANGING_TYPES: Mapping[str, LengthModel] = {
    "chat": MIX_TYPES["short prompt, short answer"],
    "documents": LengthModel(
        prompt_median=2500, prompt_spread=0.4, output_median=60, output_spread=0.5
    ),
    "answers": LengthModel(
        prompt_median=250, prompt_spread=0.5, output_median=700, output_spread=0.4
    ),
}
"""Short chats, long documents, long answers."""


def synthesise_pattern(
    part: PatternShare,
    first_rps: Mapping[str, float],
    second_rps: Mapping[str, float],
    *,
    duration_s: float,
    seed: int,
    types: Mapping[str, LengthModel] = CHANGING_TYPES,
) -> Iterator[TraceRequest]:
    """Poisson arrivals at those rates; ``model`` names the type. Raises OServeError at once.

    Rates are requests/s by type; a missing type has rate 0.
    """
    unknown = sorted((set(first_rps) | set(second_rps)) - set(types))
    if unknown:
        raise OServeError(
            f"there is no type {unknown[0]!r}", place="types", remedy="use " + ", ".join(types)
        )
    if not 0 < duration_s < math.inf:
        raise OServeError(f"it is {duration_s}", place="duration_s", remedy="give a number over 0")
    return _arrivals(part, first_rps, second_rps, duration_s=duration_s, seed=seed, types=types)


def _arrivals(
    part: PatternShare,
    first_rps: Mapping[str, float],
    second_rps: Mapping[str, float],
    *,
    duration_s: float,
    seed: int,
    types: Mapping[str, LengthModel],
) -> Iterator[TraceRequest]:
    """Thinning: draw arrivals at the peak rate and reject some."""
    draw = random.Random(seed)
    names = list(types)
    ends = [[rates.get(name, 0.0) for name in names] for rates in (first_rps, second_rps)]
    most_rps = max(sum(ends[0]), sum(ends[1]))
    at_s = 0.0
    while most_rps > 0:
        at_s += draw.expovariate(most_rps)
        if at_s >= duration_s:
            return
        second = part(at_s / duration_s)
        rates = [(1.0 - second) * a + second * b for a, b in zip(*ends, strict=True)]
        lot = draw.random() * most_rps
        for name, rate in zip(names, rates, strict=True):
            if lot < rate:
                prompt, output = types[name].draw(draw)
                yield TraceRequest(
                    arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, model=name
                )
                break
            lot -= rate
