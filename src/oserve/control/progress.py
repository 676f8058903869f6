"""Hang detection: whether an engine makes progress, judged from a sample every second or so.

A *sign of life* is an answer of the engine core or a change of its counters. Between two signs the
engine is *silent*. One step may take long, so the limit of a silence depends on what the engine's
processes do meanwhile:

    a process is stopped             ``after_s``, of the time it is stopped
    no process computes              ``after_s``, or ``steps`` times the longest step, if longer
    some process computes, or its    ``_WORKING`` times that: a long step, an overloaded machine,
    activity is unknown              or an infinite loop

The longest step is the time of a whole chunk at warm-up, or the longest silence that ended by
itself. An engine has *stalled* if its core answers but its running requests do not advance.

A late sample counts little: answers may have waited for the same processor as the observer.
"""

from dataclasses import dataclass
from math import inf

# A long step computes; so does a spin lock, which this longer limit still finds.
_WORKING = 3.0
_STALLED = 6.0
# Share of one processor; below it, processes only wait for each other.
_WORKING_SHARE = 0.25
# An engine that loads has no core to ask; any activity is a sign of life.
_LOADING_SHARE = 0.05
# A busy machine makes silences longer; what is learned from them has this limit.
_MOST_LEARNED_S = 15.0
# An engine that loads may wait for a disk or a download.
_LOADING_S = 60.0
# Half-life of the longest silence.
_HALF_LIFE_S = 600.0
# A sample that comes later than this many intervals counts as this many.
_LATE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the processes of an engine do. ``work_s`` and ``moved`` only grow.

    ``stopped``: processes that are stopped (SIGSTOP, a debugger). ``blocked``: a process waits for
    a disk or a device. ``work_s``: seconds in which threads computed or were ready to. ``moved``:
    bytes read, written and logged.
    """

    stopped: int = 0
    blocked: bool = False
    work_s: float = 0.0
    moved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSample:
    """One sample of an engine. ``answered``: its core answered since the last sample.

    ``counts``: counters that change only when it computes; ``None`` if they could not be read.
    ``running``: requests in its batch. ``owes``: an answer, or progress of a request, is due.
    """

    now_s: float
    answered: bool = False
    owes: bool = True
    running: int = 0
    counts: tuple[float, ...] | None = None
    activity: Activity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressLimits:
    """Longest silence in seconds while processes are stopped, idle or working.

    ``stalled_s``: how long running requests may make no progress though the core answers.
    """

    stopped_s: float
    idle_s: float
    working_s: float
    stalled_s: float


def serving_limits(after_s: float, steps: float, longest_step_s: float) -> ProgressLimits:
    """Limits of an engine that serves."""
    idle_s = max(after_s, steps * longest_step_s)
    return ProgressLimits(
        stopped_s=after_s,
        idle_s=idle_s,
        working_s=_WORKING * idle_s,
        stalled_s=_STALLED * idle_s,
    )


def waiting_limits(after_s: float, steps: float, longest_step_s: float) -> ProgressLimits:
    """Limits of an engine on standby, which waits for its weights.

    The switch that fills it has deadlines of its own, so it may compute without limit.
    """
    idle_s = max(after_s, steps * longest_step_s)
    return ProgressLimits(stopped_s=after_s, idle_s=idle_s, working_s=inf, stalled_s=inf)


def loading_limits(after_s: float) -> ProgressLimits:
    """Limits of an engine that loads; the whole start has a deadline of its own."""
    idle_s = max(after_s, _LOADING_S)
    return ProgressLimits(stopped_s=after_s, idle_s=idle_s, working_s=inf, stalled_s=inf)


class ProgressTracker:
    """Follows one engine, sampled every ``interval_s``; ``step_s``: time of a whole chunk."""

    def __init__(
        self, *, after_s: float, steps: float, interval_s: float, step_s: float = 0.0
    ) -> None:
        self._after_s = after_s
        self._steps = steps
        self._interval_s = interval_s
        self._step_s = step_s
        self._learned_s = 0.0
        self._last_s: float | None = None
        self._counts: tuple[float, ...] | None = None
        self._stopped_s = 0.0
        self._was_stopped = False
        self._first: tuple[float, float] | None = None
        self._work_s: float | None = None
        self._stalled_s = 0.0
        self.silent_s = 0.0
        self.limit_s = self.limits().idle_s
        self.nearest = 0.0

    @property
    def longest_step_s(self) -> float:
        """The longest step known of."""
        return max(self._step_s, min(self._learned_s, _MOST_LEARNED_S))

    def limits(self, *, loading: bool = False, standby: bool = False) -> ProgressLimits:
        """The limits that apply now."""
        if loading:
            return loading_limits(self._after_s)
        limits_of = waiting_limits if standby else serving_limits
        return limits_of(self._after_s, self._steps, self.longest_step_s)

    def observe(
        self, sample: ProgressSample, *, loading: bool = False, standby: bool = False
    ) -> str:
        """Take in a sample; returns why the engine hangs, or an empty string.

        ``nearest`` becomes the largest fraction of a limit that was reached so far.
        """
        passed_s = self._passed_s(sample.now_s)
        moved = sample.counts is not None and sample.counts != self._counts
        if sample.counts is not None:
            self._counts = sample.counts
        self._stalled_s = 0.0 if moved or sample.running == 0 else self._stalled_s + passed_s
        limits = self.limits(loading=loading, standby=standby)
        worked = self._worked(sample.activity, passed_s)
        alive = sample.answered or moved or not sample.owes
        if loading:
            # Processes that wait for a stopped one wake now and then, and may log it.
            alive = (moved or worked) and not (
                sample.activity is not None and sample.activity.stopped
            )
        if alive:
            self._end_silence(serves=not (loading or standby))
        else:
            self.silent_s += passed_s
            self._follow(sample.activity, passed_s)
        self._learned_s *= 0.5 ** (passed_s / _HALF_LIFE_S)
        return self._verdict(sample, limits)

    def _passed_s(self, now_s: float) -> float:
        """Seconds since the last sample, as far as they count."""
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            return 0.0
        return min(max(0.0, now_s - last_s), _LATE * self._interval_s)

    def _worked(self, activity: Activity | None, passed_s: float) -> bool:
        """Whether any of the engine's processes computed since the last sample."""
        before_s, self._work_s = self._work_s, activity.work_s if activity is not None else None
        if before_s is None or self._work_s is None:
            return False
        return self._work_s - before_s > _LOADING_SHARE * passed_s

    def _end_silence(self, *, serves: bool) -> None:
        """End a silence: it was one step if the engine ``serves`` and was not stopped."""
        if self.silent_s > 0.0 and serves and not self._was_stopped:
            self._learned_s = max(self._learned_s, self.silent_s + self._interval_s)
        self.silent_s = self._stopped_s = 0.0
        self._was_stopped = False
        self._first = None

    def _follow(self, activity: Activity | None, passed_s: float) -> None:
        if activity is None:
            self._stopped_s = 0.0
            return
        if self._first is None:
            self._first = (self.silent_s, activity.work_s)
        if activity.stopped:
            self._stopped_s += passed_s
            self._was_stopped = True
        else:
            self._stopped_s = 0.0

    def _works(self, activity: Activity | None) -> bool:
        """Whether a silence may be a long step; true if that is unknown."""
        if activity is None or self._first is None or activity.blocked:
            return True
        since_s, before_s = self._first
        worked_s = activity.work_s - before_s
        return worked_s >= _WORKING_SHARE * max(self._interval_s, self.silent_s - since_s)

    def _verdict(self, sample: ProgressSample, limits: ProgressLimits) -> str:
        silent_s = self.silent_s
        works = silent_s > 0.0 and self._works(sample.activity)
        self.limit_s = limits.working_s if works else limits.idle_s
        reached = {
            "stopped": self._stopped_s / limits.stopped_s,
            "silent": silent_s / self.limit_s,
            "stalled": self._stalled_s / limits.stalled_s,
        }
        self.nearest = max(self.nearest, *reached.values())
        if reached["stopped"] >= 1.0:
            return f"hangs: a process of it has been stopped for {self._stopped_s:.0f} s"
        if reached["silent"] >= 1.0:
            doing = "though it computes" if works else "and computes nothing"
            return f"hangs: it has shown no sign of life for {silent_s:.0f} s {doing}"
        if reached["stalled"] >= 1.0:
            return f"hangs: {sample.running} running requests stalled for {self._stalled_s:.0f} s"
        return ""
