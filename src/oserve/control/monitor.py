"""The traffic monitor: arrival counts, their forecast, and the last change of the traffic.

Fed once a second, without I/O. A decision is due at the end of each interval, and shortly after a
change of the traffic.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from oserve.control.bursts import burstiness_of
from oserve.control.collector import Collector
from oserve.control.decision import Trigger, TypeForecast
from oserve.control.evaluation import ForecastStep, TypeRates
from oserve.control.load_facts import LoadFacts
from oserve.control.policy import ControlPolicy
from oserve.control.tally import Batch
from oserve.forecast.detect import ChangeDetector
from oserve.forecast.forecaster import Forecaster
from oserve.forecast.retype import replayed
from oserve.workload.columns import Floats

# Counts of other processes arrive a little late, so the last second is not used yet.
_LAG_S = 1
_PARTS = 6
_FEWEST_S = 3
# Recent rates are given in pieces of this length, over whole periods of the queue's order.
_PIECE_S, _PERIOD_S = 15, 300
# A backlog is followed back over so many periods at most.
_MOST_PERIODS = 4
# Windows for the rates before a change; the longest that is available counts.
_BEFORE_S = (900, 300, 60, 10)
_LIKELY = 0.9
_BAND = (0.05, 0.95)
# Pieces and spans of the facts for a ladder, in seconds.
LAST_S, _FEWEST_RECENT_S, _MIX_S = 10, 30, 600
_BURST_S, _BURST_PIECES = 10, 60
# Halves of a span are compared in this many parts; spans are multiples of as many seconds.
_SPAN_S = 20
# Standard errors of their difference. Several spans of several types are compared.
_SIGNIFICANT = 4.0
# How long the longest request stays on a replica, in multiples of the mean.
_LONGEST = 2.0


class TrafficMonitor:
    """``forecaster`` and ``detector`` must have the same workload types."""

    def __init__(
        self, policy: ControlPolicy, forecaster: Forecaster, detector: ChangeDetector
    ) -> None:
        self.collector = Collector(forecaster.names, size_s=max(3600, 4 * policy.interval_s))
        self.began_s = -1
        """The second when the traffic last changed; negative if it has not."""
        self.last_arrival_s = -1.0
        """The second of the last arrival; negative without any."""
        self.shrunk = False
        """Whether the cluster was scaled down because no requests came."""
        self._policy = policy
        self._forecaster = forecaster
        self._detector = detector
        self._window_end_s = -1
        # The last second in which no request waited.
        self._idle_s = -1
        self._detected_s = -1
        self._change_s: float | None = None
        self._recheck_s: float | None = None
        self._bursts: tuple[int, tuple[float, ...]] = (-1, (0.0,) * len(forecaster.names))
        self._usual: Floats = np.zeros(len(forecaster.names))

    def observe(
        self,
        now_s: float,
        batches: Sequence[Batch] = (),
        gauges: Mapping[str, float] | None = None,
    ) -> Trigger | None:
        """Once a second: add what was counted; returns why a decision is due, if one is."""
        for batch in batches:
            self.collector.add(batch)
        self.collector.tick(now_s, gauges)
        if gauges is None or gauges.get("waiting", 0.0) + gauges.get("queued", 0.0) <= 0:
            self._idle_s = int(now_s)
        end_s = int(now_s) - _LAG_S
        if self._detected_s < 0 or end_s - self._detected_s > self.collector.size_s // 2:
            self._detected_s = end_s
        while self._detected_s < end_s:
            self._detected_s += 1
            self._detect(now_s, self._detected_s)
        if self._window_end_s < 0:
            self._window_end_s = end_s
        due = self._close_windows(end_s)
        # After a scale-down, any arrival brings the replicas back; its rate hardly matters.
        settle_s = min(self._policy.settle_s, self._policy.interval_s / 2)
        if self.shrunk:
            settle_s = min(_FEWEST_S, settle_s)
        if self._change_s is not None and now_s >= self._change_s + settle_s:
            self._change_s = None
            self._shift()
            self._schedule_recheck(now_s)
            return Trigger.CHANGE
        if self._recheck_s is not None and now_s >= self._recheck_s:
            self._schedule_recheck(now_s)
            return Trigger.CHANGE
        # While a change settles, the forecast is still that of the traffic before it.
        return Trigger.INTERVAL if due and self._change_s is None else None

    def _detect(self, now_s: float, end_s: int) -> None:
        """Test one second for a change of the traffic."""
        counts = self.collector.window(end_s, 1).counts
        arrived = float(np.nansum(counts)) > 0
        if arrived:
            self.last_arrival_s = float(end_s)
        changes = self._detector.update(counts)
        if changes or (arrived and self.shrunk):
            if self._change_s is None:
                self._change_s = now_s
                self._recheck_s = None
            self.began_s = end_s - min((change.ticks for change in changes), default=1)

    def _schedule_recheck(self, now_s: float) -> None:
        """Schedule another decision when the change is half as old again.

        By then another plan may have been better for long enough. The interval may come first.
        """
        age_s = now_s - self.began_s
        self._recheck_s = now_s + age_s / 2 if age_s < self._policy.interval_s else None

    def _shift(self) -> None:
        """Set the forecaster to the rates since the change."""
        self._forecaster.shift(np.array(self.now_rps()) * self._forecaster.interval_s)

    def _close_windows(self, end_s: int) -> bool:
        width_s = self._policy.interval_s
        due = False
        missed = (end_s - self._window_end_s) // width_s
        if missed * width_s > self.collector.size_s - width_s:
            self._forecaster.skip(missed - 1)
            self._window_end_s += (missed - 1) * width_s
        while end_s - self._window_end_s >= width_s:
            self._window_end_s += width_s
            parts = next(p for p in (_PARTS, 5, 4, 3, 2, 1) if width_s % p == 0)
            window = self.collector.window(self._window_end_s, width_s, parts=parts)
            self._forecaster.update(window.counts, window.parts)
            if np.nansum(window.counts) > 0:
                self._usual = 0.8 * self._usual + 0.2 * np.nan_to_num(window.counts) / width_s
            due = True
        return due

    def now_rps(self) -> TypeRates:
        """Current requests/s of each type, over seconds after the last change only."""
        end_s = max(1, self.collector.newest_s)
        width_s = min(self._policy.now_s, max(_FEWEST_S, end_s - self.began_s))
        rates = self.collector.rates_rps(end_s, width_s)
        return tuple(np.nan_to_num(rates).tolist())

    def recent_rps(self) -> TypeRates:
        """Requests/s of each type over two intervals, after the last change only."""
        end_s = max(1, self.collector.newest_s)
        width_s = min(self._recent_s, max(LAST_S, end_s - self.began_s))
        return _rates(self.collector.rates_rps(end_s, width_s))

    def last_rps(self) -> TypeRates:
        """Requests/s of each type over the last ``LAST_S`` seconds."""
        return _rates(self.collector.rates_rps(max(1, self.collector.newest_s), LAST_S))

    def drain_s(self) -> float:
        """Seconds that a replica needs to drain now; 0 if unknown.

        By Little's law a request stays for (requests held) / (requests completed per second),
        queueing included; the last one stays longer.
        """
        gauges = self.collector.gauges
        held = gauges.get("running", 0.0) + gauges.get("waiting", 0.0)
        ended_rps = self.collector.ended_rps(max(1, self.collector.newest_s), self._policy.now_s)
        return _LONGEST * held / ended_rps if ended_rps > 0 else 0.0

    def wait_s(self) -> float | None:
        """Seconds that a request waits if as many end as lately; ``None`` without observations."""
        gauges = self.collector.gauges
        if not gauges:
            return None
        waiting = gauges.get("waiting", 0.0) + gauges.get("queued", 0.0)
        ended_rps = self.collector.ended_rps(max(1, self.collector.newest_s), self._policy.now_s)
        return waiting / max(ended_rps, 1.0 / self._policy.now_s)

    def forecast(self) -> tuple[TypeForecast, ...]:
        """The forecast of the next interval, by type."""
        found = self._forecaster.forecast()
        now = self.now_rps()
        low, high = (found.quantile_rps(level) for level in _BAND)
        return tuple(
            TypeForecast(
                name=name,
                now_rps=now[index],
                expected_rps=_number(found.rates_rps[0, index]),
                low_rps=_number(low[0, index]),
                high_rps=_number(high[0, index]),
            )
            for index, name in enumerate(found.names)
        )

    def past(self) -> tuple[tuple[TypeRates, float], ...]:
        """Recent rates, each with the seconds it held.

        They start where a period of the queue's freshest-first order starts, and before the
        requests arrived that wait now: traffic that begins later would leave out their backlog.
        """
        end_s = self.collector.newest_s
        period_s = end_s - end_s % _PERIOD_S
        waits_s = self._idle_s - self._idle_s % _PERIOD_S
        first_s = max(min(period_s - _PERIOD_S, waits_s), period_s - _MOST_PERIODS * _PERIOD_S)
        found: list[tuple[TypeRates, float]] = []
        for start_s in range(max(0, first_s), end_s, _PIECE_S):
            width_s = min(_PIECE_S, end_s - start_s)
            rates = self.collector.rates_rps(start_s + width_s, width_s)
            if found or not np.isnan(rates).any():
                found.append((tuple(np.nan_to_num(rates).tolist()), float(width_s)))
        return tuple(found)

    def before_rps(self) -> TypeRates:
        """Requests/s of each type before the last change; empty if unknown."""
        held = range(1, self.collector.size_s - (self.collector.newest_s - self.began_s))
        for width_s in _BEFORE_S if self.began_s > 0 else ():
            if width_s in held:
                rates = self.collector.rates_rps(self.began_s, width_s)
                if not np.isnan(rates).any():
                    return tuple(rates.tolist())
        return ()

    def age_s(self) -> float:
        """Seconds for which the traffic has been as it is now; 0 if it never changed.

        It has changed at least as often as the detector says: on a ramp or a wave no rates last. So
        it is the longest span since the last detected change in which neither half has
        significantly more arrivals of a type.
        """
        if self.began_s <= 0:
            return 0.0
        end_s = self.collector.newest_s
        since_s = min(end_s - self.began_s, self.collector.size_s)
        found_s = min(since_s, _SPAN_S)
        for width_s in range(_SPAN_S, since_s + 1, _SPAN_S):
            if not _is_steady(self.collector.window(end_s, width_s, parts=_SPAN_S).parts):
                break
            found_s = width_s
        return float(found_s if found_s + _SPAN_S <= since_s else since_s)

    def likely(self) -> tuple[TypeRates, ...]:
        """Rates to plan for: the expected ones, and a high quantile."""
        found = self._forecaster.forecast()
        high_rps = found.quantile_rps(_LIKELY).mean(axis=0)
        return tuple(
            tuple(np.nan_to_num(rates).tolist())
            for rates in (found.rates_rps.mean(axis=0), high_rps)
        )

    def load_facts(self, quantile: float, fall_after_s: float) -> LoadFacts:
        """The facts for a controller that follows a ladder; ``quantile``: of the forecast."""
        collector, found = self.collector, self._forecaster.forecast()
        end_s = max(1, collector.newest_s)
        upper = found.quantile_rps(quantile)

        def rates(before_s: int, width_s: int) -> TypeRates:
            return _rates(collector.rates_rps(before_s, width_s))

        since_s = end_s - self.began_s if self.began_s > 0 else collector.size_s
        # While less than half of that was watched, there are no rates: the planned mix holds.
        mix_s = max(self._policy.now_s, min(_MIX_S, since_s, collector.size_s - 1))
        return LoadFacts(
            now=self.recent_rps(),
            last=self.last_rps(),
            last_s=LAST_S,
            expected=tuple(_rates(row) for row in found.rates_rps),
            upper=tuple(_rates(row) for row in upper),
            step_s=found.interval_s,
            peaks=self._peaks(end_s, fall_after_s),
            mix=rates(end_s, mix_s),
            mix_s=mix_s,
            burstiness=self.burstiness,
            watched_s=collector.watched_s,
            wait_s=self.wait_s(),
        )

    def _peaks(self, end_s: int, fall_after_s: float) -> tuple[TypeRates, ...]:
        """Rates over pieces of the last ``fall_after_s`` seconds, as far as counts are held."""
        piece_s = self._recent_s
        last_s = end_s - piece_s
        longest_s = min(fall_after_s - piece_s, last_s, self.collector.size_s - piece_s)
        pieces = int(longest_s) // piece_s
        if pieces < 1:
            return ()
        found = self.collector.window(last_s, pieces * piece_s, parts=pieces).parts
        return tuple(_rates(row / piece_s) for row in found)

    @property
    def _recent_s(self) -> int:
        """Two intervals: a shorter time would count the bursts that deployments hold anyway."""
        return max(_FEWEST_RECENT_S, 2 * self._policy.interval_s)

    @property
    def burstiness(self) -> tuple[float, ...]:
        """The relative variance of the rate, of each type, between pieces of ten seconds."""
        end_s = max(1, self.collector.newest_s)
        if self._bursts[0] == end_s // _BURST_S:
            return self._bursts[1]
        width_s = _BURST_PIECES * _BURST_S
        found = burstiness_of(self.collector.window(end_s, width_s, parts=_BURST_PIECES).parts)
        self._bursts = end_s // _BURST_S, found
        return found

    def usual(self) -> tuple[TypeRates, ...]:
        """Rates to plan for while no requests come: the usual ones."""
        return (tuple(self._usual.tolist()),)

    def steps(self) -> tuple[ForecastStep, ...]:
        """The forecast as scenarios, step by step: each quantile with its probability."""
        found = self._forecaster.forecast()
        ends = [0.0, *((a + b) / 2 for a, b in pairwise(found.quantiles)), 1.0]
        rates = np.nan_to_num(found.quantile_counts / found.interval_s)
        steps = []
        for step in range(rates.shape[1]):
            probabilities: dict[TypeRates, float] = {}
            for level, (low, high) in enumerate(pairwise(ends)):
                key = tuple(rates[level, step].tolist())
                probabilities[key] = probabilities.get(key, 0.0) + high - low
            expected = tuple(np.nan_to_num(found.rates_rps[step]).tolist())
            steps.append(
                ForecastStep(
                    seconds=found.interval_s, probabilities=probabilities, expected=expected
                )
            )
        return tuple(steps)

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """State for ``restore``, as plain data."""
        return {
            "collector": self.collector.state(),
            "forecaster": self._forecaster.state(),
            "detector": self._detector.state(),
            "began_s": self.began_s,
            "window_end_s": self._window_end_s,
            "last_arrival_s": self.last_arrival_s,
            "usual": self._usual.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state`` of the same types. Raises OServeError if they differ."""
        self._forecaster.restore(state["forecaster"])
        self._detector.restore(state["detector"])
        self.collector.restore(state["collector"])
        self._usual = np.array(state["usual"], dtype=np.float64)
        self.restore_course(state)

    def restore_course(self, state: Mapping[str, Any]) -> None:
        """Restore only the parts of ``state`` that do not depend on types."""
        self.began_s = int(state["began_s"])
        self._window_end_s = int(state["window_end_s"])
        self.last_arrival_s = float(state["last_arrival_s"])

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The levels of the forecast."""
        return self._forecaster.levels

    def replay_history(self, history: Floats) -> None:
        """Feed windows of counts, (n, k), oldest first, to a forecaster that has seen none."""
        replayed(self._forecaster, history)


def _rates(values: Floats) -> TypeRates:
    found: tuple[float, ...] = tuple(np.nan_to_num(values).tolist())
    return found


def _is_steady(parts: Floats) -> bool:
    """Whether the halves of these counts, (p, k), differ by no more than chance.

    Arrivals may come in bursts, so the variance is that of the parts, and at least Poisson's.
    """
    halves = np.split(parts, 2)
    if np.isnan(parts).any():
        return True
    means = [half.mean(axis=0) for half in halves]
    spread = sum(
        np.maximum(half.var(axis=0, ddof=1), mean) / len(half)
        for half, mean in zip(halves, means, strict=True)
    )
    return bool((np.abs(means[0] - means[1]) <= _SIGNIFICANT * np.sqrt(spread)).all())


def _number(value: Any) -> float:
    return float(np.nan_to_num(value))
