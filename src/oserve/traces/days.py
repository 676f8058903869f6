"""Seeded traces of a day: rate curves by part, lengths drawn from requests, bursts as measured.

A day consists of parts, such as conversations and code completion. A part has a rate in each window
and a pool of lengths. Arrivals come in slots of ten seconds; the number in a slot is negative
binomial with the part's index of dispersion (variance over mean), which is 1 for Poisson arrivals.
Within a slot arrivals are uniform. Lengths are drawn from the pool with replacement, so that
neither sessions nor runs of similar lengths survive.

Days can be compressed: each window keeps its rate and takes less time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError
from oserve.traces.patterns import CHANGING_TYPES
from oserve.traces.request import TraceRequest
from oserve.traces.synthesise import LengthModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOT_S = 10.0
"""Seconds of a slot, at which dispersion is measured and reproduced."""

WINDOW_S = 600.0
"""Seconds of a window of the published rate curves."""

DAY_S = 86400.0
_TREND_S = 300.0
_POOL = 4000
# A synthetic day: (mean rate, swing, hour of its peak) of each type; the total swings about 5x.
_SYNTHETIC: Mapping[str, tuple[float, float, float]] = {
    "chat": (3.0, 0.80, 14.0),
    "documents": (1.6, 0.85, 11.0),
    "answers": (1.4, 0.85, 17.0),
}
_SYNTHETIC_DISPERSION = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DayPart:
    """``rates_rps``: requests per second in each window of ``window_s``.

    ``prompt_tokens`` and ``output_tokens`` are the pool of lengths, an entry each. ``dispersion``:
    variance over mean of the arrivals in ``SLOT_S``, at least 1.
    """

    name: str
    rates_rps: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    window_s: float = WINDOW_S
    dispersion: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.rates_rps) or not bool((np.isfinite(self.rates_rps)).all()):
            raise OServeError(
                "a rate is missing", place=self.name, remedy="give a rate for each window"
            )
        if not len(self.prompt_tokens) or len(self.prompt_tokens) != len(self.output_tokens):
            raise OServeError(
                "there are no lengths to draw from", place=self.name, remedy="give requests"
            )

    @property
    def duration_s(self) -> float:
        """The length of the rate curve, uncompressed."""
        return len(self.rates_rps) * self.window_s

    def halves(self) -> "tuple[DayPart, DayPart]":
        """The same part with the first half of the pool, and with the second."""
        middle = max(1, len(self.prompt_tokens) // 2)
        cuts = (slice(None, middle), slice(min(middle, len(self.prompt_tokens) - 1), None))
        first, second = (
            replace(
                self, prompt_tokens=self.prompt_tokens[cut], output_tokens=self.output_tokens[cut]
            )
            for cut in cuts
        )
        return first, second


def dispersion_of(arrival_s: Floats, *, slot_s: float = SLOT_S, trend_s: float = _TREND_S) -> float:
    """The index of dispersion: variance over mean of the arrivals per slot.

    It is the mean over stretches of ``trend_s``, weighted by their arrivals, so that a slow change
    of the rate does not count. At least 1, and 1 for less than two stretches.
    """
    per = max(2, round(trend_s / slot_s))
    slots = int(arrival_s.max() // slot_s) if len(arrival_s) else 0
    stretches = slots // per
    if stretches < 2:
        return 1.0
    counts, _ = np.histogram(arrival_s, bins=slots, range=(0.0, slots * slot_s))
    rows = counts[: stretches * per].reshape(stretches, per)
    mean = rows.mean(axis=1)
    if not mean.sum():
        return 1.0
    return max(1.0, float(rows.var(axis=1, ddof=1).sum() / mean.sum()))


def window_rates(rates: Floats, *, window_s: float, start_h: float, hours: float = 24.0) -> Floats:
    """The windows of ``hours`` from ``start_h`` on. Raises OServeError if the curve ends before."""
    first = round(start_h * 3600.0 / window_s)
    count = round(hours * 3600.0 / window_s)
    chosen = rates[first : first + count]
    if first < 0 or len(chosen) < count or not count:
        raise OServeError(
            f"the rates end after {len(rates) * window_s / 3600:g} h",
            place=f"{hours:g} h from hour {start_h:g}",
            remedy="begin earlier, or take fewer hours",
        )
    return chosen


def synthesise_day(
    parts: Sequence[DayPart], *, seed: int, load: float = 1.0, compress: float = 1.0
) -> list[TraceRequest]:
    """All parts together, ``load`` times their rates; ``model`` names the part.

    ``compress``: each window takes so many times less time at the same rate. Raises OServeError for
    numbers that are not over 0.
    """
    _check(load=load, compress=compress)
    columns = [
        _arrivals(part, np.random.default_rng([seed, at]), load, compress)
        for at, part in enumerate(parts)
    ]
    made = [
        TraceRequest(arrival_s=at_s, prompt_tokens=prompt, output_tokens=output, model=part.name)
        for part, (arrival, prompts, outputs) in zip(parts, columns, strict=True)
        for at_s, prompt, output in zip(
            arrival.tolist(), prompts.tolist(), outputs.tolist(), strict=True
        )
    ]
    return sorted(made, key=lambda request: request.arrival_s)


def _arrivals(
    part: DayPart, draw: np.random.Generator, load: float, compress: float
) -> tuple[Floats, Ints, Ints]:
    window_s = part.window_s / compress
    slots = max(1, round(window_s / SLOT_S))
    slot_s = window_s / slots
    mean = np.repeat(part.rates_rps * load * slot_s, slots)
    excess = part.dispersion - 1.0
    if excess > 0:
        # A Poisson count with a gamma mean of this shape has variance dispersion * mean.
        mean = np.where(mean > 0, draw.gamma(np.maximum(mean, 1e-12) / excess, excess), 0.0)
    counts = draw.poisson(mean)
    total = int(counts.sum())
    arrival = (np.repeat(np.arange(len(counts)), counts) + draw.random(total)) * slot_s
    chosen = draw.integers(0, len(part.prompt_tokens), total)
    arrival.sort()
    return arrival, part.prompt_tokens[chosen], part.output_tokens[chosen]


def compress_day(
    requests: Sequence[TraceRequest],
    *,
    compress: float,
    load: float = 1.0,
    seed: int = 0,
    window_s: float = WINDOW_S,
) -> list[TraceRequest]:
    """A trace in less time: of each window a part of ``1 / compress``, ``load`` times over.

    The first part of a window is kept as it is, so bursts keep their form. A ``load`` over 1 lays
    further parts of the same window on top, one below 1 drops requests at random. Raises
    OServeError if the load exceeds ``compress``: there are no more requests than that.
    """
    _check(load=load, compress=compress)
    if load > compress:
        raise OServeError(
            f"the load is {load:.2f} times the trace's, which has requests for {compress:g}",
            place="--compress",
            remedy=f"compress the day at least {math.ceil(load)} times",
        )
    draw = np.random.default_rng([seed, 7])
    part_s = window_s / compress
    lots = draw.random(len(requests))
    kept = []
    for request, lot in zip(requests, lots.tolist(), strict=True):
        window, within_s = divmod(request.arrival_s, window_s)
        layer, offset_s = divmod(within_s, part_s)
        if lot < load - layer:
            kept.append(replace(request, arrival_s=window * part_s + offset_s))
    return sorted(kept, key=lambda request: request.arrival_s)


def synthetic_parts(*, seed: int, hours: float = 24.0) -> list[DayPart]:
    """A day for those without traces: three types that peak at different hours.

    Documents peak before noon, chats after it, long answers in the evening. The total swings about
    5 times between night and day.
    """
    at_h = (np.arange(round(hours * 3600.0 / WINDOW_S)) + 0.5) * WINDOW_S / 3600.0
    parts = []
    for place, (name, (mean, swing, peak_h)) in enumerate(_SYNTHETIC.items()):
        wave = np.cos(2.0 * math.pi * (at_h - peak_h) / 24.0)
        prompts, outputs = _pool(CHANGING_TYPES[name], np.random.default_rng([seed, 100 + place]))
        parts.append(
            DayPart(
                name=name,
                rates_rps=mean * (1.0 + swing * wave),
                prompt_tokens=prompts,
                output_tokens=outputs,
                dispersion=_SYNTHETIC_DISPERSION,
            )
        )
    return parts


def _pool(model: LengthModel, draw: np.random.Generator) -> tuple[Ints, Ints]:
    def lengths(median: float, spread: float, most: int) -> Ints:
        drawn = np.rint(draw.lognormal(math.log(median), spread, _POOL))
        found: Ints = np.clip(drawn, 1, most).astype(np.int64)
        return found

    return (
        lengths(model.prompt_median, model.prompt_spread, model.max_prompt_tokens),
        lengths(model.output_median, model.output_spread, model.max_output_tokens),
    )


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise OServeError(f"it is {value}", place=name, remedy="give a number over 0")
