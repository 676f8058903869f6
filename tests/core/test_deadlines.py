"""The timing wheel beside a plain dictionary that is searched."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.core.deadlines import Deadlines

_TICK_S = 0.25
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.floats(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0.0)),
        st.tuples(st.just("wait"), st.just(0), st.floats(0, 5)),
    ),
    max_size=60,
)


@given(_STEPS)
def test_a_key_is_due_once_never_early_and_late_by_at_most_a_tick(
    steps: list[tuple[str, int, float]],
) -> None:
    wheel: Deadlines[int] = Deadlines(_TICK_S)
    expected: dict[int, float] = {}
    now_s = 0.0
    for step, key, seconds in steps:
        if step == "set":
            expected[key] = now_s + seconds
            wheel.set(key, now_s + seconds)
        elif step == "cancel":
            expected.pop(key, None)
            wheel.cancel(key)
        else:
            now_s += seconds
            passed = wheel.due(now_s)
            assert len(set(passed)) == len(passed)
            for item in passed:
                assert expected.pop(item) <= now_s
            # What is left is due later, or within the tick that has not passed.
            assert all(due_s >= now_s - _TICK_S for due_s in expected.values())
        assert len(wheel) == len(expected)
        assert all(item in wheel for item in expected)
        following_s = wheel.next_s
        assert (following_s is None) == (not expected)
        if following_s is not None:
            # To look again at that time is early enough for all of them.
            assert following_s <= min(expected.values()) + _TICK_S


def test_empty_buckets_do_not_pile_up() -> None:
    wheel: Deadlines[int] = Deadlines(1.0)
    for key in range(1000):
        wheel.set(key, float(key + 600))
        wheel.cancel(key)
        wheel.due(float(key))
    assert wheel.next_s is None
    assert not wheel._buckets
