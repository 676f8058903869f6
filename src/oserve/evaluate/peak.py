"""The peak of a trace, and the steady traffic of that rate on which a ladder is built."""

import math
from dataclasses import dataclass, replace

import numpy as np

from oserve.evaluate.ladder_traffic import LadderTraffic, drawn_traffic
from oserve.evaluate.simulator import Floats, Ints, SimulatedTraffic
from oserve.evaluate.switch_scorer import demand_lengths
from oserve.plan.demand import Demand
from oserve.workload.rates import MIN_SPAN_S
from oserve.workload.type_probabilities import of_tier, types_by_tier

# A rate is counted over a minute, but over at least so many requests.
_WINDOW_S = 60.0
_FEWEST_COUNTED = 100
# As many requests around the peak are simulated; of shorter traces, lengths are drawn.
_SIMULATED = 3000
_FEWEST_SIMULATED = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPeak:
    """The busiest window of arrivals: ``rate_rps`` from ``start_s``, over ``window_s`` seconds."""

    rate_rps: float
    start_s: float
    window_s: float


def find_peak(arrival_s: Floats) -> LoadPeak:
    """The busiest window of sorted arrivals; of the whole time where that is shorter."""
    count, whole_s = len(arrival_s), float(arrival_s[-1] - arrival_s[0])
    enough_s = max(_WINDOW_S, _FEWEST_COUNTED * whole_s / count)
    window_s = max(MIN_SPAN_S, min(whole_s, enough_s))
    # The last window that fits ends with the last arrival.
    fitting = int(np.searchsorted(arrival_s, arrival_s[-1] - window_s, side="right"))
    starts = arrival_s[: max(1, fitting)]
    ends = np.searchsorted(arrival_s, starts + window_s, side="right")
    counts = ends - np.arange(len(starts))
    first = int(counts.argmax())
    return LoadPeak(
        rate_rps=float(counts[first]) / window_s,
        start_s=float(starts[first]),
        window_s=window_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeakTraffic:
    """Steady traffic of the peak's rate.

    ``mean_load``: the mean rate as a part of the peak's. ``peak`` and ``words`` say in words what
    the peak is, and what the requests are.
    """

    traffic: LadderTraffic
    mean_load: float
    peak: str
    words: str


def peak_traffic(
    demand: Demand, trace: SimulatedTraffic | None, *, rate_scale: float = 1.0, seed: int = 0
) -> PeakTraffic:
    """The trace's requests around its peak, without its changes from window to window.

    Within a window, the gaps between arrivals keep their proportions. Without a trace the demand's
    rates are the peak, and arrivals are Poisson; so are those of a trace of few requests. The rates
    of the demand are ``rate_scale`` times the trace's.
    """
    if trace is None:
        rates = tuple(kind.arrival_rate_rps for kind in demand.types)
        return PeakTraffic(
            traffic=_drawn(demand, rates, seed),
            mean_load=1.0,
            peak="the given rates",
            words="Poisson arrivals",
        )
    peak = find_peak(trace.arrival_s)
    rate_rps = rate_scale * peak.rate_rps
    at = f"the trace's busiest {peak.window_s / rate_scale:.0f} s"
    mean_load = min(1.0, demand.rate_rps / rate_rps)
    if len(trace) < _FEWEST_SIMULATED:
        rates = tuple(kind.arrival_rate_rps / mean_load for kind in demand.types)
        return PeakTraffic(
            traffic=_drawn(demand, rates, seed),
            mean_load=mean_load,
            peak=at,
            words="Poisson arrivals",
        )
    around = _around(trace, peak)
    steady = _steady(around, peak.window_s, rate_rps)
    kinds = _kinds(demand, steady)
    counts = np.bincount(kinds, minlength=len(demand.types))
    rates = tuple((rate_rps * counts / len(steady)).tolist())
    return PeakTraffic(
        traffic=LadderTraffic(requests=steady, kinds=kinds, rates=rates),
        mean_load=mean_load,
        peak=at,
        words=f"{len(steady):,} requests around {at}",
    )


def _drawn(demand: Demand, rates: tuple[float, ...], seed: int) -> LadderTraffic:
    none = (0.0,) * len(rates)
    return drawn_traffic(demand_lengths(demand), rates, burstiness=none, seed=seed)


def _around(trace: SimulatedTraffic, peak: LoadPeak) -> SimulatedTraffic:
    """The requests of the peak's window, and as many before it as after it."""
    inside = np.searchsorted(trace.arrival_s, [peak.start_s, peak.start_s + peak.window_s])
    more = max(0, _SIMULATED - int(inside[1] - inside[0]))
    low = max(0, min(int(inside[0]) - more // 2, len(trace) - _SIMULATED))
    high = min(len(trace), max(low + _SIMULATED, int(inside[1])))
    return trace.part(low, high, float(trace.arrival_s[low]))


def _steady(traffic: SimulatedTraffic, window_s: float, rate_rps: float) -> SimulatedTraffic:
    """The same requests, with each window stretched or pressed to this rate."""
    pieces = max(1, math.ceil(traffic.duration_s / window_s))
    edges = np.linspace(0.0, traffic.duration_s, pieces + 1)
    before = np.searchsorted(traffic.arrival_s, edges, side="left")
    before[-1] = len(traffic)
    at_s = np.interp(traffic.arrival_s, edges, before / rate_rps)
    return replace(traffic, arrival_s=at_s)


def _kinds(demand: Demand, traffic: SimulatedTraffic) -> Ints:
    """The workload type of each request, as an index."""
    types = types_by_tier(demand.types, [demand.centres[kind.name] for kind in demand.types])
    tiers = [""] * len(traffic)
    if traffic.tier is not None:
        tiers = [demand.tiers[number] for number in traffic.tier.tolist()]
    lengths = zip(traffic.prompt_tokens.tolist(), traffic.output_tokens.tolist(), strict=True)
    found = [
        own.kind(*pair)
        for tier, pair in zip(tiers, lengths, strict=True)
        if (own := of_tier(types, tier)) is not None
    ]
    return np.array(found, dtype=np.int64)
