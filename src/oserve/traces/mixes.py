"""Seeded synthetic traces whose mix has a given spread and changes at a given speed.

The mix at a time is the vector p of the types' shares of the arrivals. Its spread is the
coefficient of variation over the n types, ``std(p) / mean(p)`` (of the population, so
``n * std(p)``): 0 when all types are equally frequent, ``sqrt(n - 1)`` when there is only one.

Mixes of one spread c lie on a sphere: ``p = 1/n + c / sqrt(n) * u`` with u of length 1 and sum 0.
The u towards corner j is the mix in which type j dominates and the others are equal. A changing
mix moves from corner to corner (0, 1, ..., n - 1, 0) along great circles. The spread is then c at
*every* time while the dominant type rotates, and the rates of all types are smooth in time. One
change, from one dominant type to the next, takes ``change_period_s``; a full turn n times that.

The presets S1 and S5 are the ends of the published sweep, with spreads of 0.112 and 0.688. The
publication names four speeds of change (T1 slow to T4 fast) without their seconds; ours range from
an hour to five minutes.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from oserve.core import OServeError
from oserve.traces.request import TraceRequest
from oserve.traces.synthesise import LengthModel

MIX_CVS: Mapping[str, float] = {"S1": 0.112, "S2": 0.256, "S3": 0.4, "S4": 0.544, "S5": 0.688}
"""Spreads of the mix, evenly spaced."""

CHANGE_PERIODS_S: Mapping[str, float] = {"T1": 3600.0, "T2": 1200.0, "T3": 600.0, "T4": 300.0}
"""Seconds from one dominant type to the next."""

MIX_TYPES: Mapping[str, LengthModel] = {
    "short prompt, short answer": LengthModel(
        prompt_median=220, prompt_spread=0.5, output_median=20, output_spread=0.5
    ),
    "long prompt, short answer": LengthModel(
        prompt_median=2500, prompt_spread=0.4, output_median=20, output_spread=0.5
    ),
    "short prompt, long answer": LengthModel(
        prompt_median=220, prompt_spread=0.5, output_median=350, output_spread=0.4
    ),
    "long prompt, long answer": LengthModel(
        prompt_median=2500, prompt_spread=0.4, output_median=350, output_spread=0.4
    ),
}
"""Four types in the corners of Azure's 2023 traces: code completion has prompts of about 2,500 and
answers of about 20 tokens, long conversations answers of about 350, short ones prompts of 200-300
(the centres that k-means finds in the two traces; Patel et al., "Splitwise", ISCA 2024)."""


def mix_spread(shares: Sequence[float]) -> float:
    """The coefficient of variation of a mix: standard deviation over mean, of the population."""
    mean = math.fsum(shares) / len(shares)
    return math.sqrt(math.fsum((share - mean) ** 2 for share in shares) / len(shares)) / mean


def max_mix_cv(types: int, *, changing: bool) -> float:
    """The largest possible spread of ``types`` types.

    Halfway between two corners the shares of the other types are smallest, and reach 0 at
    ``sqrt((types - 2) / 2)``; a mix that stays in a corner can reach ``sqrt(types - 1)``.
    """
    if changing:
        return math.sqrt((types - 2) / 2) if types >= 3 else 0.0
    return math.sqrt(types - 1)


def mix_shares(
    at_s: float, *, types: int, mix_cv: float, change_period_s: float | None
) -> tuple[float, ...]:
    """Each type's share of the arrivals at a time; they sum to 1 and spread by ``mix_cv``.

    With ``change_period_s`` None the mix is constant and type 0 dominates. Raises OServeError if
    the spread is impossible for so many types.
    """
    _check_mix(types, mix_cv, change_period_s)
    return _shares(at_s, types, mix_cv, change_period_s)


def synthesise_mix(
    types: Mapping[str, LengthModel] = MIX_TYPES,
    *,
    rate_rps: float,
    duration_s: float,
    seed: int,
    mix_cv: float,
    change_period_s: float | None = None,
) -> Iterator[TraceRequest]:
    """Poisson arrivals at ``rate_rps`` for ``duration_s`` seconds; ``model`` names the type.

    The type of each arrival is drawn by the shares at that time, so the types are independent
    Poisson processes with those shares of the rate. Raises OServeError at once for an invalid
    number or an impossible spread.
    """
    for name, value in (("rate_rps", rate_rps), ("duration_s", duration_s)):
        if not 0 < value < math.inf:
            raise OServeError(f"it is {value}", place=name, remedy="give a number over 0")
    _check_mix(len(types), mix_cv, change_period_s)
    return _arrivals(
        types,
        rate_rps=rate_rps,
        duration_s=duration_s,
        seed=seed,
        mix_cv=mix_cv,
        change_period_s=change_period_s,
    )


def _arrivals(
    types: Mapping[str, LengthModel],
    *,
    rate_rps: float,
    duration_s: float,
    seed: int,
    mix_cv: float,
    change_period_s: float | None,
) -> Iterator[TraceRequest]:
    draw = random.Random(seed)
    names = list(types)
    arrival_s = draw.expovariate(rate_rps)
    while arrival_s < duration_s:
        shares = _shares(arrival_s, len(names), mix_cv, change_period_s)
        name = draw.choices(names, cum_weights=list(itertools.accumulate(shares)))[0]
        prompt, output = types[name].draw(draw)
        yield TraceRequest(
            arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, model=name
        )
        arrival_s += draw.expovariate(rate_rps)


def _shares(
    at_s: float, types: int, mix_cv: float, change_period_s: float | None
) -> tuple[float, ...]:
    if types == 1:
        return (1.0,)
    here = there = 0
    from_here, from_there = 1.0, 0.0
    if change_period_s is not None:
        turns, part = divmod(at_s / change_period_s, 1.0)
        here = int(turns) % types
        there = (here + 1) % types
        # Spherical interpolation between two corners, which are this angle apart. Cosine easing
        # makes the speed 0 at the corners, so that rates have no kinks there.
        angle = math.acos(-1.0 / (types - 1))
        eased = (1.0 - math.cos(math.pi * part)) / 2.0
        from_here = math.sin((1.0 - eased) * angle) / math.sin(angle)
        from_there = math.sin(eased * angle) / math.sin(angle)
    # A corner is (e_j - 1/n) / sqrt(1 - 1/n), which the factor c / sqrt(n) turns into this.
    scale = mix_cv / math.sqrt(types - 1)
    level = 1.0 / types - scale * (from_here + from_there) / types
    return tuple(
        # Rounding may carry a share of 0 just below it.
        max(0.0, level + scale * (from_here * (at == here) + from_there * (at == there)))
        for at in range(types)
    )


def _check_mix(types: int, mix_cv: float, change_period_s: float | None) -> None:
    if types < 1:
        raise OServeError("there is no type", place="types", remedy="give at least one")
    changing = change_period_s is not None
    if changing and types < 3:
        raise OServeError(
            f"a mix of {types} cannot change and keep its spread",
            place="types",
            remedy="give three types or more, or no change_period_s",
        )
    if change_period_s is not None and not 0 < change_period_s < math.inf:
        raise OServeError(
            f"it is {change_period_s}", place="change_period_s", remedy="give seconds over 0"
        )
    most = max_mix_cv(types, changing=changing)
    if not 0 <= mix_cv <= most:
        raise OServeError(
            f"a mix of {types} types cannot have a coefficient of variation of {mix_cv}",
            place="mix_cv",
            remedy=f"give one from 0 to {most:.3f}",
        )
