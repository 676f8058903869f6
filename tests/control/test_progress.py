"""When an engine is taken to hang: any course of signs, stops and work, seen by any observer."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.progress import Activity, ProgressSample, ProgressTracker

AFTER_S = 10.0
STEPS = 4.0


def fresh(step_s: float = 0.0) -> ProgressTracker:
    return ProgressTracker(after_s=AFTER_S, steps=STEPS, interval_s=1.0, step_s=step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """For ``seconds`` nothing is heard; then the engine speaks, if it has not been ended."""

    seconds: int
    stopped: bool = False
    share: float = 0.0
    seen: bool = True


def played(progress: ProgressTracker, stretches: Iterable[Stretch]) -> tuple[str, float]:
    """The first reason to end it, and how long it had been silent by then."""
    now_s = work_s = 0.0
    progress.observe(ProgressSample(now_s=now_s, answered=True))
    for stretch in stretches:
        for second in range(stretch.seconds):
            now_s += 1.0
            work_s += stretch.share
            activity = Activity(stopped=int(stretch.stopped), work_s=work_s)
            look = ProgressSample(now_s=now_s, activity=activity if stretch.seen else None)
            if reason := progress.observe(look):
                return reason, second + 1.0
        now_s += 1.0
        progress.observe(ProgressSample(now_s=now_s, answered=True))
    return "", 0.0


SHORT = st.builds(
    Stretch,
    seconds=st.integers(0, int(AFTER_S) - 1),
    stopped=st.booleans(),
    share=st.floats(0.0, 8.0),
    seen=st.booleans(),
)


@given(st.lists(SHORT, max_size=40), st.floats(0.0, 20.0))
def test_nothing_shorter_than_the_least_limit_is_a_hang(
    stretches: list[Stretch], step_s: float
) -> None:
    assert played(fresh(step_s), stretches) == ("", 0.0)


@given(st.lists(SHORT, max_size=20), st.floats(0.0, 20.0), st.floats(0.0, 0.2))
def test_what_is_stopped_is_found_whatever_was_before(
    before: list[Stretch], step_s: float, share: float
) -> None:
    stop = Stretch(seconds=1000, stopped=True, share=share)
    reason, silent_s = played(fresh(step_s), [*before, stop])
    assert "stopped" in reason
    assert silent_s == AFTER_S


@given(
    before=st.lists(SHORT, max_size=20),
    step_s=st.floats(0.0, 20.0),
    share=st.floats(0.0, 8.0),
    seen=st.booleans(),
)
def test_any_hang_is_found_in_the_end(
    before: list[Stretch], step_s: float, share: float, *, seen: bool
) -> None:
    """Whatever was learned before, and whatever its processes do."""
    limit_s = 3 * STEPS * max(step_s, 15.0)
    reason, silent_s = played(
        fresh(step_s), [*before, Stretch(seconds=1000, share=share, seen=seen)]
    )
    assert reason
    assert AFTER_S <= silent_s <= limit_s + 1


@given(st.floats(0.1, 60.0), st.floats(0.0, 1.0))
def test_a_step_as_long_as_a_known_one_is_no_hang(step_s: float, share: float) -> None:
    steps = [Stretch(seconds=int(step_s), share=share)] * 20
    assert played(fresh(step_s), steps) == ("", 0.0)


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=30))
def test_steps_that_grow_are_learned(factors: list[float]) -> None:
    """Each up to twice as long as the last: prompts get longer, machines busier."""
    seconds, steps = 4.0, []
    for factor in factors:
        seconds = min(28.0, max(1.0, seconds * factor))
        steps.append(Stretch(seconds=int(seconds), share=1.0))
    assert played(fresh(), steps) == ("", 0.0)


@given(st.lists(st.floats(1.5, 600.0), min_size=1, max_size=6))
def test_an_observer_that_was_away_has_not_seen_a_silence(gaps: list[float]) -> None:
    progress = fresh()
    now_s = 0.0
    progress.observe(ProgressSample(now_s=now_s, answered=True))
    for gap_s in gaps:
        now_s += gap_s
        assert progress.observe(ProgressSample(now_s=now_s, activity=Activity(stopped=1))) == ""


def test_a_step_that_computes_has_longer_than_one_that_does_not() -> None:
    assert played(fresh(), [Stretch(seconds=1000)])[1] == AFTER_S
    for work in (Stretch(seconds=1000, share=0.5), Stretch(seconds=1000, seen=False)):
        reason, silent_s = played(fresh(), [work])
        assert silent_s == 3 * AFTER_S
        assert "sign of life" in reason


def test_blocked_is_not_idle() -> None:
    progress = fresh()
    for second in range(30):
        look = ProgressSample(now_s=float(second), activity=Activity(blocked=True))
        assert progress.observe(look) == ""
    assert progress.observe(ProgressSample(now_s=30.0, activity=Activity(blocked=True)))


def test_counts_that_change_are_signs_though_no_answer_comes() -> None:
    progress = fresh()
    for second in range(100):
        look = ProgressSample(now_s=float(second), running=1, counts=(float(second),))
        assert progress.observe(look) == ""
    assert progress.nearest == 0.0


@pytest.mark.parametrize(("running", "hangs"), [(0, False), (3, True)])
def test_a_core_that_answers_must_advance_what_runs(running: int, *, hangs: bool) -> None:
    progress = fresh()
    reasons = [
        progress.observe(
            ProgressSample(now_s=float(second), answered=True, running=running, counts=(1.0,))
        )
        for second in range(100)
    ]
    assert any(reasons) is hangs
    assert all("3 running requests" in reason for reason in reasons if reason)


def test_nothing_due_is_no_silence() -> None:
    progress = fresh()
    for second in range(100):
        assert (
            progress.observe(ProgressSample(now_s=float(second), owes=False, counts=(1.0,))) == ""
        )


@given(st.lists(st.floats(0.0, 4.0), min_size=15, max_size=15), st.integers(0, 1000))
def test_a_start_stands_if_one_of_its_processes_does(shares: list[float], moved: int) -> None:
    """Whatever those that wait for it do meanwhile."""
    progress = fresh()
    work_s, reasons = 0.0, []
    for second, share in enumerate(shares):
        work_s += share
        activity = Activity(stopped=1, work_s=work_s, moved=moved * second)
        look = ProgressSample(
            now_s=float(second), counts=(float(activity.moved),), activity=activity
        )
        reasons.append(progress.observe(look, loading=True))
    assert [bool(reason) for reason in reasons] == [second >= AFTER_S for second in range(15)]


@given(st.lists(st.booleans(), min_size=300, max_size=300))
def test_a_start_that_does_something_each_minute_goes_on(works: list[bool]) -> None:
    progress = fresh()
    work_s = 0.0
    for second, work in enumerate(works):
        work_s += 0.1 * (work or second % 59 == 0)
        look = ProgressSample(now_s=float(second), counts=(0.0,), activity=Activity(work_s=work_s))
        assert progress.observe(look, loading=True) == ""


def test_one_on_standby_may_compute_for_as_long_as_it_takes() -> None:
    progress = fresh()
    for second in range(1000):
        look = ProgressSample(now_s=float(second), activity=Activity(work_s=0.5 * second))
        assert progress.observe(look, standby=True) == ""
    # What the weights took is not a step.
    progress.observe(ProgressSample(now_s=1000.0, answered=True), standby=True)
    assert progress.longest_step_s == 0.0


def test_a_learned_step_fades() -> None:
    progress = fresh()
    played(progress, [Stretch(seconds=9, share=1.0)])
    assert progress.longest_step_s == pytest.approx(10.0, rel=0.01)
    for second in range(1, 6001):
        progress.observe(ProgressSample(now_s=20.0 + second, answered=True))
    assert progress.longest_step_s < 0.1
