"""Change detection: flash crowds found within seconds from per-second counts.

For every stream (each type, and the total) and every factor c it runs the CUSUM of the log
likelihood ratio of counts at c times the rate against counts at the rate (Page 1954),
``S = max(0, S + l)``. Counts y are negative binomial with mean m and shape r, Poisson for large r:
``l = y ln(c (m + r) / (c m + r)) - r ln((c m + r) / (m + r))``. The rate m is that of the last
minutes. r follows from the variance over the mean of single ticks; ``l`` is divided by the ratio of
that in blocks of ten ticks to that of single ticks, which corrects for autocorrelation. The
detector raises an alarm if ``S > h``.

False alarms: at an unchanged rate the mean time to a false alarm of one CUSUM is at least
``exp(h)`` ticks (Lorden 1971), so that of n CUSUMs is at least ``exp(h) / n``; ``h`` is set such
that this is ``false_alarm_s``. The bound holds for Poisson and negative binomial counts with known
rate and variance. A burst too rare to be part of the estimated variance raises an alarm, and
rightly: it is a change.

Detection delay for Poisson counts: about ``h / (m (c ln c - c + 1))`` ticks for a rise by c.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oserve.core import OServeError
from oserve.forecast.state import Stateful
from oserve.workload.columns import Floats

FACTORS = (1.5, 2.5, 6.0, 0.6, 0.3)
"""The tested changes; the nearest one finds others."""

TOTAL = "total"

_MEMORY_S = 300.0
_BLOCK = 10
_WARM_TICKS = 30.0
_DOUBT = 2.0
_MOST = 9.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePoint:
    """A detected change of a stream's rate.

    ``stream`` is a type's name or "total". ``ticks``: the estimated age of the change in ticks of
    the detector. The rates before and since the change are in requests/s.
    """

    stream: str
    ticks: int
    before_rps: float
    after_rps: float


class ChangeDetector(Stateful):
    """Observes counts tick by tick (a second by default) and reports changes.

    Raises OServeError if ``tick_s`` or ``false_alarm_s`` is not over 0.
    """

    _saved = (
        *("_sum", "_start", "_ticks", "_since", "_rate", "_weight", "_fano", "_fano_weight"),
        *("_block", "_block_ticks", "_block_fano", "_block_weight"),
    )

    def __init__(
        self, names: Sequence[str], *, tick_s: float = 1.0, false_alarm_s: float = 86400.0
    ) -> None:
        for place, value in (("tick_s", tick_s), ("false_alarm_s", false_alarm_s)):
            if not 0 < value < math.inf:
                raise OServeError(f"it is {value}", place=place, remedy="give seconds over 0")
        self.names, self._tick_s = (*names, TOTAL), tick_s
        streams = len(self.names)
        tests = streams * len(FACTORS)
        self.threshold = math.log(max(math.e, tests * false_alarm_s / tick_s))
        self._keep = math.exp(-tick_s / _MEMORY_S)
        self._factor = np.array(FACTORS)[:, None]
        self._sum = np.zeros((len(FACTORS), streams))
        # Ticks and arrivals since a CUSUM was last at 0.
        self._ticks = np.zeros((len(FACTORS), streams))
        self._since = np.zeros((len(FACTORS), streams))
        self._start = np.zeros(streams)
        self._rate = np.zeros(streams)
        self._weight = np.zeros(streams)
        self._fano, self._fano_weight = np.ones(streams), np.zeros(streams)
        self._block, self._block_ticks = np.zeros(streams), 0
        self._block_fano, self._block_weight = np.ones(streams), np.zeros(streams)

    def update(self, counts: npt.ArrayLike) -> tuple[ChangePoint, ...]:
        """Observe the arrivals of each type in a completed tick, (k,), and return new changes.

        A tick with a NaN is missing and changes nothing. Each change is reported once; the
        reference for later ticks is then the rate since the change.
        """
        y = np.asarray(counts, dtype=np.float64)
        if y.shape != (len(self.names) - 1,):
            raise ValueError(f"counts {y.shape} of {len(self.names) - 1} types")
        if np.isnan(y).any():
            return ()
        y = np.append(y, y.sum())
        found = self._test(y)
        self._learn(y)
        return found

    def _test(self, y: Floats) -> tuple[ChangePoint, ...]:
        warm = self._weight >= _WARM_TICKS * 0.9
        together = np.maximum(1.0, self._block_fano / self._fano)
        spread = self._fano * together
        # An uncertain rate is taken at the end of its range that favours no change.
        error = _DOUBT * np.sqrt((self._rate + 1 / 60) * spread / np.maximum(self._weight, 1.0))
        up = self._factor > 1
        rate = np.where(up, self._rate + error, np.maximum(self._rate - error, 0.0))
        shape = np.maximum(rate, 1e-9) / np.maximum(self._fano - 1, 1e-6)
        after = self._factor * rate + shape
        gain = y * np.log(self._factor * (rate + shape) / after)
        gain = (gain - shape * np.log(after / (rate + shape))) / together
        total = np.maximum(0.0, self._sum + np.where(warm, gain, 0.0))
        running = total > 0
        self._sum = total
        self._ticks = np.where(running, self._ticks + 1, 0.0)
        self._since = np.where(running, self._since + y, 0.0)
        changes = []
        for stream in np.flatnonzero((total > self.threshold).any(axis=0)):
            test = int(np.argmax(total[:, stream]))
            ticks = self._ticks[test, stream]
            level = self._since[test, stream] / ticks
            changes.append(
                ChangePoint(
                    stream=self.names[stream],
                    ticks=int(ticks),
                    before_rps=float(self._rate[stream] / self._tick_s),
                    after_rps=float(level / self._tick_s),
                )
            )
            self._rate[stream], self._weight[stream] = level, ticks
            self._sum[:, stream] = self._ticks[:, stream] = self._since[:, stream] = 0.0
            # The block with the change would count as noise.
            self._block_ticks, self._block = 0, np.zeros(len(self.names))
        return tuple(changes)

    def _learn(self, y: Floats) -> None:
        rate = np.maximum(self._rate, 1e-6)
        ready = self._weight >= _WARM_TICKS / 3
        self._fano, self._fano_weight = _mean_square(
            (self._fano, self._fano_weight), y, rate, ready, self._keep
        )
        self._block += y
        self._block_ticks += 1
        if self._block_ticks == _BLOCK:
            self._block_fano, self._block_weight = _mean_square(
                (self._block_fano, self._block_weight),
                self._block,
                rate * _BLOCK,
                ready,
                self._keep**_BLOCK,
            )
            self._block, self._block_ticks = np.zeros(len(self.names)), 0
        self._weight = self._keep * self._weight + 1
        self._rate = self._rate + (y - self._rate) / self._weight


def _mean_square(
    before: tuple[Floats, Floats],
    y: Floats,
    mean: Floats,
    ready: npt.NDArray[np.bool_],
    keep: float,
) -> tuple[Floats, Floats]:
    """The running variance over mean, at least 1, and its weight; the prior of 1 weighs ten."""
    value, weight = before
    # A single tick of a change must not count as noise.
    size = np.minimum((y - mean) ** 2 / np.maximum(mean, 0.2), _MOST * value)
    more = np.where(ready, keep * weight + 1, weight)
    moved = np.maximum(1.0, value + (size - value) / (more + 10.0))
    return np.where(ready, moved, value), more
