"""The search for better constants of dispatch, by time split.

Coordinate search on the first part of a trace: one constant after the other takes the value with
the largest sure gain (the mean over windows less a standard error), until a round gains nothing. A
change that no longer pays once the others are found is undone. The part held out then decides: a
constant that costs there goes back to what it was, and the rest is promoted only for a stated gain.
The search knows no simulator; it gets the score of constants as a function.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from oserve.control.dispatch.constants import DispatchConstants
from oserve.evaluate.part_score import Gain, PartScore, gain_of

Score = Callable[[DispatchConstants], PartScore]

LEAST_STEP = 0.002
"""A single change must surely gain this much on the first part; less is noise of one trace."""

MOST_CANDIDATES = 160
"""Constants that one search scores on the first part."""

_ROUNDS = 3


class Constant(StrEnum):
    """The constants that are searched, by the settings that name them."""

    PENALTY = "gateway.order.penalty_s_per_1000_tokens"
    MAX_PENALTY = "gateway.order.max_penalty_s"
    FRESHEST_FIRST = "gateway.order.freshest_first_s"
    DEMOTE = "gateway.overload.demote"
    OWED = "gateway.overload.owed_of_ttft"
    LATE = "gateway.overload.late_of_ttft"
    OVERFLOW = "gateway.overflow_s"
    INFLIGHT = "gateway.inflight_per_device"


VALUES: dict[Constant, tuple[Any, ...]] = {
    Constant.DEMOTE: (True, False),
    Constant.OWED: (0.0625, 0.125, 0.25, 0.5, 1.0),
    Constant.LATE: (0.5, 0.625, 0.75, 0.875),
    Constant.PENALTY: (0.0, 1.3, 3.3, 6.7, 13.0, 20.0),
    Constant.MAX_PENALTY: (5.0, 15.0, 60.0),
    Constant.FRESHEST_FIRST: (0.0, 60.0, 300.0),
    Constant.INFLIGHT: (None, 4.0, 8.0, 16.0, 24.0, 32.0),
    Constant.OVERFLOW: (0.5, 2.0, 8.0),
}
"""The values that are tried of each constant, in the order of the search."""

_ORDER = (Constant.PENALTY, Constant.MAX_PENALTY, Constant.FRESHEST_FIRST)
_TTFT = (Constant.DEMOTE, Constant.OWED, Constant.LATE)


_READ: dict[Constant, Callable[[DispatchConstants], Any]] = {
    Constant.PENALTY: lambda item: round(item.order.penalty_s_per_token * 1000.0, 9),
    Constant.MAX_PENALTY: lambda item: item.order.max_penalty_s,
    Constant.FRESHEST_FIRST: lambda item: item.order.freshest_first_s,
    Constant.DEMOTE: lambda item: item.overload.ttft_s is not None,
    Constant.OWED: lambda item: item.overload.owed_of_ttft,
    Constant.LATE: lambda item: item.overload.late_of_ttft,
    Constant.OVERFLOW: lambda item: item.overflow_s,
    Constant.INFLIGHT: lambda item: item.inflight_per_device,
}


def value_of(constants: DispatchConstants, name: Constant) -> Any:
    """The value of one constant, in the unit of its setting."""
    return _READ[name](constants)


def with_value(
    constants: DispatchConstants, name: Constant, value: Any, *, ttft_s: float | None
) -> DispatchConstants:
    """The constants with another value of one; ``ttft_s``: the time to first token to demote by."""
    order, overload = constants.order, constants.overload
    match name:
        case Constant.PENALTY:
            order = replace(order, penalty_s_per_token=value / 1000.0)
        case Constant.MAX_PENALTY:
            order = replace(order, max_penalty_s=value)
        case Constant.FRESHEST_FIRST:
            order = replace(order, freshest_first_s=value)
        case Constant.DEMOTE:
            overload = replace(overload, ttft_s=ttft_s if value else None)
        case Constant.OWED:
            overload = replace(overload, owed_of_ttft=value)
        case Constant.LATE:
            overload = replace(overload, late_of_ttft=value)
        case Constant.OVERFLOW:
            return replace(constants, overflow_s=value)
        case Constant.INFLIGHT:
            return replace(constants, inflight_per_device=value)
    return replace(constants, order=order, overload=overload)


def effective(constants: DispatchConstants) -> DispatchConstants:
    """Equal for constants that serve alike: what has no effect takes its default."""
    order, overload = constants.order, constants.overload
    if order.penalty_s_per_token == 0.0:
        order = replace(order, max_penalty_s=0.0)
    if overload.ttft_s is None:
        overload = replace(overload, owed_of_ttft=0.0, late_of_ttft=0.0)
    return replace(constants, order=order, overload=overload)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Which constants may change. ``ttft_s``: the SLO's, without which nothing is demoted.

    ``ordered``: engines take priorities. ``pooled``: the plan has soft pools to overflow from.
    """

    ttft_s: float | None
    ordered: bool
    pooled: bool

    def names(self) -> tuple[Constant, ...]:
        """The constants that have an effect, in the order of the search."""
        closed = set() if self.ordered else set(_ORDER)
        if self.ttft_s is None:
            closed |= set(_TTFT)
        if not self.pooled:
            closed.add(Constant.OVERFLOW)
        return tuple(name for name in VALUES if name not in closed)

    def changed(
        self, constants: DispatchConstants, name: Constant, value: Any
    ) -> DispatchConstants:
        """The constants with another value of one."""
        return with_value(constants, name, value, ttft_s=self.ttft_s)


class CachedScore:
    """A score that is computed once for constants that serve alike."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._known: dict[DispatchConstants, PartScore] = {}

    @property
    def candidates(self) -> int:
        """The number of constants that were scored."""
        return len(self._known)

    def knows(self, constants: DispatchConstants) -> bool:
        """Whether these were scored."""
        return effective(constants) in self._known

    def __call__(self, constants: DispatchConstants) -> PartScore:
        """The score of these constants."""
        key = effective(constants)
        if key not in self._known:
            self._known[key] = self._score(constants)
        return self._known[key]


def search(
    present: DispatchConstants,
    space: SearchSpace,
    score: CachedScore,
    *,
    most_candidates: int = MOST_CANDIDATES,
) -> DispatchConstants:
    """The best constants found on a part; ``present`` if nothing surely gains."""
    best = present
    for start in _starts(present, space):
        if gain_of(score(best), score(start)).sure > LEAST_STEP:
            best = start
    for _ in range(_ROUNDS):
        before = best
        for name in space.names():
            best = _along(best, space, name, score, most_candidates)
        if best == before:
            break
    return _pruned(present, best, space, score)


def _starts(present: DispatchConstants, space: SearchSpace) -> Iterator[DispatchConstants]:
    """Where the search may begin, since order and demotion replace each other."""
    for demote in (True, False) if space.ttft_s is not None else ():
        for penalty in VALUES[Constant.PENALTY][::4] if space.ordered else ():
            start = space.changed(present, Constant.DEMOTE, demote)
            yield space.changed(start, Constant.PENALTY, penalty)


def _along(
    best: DispatchConstants,
    space: SearchSpace,
    name: Constant,
    score: CachedScore,
    most_candidates: int,
) -> DispatchConstants:
    """The best value of one constant, where it surely gains."""
    base, found, most = score(best), best, LEAST_STEP
    for value in VALUES[name]:
        candidate = space.changed(best, name, value)
        if score.candidates >= most_candidates and not score.knows(candidate):
            continue
        gain = gain_of(base, score(candidate)).sure
        if gain > most:
            found, most = candidate, gain
    return found


def _pruned(
    present: DispatchConstants, best: DispatchConstants, space: SearchSpace, score: CachedScore
) -> DispatchConstants:
    """Without the changes that no longer gain beside the others."""
    for name in changes(present, best):
        without = space.changed(best, name, value_of(present, name))
        if gain_of(score(without), score(best)).mean < LEAST_STEP:
            best = without
    return best


def changes(before: DispatchConstants, after: DispatchConstants) -> tuple[Constant, ...]:
    """The constants that differ."""
    return tuple(n for n in Constant if value_of(before, n) != value_of(after, n))


class Verdict(StrEnum):
    """What became of a constant: not changed, in force, or refused by the part held out."""

    SAME = "same"
    KEPT = "kept"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantReport:
    """One constant. The gains are what the proposal would lose without it, on either part."""

    name: Constant
    present: Any
    proposed: Any
    verdict: Verdict
    gain: Gain | None = None
    held_out_gain: Gain | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome of a search. ``constants``: what should be in force; the present ones if refused.

    ``gain`` and ``held_out_gain`` are those of the proposal, less what the held-out part refused.
    """

    present: DispatchConstants
    proposed: DispatchConstants
    constants: DispatchConstants
    gain: Gain
    held_out_gain: Gain
    reports: tuple[ConstantReport, ...]
    candidates: int

    @property
    def promoted(self) -> bool:
        """Whether anything should change."""
        return self.constants != self.present


def tune(
    present: DispatchConstants,
    space: SearchSpace,
    score: Score,
    held_out: Score,
    *,
    min_gain: float,
) -> Tuned:
    """Search on the first part; judge on the part held out."""
    first, later = CachedScore(score), CachedScore(held_out)
    proposed = search(present, space, first)
    kept = proposed
    for name in changes(present, proposed):
        without = space.changed(kept, name, value_of(present, name))
        if gain_of(later(without), later(kept)).mean < 0.0:
            kept = without
    gain = gain_of(first(present), first(kept))
    held_out_gain = gain_of(later(present), later(kept))
    promoted = kept != present and held_out_gain.sure > 0.0 and held_out_gain.mean >= min_gain
    final = kept if promoted else present
    return Tuned(
        present=present,
        proposed=proposed,
        constants=final,
        gain=gain,
        held_out_gain=held_out_gain,
        reports=tuple(
            _report(name, present, proposed, final, space, first, later) for name in space.names()
        ),
        candidates=first.candidates,
    )


def _report(
    name: Constant,
    present: DispatchConstants,
    proposed: DispatchConstants,
    final: DispatchConstants,
    space: SearchSpace,
    first: CachedScore,
    later: CachedScore,
) -> ConstantReport:
    before, after = value_of(present, name), value_of(proposed, name)
    if before == after:
        return ConstantReport(name=name, present=before, proposed=after, verdict=Verdict.SAME)
    without = space.changed(proposed, name, before)
    verdict = Verdict.KEPT if value_of(final, name) == after else Verdict.REJECTED
    return ConstantReport(
        name=name,
        present=before,
        proposed=after,
        verdict=verdict,
        gain=gain_of(first(without), first(proposed)),
        held_out_gain=gain_of(later(without), later(proposed)),
    )
