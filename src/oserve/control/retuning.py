"""When a server tunes its constants, and whether it keeps what it changed: pure decisions.

A change is on trial. Its attainment is compared with that before the change, at numbers of requests
that double each time, so that looking often does not make noise look like a fall. If attainment
fell by more than noise explains, the change is taken back, and the same constants are barred for a
while. A trial ends once enough requests have been served without a fall.
"""

import math
from enum import StrEnum

import msgspec

from oserve.control.dispatch.constants import DispatchConstants

# A fall must exceed so many standard deviations of the difference, and this share of requests.
_DEVIATIONS = 3.0
_LEAST_FALL = 0.01
_FIRST_LOOK = 200
# Bars are few: each lasts a day, and a trial takes long.
_MOST_BARRED = 64


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of some time, and how many of them met the SLO."""

    requests: int
    met: int

    @property
    def share(self) -> float:
        """The SLO attainment; 1 without requests."""
        return self.met / self.requests if self.requests else 1.0


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A change in force since ``began_s``. ``earlier``: the constants that it replaced.

    ``look_at``: the number of requests at which it is judged next.
    """

    earlier: DispatchConstants
    began_s: float
    before: Attainment
    look_at: int = _FIRST_LOOK


class Barred(msgspec.Struct, frozen=True, kw_only=True):
    """Constants that are not tried again before ``until_s``."""

    constants: DispatchConstants
    until_s: float


class RetuningPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. ``interval_s``: the least time between searches.

    ``new_records``: requests since the last search without which there is no other. A trial ends
    after ``trial_requests``. ``barred_s``: how long what was taken back is not tried again.
    """

    interval_s: float = 3600.0
    new_records: int = 1000
    trial_requests: int = 3200
    barred_s: float = 86_400.0


class RetuningState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a server remembers of its tuning; times are Unix seconds.

    ``given``: the constants of the settings. ``present``: those in force. ``line``: the last event
    in words, at ``line_s``.
    """

    given: DispatchConstants
    present: DispatchConstants
    trial: Trial | None = None
    barred: tuple[Barred, ...] = ()
    searched_s: float = 0.0
    line: str = ""
    line_s: float = 0.0


class TrialVerdict(StrEnum):
    """What follows from a look at a trial."""

    GO_ON = "go on"
    KEEP = "keep"
    TAKE_BACK = "take back"


def fell(before: Attainment, after: Attainment) -> bool:
    """Whether attainment fell by more than noise explains."""
    both = before.requests + after.requests
    if not before.requests or not after.requests:
        return False
    share = (before.met + after.met) / both
    spread = math.sqrt(share * (1.0 - share) * (1.0 / before.requests + 1.0 / after.requests))
    return before.share - after.share > max(_LEAST_FALL, _DEVIATIONS * spread)


def judged(trial: Trial, after: Attainment, policy: RetuningPolicy) -> TrialVerdict:
    """The verdict on a trial, given what was served since it began."""
    if after.requests < min(trial.look_at, policy.trial_requests):
        return TrialVerdict.GO_ON
    if fell(trial.before, after):
        return TrialVerdict.TAKE_BACK
    return TrialVerdict.KEEP if after.requests >= policy.trial_requests else TrialVerdict.GO_ON


def looked(
    state: RetuningState, after: Attainment, policy: RetuningPolicy, *, now_s: float
) -> RetuningState:
    """The state after a look at its trial; the same without one, or if it is too early."""
    trial = state.trial
    if trial is None:
        return state
    match judged(trial, after, policy):
        case TrialVerdict.TAKE_BACK:
            bar = Barred(constants=state.present, until_s=now_s + policy.barred_s)
            line = (
                f"taken back: attainment fell from {trial.before.share:.1%} to {after.share:.1%} "
                f"over {after.requests} requests"
            )
            return msgspec.structs.replace(
                state,
                present=trial.earlier,
                trial=None,
                barred=(*state.barred, bar)[-_MOST_BARRED:],
                line=line,
                line_s=now_s,
            )
        case TrialVerdict.KEEP:
            line = f"kept: attainment {after.share:.1%} over {after.requests} requests, "
            line += f"{trial.before.share:.1%} before"
            return msgspec.structs.replace(state, trial=None, line=line, line_s=now_s)
        case TrialVerdict.GO_ON:
            if after.requests < trial.look_at:
                return state
            later = msgspec.structs.replace(trial, look_at=2 * trial.look_at)
            return msgspec.structs.replace(state, trial=later)


def changed(
    state: RetuningState, constants: DispatchConstants, before: Attainment, *, now_s: float
) -> RetuningState:
    """The state with other constants in force, on trial."""
    trial = Trial(earlier=state.present, began_s=now_s, before=before)
    return msgspec.structs.replace(state, present=constants, trial=trial)


def due(state: RetuningState, policy: RetuningPolicy, *, new_records: int, now_s: float) -> bool:
    """Whether to search now: enough time and requests since the last search, and no trial."""
    return (
        state.trial is None
        and now_s - state.searched_s >= policy.interval_s
        and new_records >= policy.new_records
    )


def is_barred(state: RetuningState, constants: DispatchConstants, *, now_s: float) -> bool:
    """Whether these were taken back not long ago."""
    return any(item.constants == constants and now_s < item.until_s for item in state.barred)


def resumed(saved: RetuningState | None, given: DispatchConstants) -> RetuningState:
    """The saved state; a new one if the settings give other constants than then."""
    if saved is None or saved.given != given:
        return RetuningState(given=given, present=given)
    return saved
