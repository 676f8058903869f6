"""Mixes: the spread holds at every moment, sampled shares follow, a seed gives one trace."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import CHANGE_PERIODS_S, MIX_CVS, MIX_TYPES, TraceRequest, synthesise_mix
from oserve.traces.mixes import max_mix_cv, mix_shares, mix_spread

periods = st.none() | st.floats(1e-2, 1e6)


@given(st.integers(3, 12), st.floats(0, 1), periods, st.floats(0, 1e6))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_the_spread_is_the_one_asked_for_at_any_time(
    types: int, part: float, period: float | None, at_s: float
) -> None:
    cv = part * max_mix_cv(types, changing=period is not None)
    shares = mix_shares(at_s, types=types, mix_cv=cv, change_period_s=period)
    assert len(shares) == types
    assert min(shares) >= 0
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert mix_spread(shares) == pytest.approx(cv, abs=1e-9)


@given(st.integers(3, 8), st.floats(0.01, 1), st.floats(1, 1e4), st.integers(0, 30))
@settings(derandomize=True, deadline=None)
def test_dominance_goes_round_once_a_period_each(
    types: int, part: float, period: float, change: int
) -> None:
    cv = part * max_mix_cv(types, changing=True)

    def at(when: float) -> tuple[float, ...]:
        return mix_shares(when * period, types=types, mix_cv=cv, change_period_s=period)

    corner = at(change + 1e-9)
    assert corner.index(max(corner)) == change % types
    halfway = at(change + 0.5)
    first, second = halfway[change % types], halfway[(change + 1) % types]
    assert first == pytest.approx(second, abs=1e-9)
    assert first == max(halfway) or second == max(halfway)
    # Smooth: a hundredth of a change moves no share by more than the speed limit of the path.
    for before, after in itertools.pairwise(at(change + step / 100) for step in range(101)):
        moves = [abs(a - b) for a, b in zip(before, after, strict=True)]
        assert max(moves) <= cv / math.sqrt(types) * math.pi**2 / 2 / 100 + 1e-9


def test_presets_are_the_published_ends() -> None:
    assert list(MIX_CVS) == ["S1", "S2", "S3", "S4", "S5"]
    assert (MIX_CVS["S1"], MIX_CVS["S5"]) == (0.112, 0.688)
    steps = [b - a for a, b in itertools.pairwise(MIX_CVS.values())]
    assert steps == pytest.approx([0.144] * 4)
    assert sorted(CHANGE_PERIODS_S.values(), reverse=True) == list(CHANGE_PERIODS_S.values())
    for cv in MIX_CVS.values():
        assert cv <= max_mix_cv(len(MIX_TYPES), changing=True)


def make(seed: int, *, cv: float = 0.688, period: float | None = None) -> list[TraceRequest]:
    return list(
        synthesise_mix(rate_rps=50, duration_s=400, seed=seed, mix_cv=cv, change_period_s=period)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MIX_CVS)
def test_sampled_shares_and_rate(name: str) -> None:
    cv = MIX_CVS[name]
    trace = make(1, cv=cv)
    # Five standard deviations of a Poisson count of mean 20,000.
    assert abs(len(trace) - 20_000) < 5 * math.sqrt(20_000)
    counts = Counter(item.model for item in trace)
    shares = mix_shares(0, types=4, mix_cv=cv, change_period_s=None)
    for kind, share in zip(MIX_TYPES, shares, strict=True):
        bound = 5 * math.sqrt(share * (1 - share) / len(trace))
        assert abs(counts[kind] / len(trace) - share) < bound
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(trace))
    assert trace[-1].arrival_s < 400


def test_each_type_has_its_turn() -> None:
    trace = make(2, period=100)
    for turn, kind in enumerate(MIX_TYPES):
        # A turn is the quarter period either side of a corner; the first corner is at the start.
        near = [item.model for item in trace if abs(item.arrival_s - 100 * turn) < 25]
        counts = Counter(near)
        assert counts.most_common(1)[0][0] == kind
    whole = Counter(item.model for item in trace)
    assert max(whole.values()) / min(whole.values()) < 1.1


def test_a_seed_is_a_trace() -> None:
    def start(seed: int) -> list[TraceRequest]:
        made = synthesise_mix(
            rate_rps=50, duration_s=400, seed=seed, mix_cv=0.4, change_period_s=60
        )
        return list(itertools.islice(made, 500))

    assert start(1) == start(1)
    assert start(1) != start(2)


def test_lengths_follow_their_types() -> None:
    trace = make(3, cv=0.0)
    for kind, lengths in MIX_TYPES.items():
        of_kind = [item for item in trace if item.model == kind]
        log_prompt = math.fsum(math.log(item.prompt_tokens) for item in of_kind) / len(of_kind)
        log_output = math.fsum(math.log(item.output_tokens) for item in of_kind) / len(of_kind)
        assert math.exp(log_prompt) == pytest.approx(lengths.prompt_median, rel=0.05)
        assert math.exp(log_output) == pytest.approx(lengths.output_median, rel=0.05)


@pytest.mark.parametrize(
    ("wanted", "place"),
    [
        ({"rate_rps": 0.0}, "rate_rps"),
        ({"rate_rps": math.nan}, "rate_rps"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"duration_s": math.inf}, "duration_s"),
        ({"mix_cv": -0.1}, "mix_cv"),
        ({"mix_cv": math.nan}, "mix_cv"),
        ({"mix_cv": 1.8}, "mix_cv"),
        ({"mix_cv": 1.1, "change_period_s": 60.0}, "mix_cv"),
        ({"change_period_s": 0.0}, "change_period_s"),
        ({"types": {}}, "types"),
        ({"types": dict(itertools.islice(MIX_TYPES.items(), 2)), "change_period_s": 9.0}, "types"),
    ],
)
def test_wishes_that_make_no_sense(wanted: dict[str, object], place: str) -> None:
    usual: dict[str, object] = {"rate_rps": 1.0, "duration_s": 1.0, "seed": 0, "mix_cv": 0.1}
    with pytest.raises(OServeError) as caught:
        synthesise_mix(**{**usual, **wanted})  # type: ignore[arg-type]
    assert caught.value.place == place


def test_few_types_may_stay_as_they_are() -> None:
    assert mix_shares(9, types=1, mix_cv=0, change_period_s=None) == (1.0,)
    assert mix_shares(9, types=2, mix_cv=1, change_period_s=None) == pytest.approx((1.0, 0.0))
