"""Whether an engine gets on: from what is seen of it, once a second or so, to a verdict. Pure.

An engine shows that it lives by *signs*: its core answers a question that only the core can answer,
or what it counts has changed. Between two signs it is *silent*. A step may take long, so how long a
silence may last follows from what its processes do meanwhile:

    a process is stopped               ``after_s``, counted while it is
    nothing of it computes             ``after_s``, or ``steps`` times the longest step, if longer
    something computes, or cannot      ``_WORKING`` times that: a long step, a machine that is
    be looked at                       shared with too many others, or a loop that never ends

The longest step is what a whole chunk took when the engine warmed up, or the longest silence that
ended by itself. An engine whose core answers while running requests do not advance has *stalled*.

Time is what the observer has had of it: whoever looks late has not seen a silence, since answers
may have waited as long for the same processor as the observer did.
"""

from dataclasses import dataclass
from math import inf

# A long step computes; so does a lock that is waited for in a loop, which is found all the same.
_WORKING = 3.0
_STALLED = 6.0
# Of one processor: below this, processes only wait for each other.
_WORKING_SHARE = 0.25
# One that loads has no core to ask; it lives if it does anything.
_LOADING_SHARE = 0.05
# What is learned from silences, which a busy machine makes longer, must not make it blind.
_MOST_LEARNED_S = 15.0
# One that loads may wait for a disk or for a hub.
_LOADING_S = 60.0
# The longest silence counts half after so many seconds.
_HALF_LIFE_S = 600.0
# A look that comes later than so many intervals counts as so many.
_LATE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the processes of an engine do. ``work_s`` and ``moved`` only grow.

    ``stopped``: how many are (SIGSTOP, a debugger). ``blocked``: one waits for a disk or a device.
    ``work_s``: seconds in which their threads computed, or could have if the machine had let them.
    ``moved``: bytes read, written and logged.
    """

    stopped: int = 0
    blocked: bool = False
    work_s: float = 0.0
    moved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSample:
    """One look at an engine. ``answered``: its core has, since the last look.

    ``counts``: what changes only when it computes; ``None`` if it could not be asked. ``running``:
    requests in its batch. ``owes``: an answer of its core, or an advance of its requests, is due.
    """

    now_s: float
    answered: bool = False
    owes: bool = True
    running: int = 0
    counts: tuple[float, ...] | None = None
    activity: Activity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressLimits:
    """How long, in seconds, an engine may be silent while its processes are stopped, idle, working.

    ``stalled_s``: how long running requests may stand though its core answers.
    """

    stopped_s: float
    idle_s: float
    working_s: float
    stalled_s: float


def serving_limits(after_s: float, steps: float, longest_step_s: float) -> ProgressLimits:
    """Of an engine that serves."""
    idle_s = max(after_s, steps * longest_step_s)
    return ProgressLimits(
        stopped_s=after_s,
        idle_s=idle_s,
        working_s=_WORKING * idle_s,
        stalled_s=_STALLED * idle_s,
    )


def waiting_limits(after_s: float, steps: float, longest_step_s: float) -> ProgressLimits:
    """Of one on standby, which is held up by the weights that it takes up.

    However long it computes, the switch that it waits for has limits of its own.
    """
    idle_s = max(after_s, steps * longest_step_s)
    return ProgressLimits(stopped_s=after_s, idle_s=idle_s, working_s=inf, stalled_s=inf)


def loading_limits(after_s: float) -> ProgressLimits:
    """Of one that loads: there is a limit for the whole start, too."""
    idle_s = max(after_s, _LOADING_S)
    return ProgressLimits(stopped_s=after_s, idle_s=idle_s, working_s=inf, stalled_s=inf)


class Progress:
    """Follows one engine; ``interval_s`` is between looks, ``step_s`` what a whole chunk took."""

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
        """What a step is known to take."""
        return max(self._step_s, min(self._learned_s, _MOST_LEARNED_S))

    def limits(self, *, loading: bool = False, standby: bool = False) -> ProgressLimits:
        """What holds for it now."""
        if loading:
            return loading_limits(self._after_s)
        limits_of = waiting_limits if standby else serving_limits
        return limits_of(self._after_s, self._steps, self.longest_step_s)

    def observe(self, look: ProgressSample, *, loading: bool = False, standby: bool = False) -> str:
        """Take in a look; why the engine is taken to hang, or nothing while it is not.

        ``nearest`` is the largest part of a limit that was reached so far.
        """
        passed_s = self._passed_s(look.now_s)
        moved = look.counts is not None and look.counts != self._counts
        if look.counts is not None:
            self._counts = look.counts
        self._stalled_s = 0.0 if moved or look.running == 0 else self._stalled_s + passed_s
        limits = self.limits(loading=loading, standby=standby)
        worked = self._worked(look.activity, passed_s)
        alive = look.answered or moved or not look.owes
        if loading:
            # Those that wait for a stopped one look for it now and then, and may tell of it.
            alive = (moved or worked) and not (look.activity is not None and look.activity.stopped)
        if alive:
            self._speaks(serves=not (loading or standby))
        else:
            self.silent_s += passed_s
            self._follow(look.activity, passed_s)
        self._learned_s *= 0.5 ** (passed_s / _HALF_LIFE_S)
        return self._verdict(look, limits)

    def _passed_s(self, now_s: float) -> float:
        """Since the last look, as far as it counts."""
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            return 0.0
        return min(max(0.0, now_s - last_s), _LATE * self._interval_s)

    def _worked(self, activity: Activity | None, passed_s: float) -> bool:
        """Whether any of its processes has computed since the last look."""
        before_s, self._work_s = self._work_s, activity.work_s if activity is not None else None
        if before_s is None or self._work_s is None:
            return False
        return self._work_s - before_s > _LOADING_SHARE * passed_s

    def _speaks(self, *, serves: bool) -> None:
        """The end of a silence, which was a step if it ``serves`` and nobody had stopped it."""
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
        """Whether a silence may be a long step; also where it cannot be told."""
        if activity is None or self._first is None or activity.blocked:
            return True
        since_s, before_s = self._first
        worked_s = activity.work_s - before_s
        return worked_s >= _WORKING_SHARE * max(self._interval_s, self.silent_s - since_s)

    def _verdict(self, look: ProgressSample, limits: ProgressLimits) -> str:
        silent_s = self.silent_s
        works = silent_s > 0.0 and self._works(look.activity)
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
            return f"hangs: {look.running} running requests stand for {self._stalled_s:.0f} s"
        return ""
