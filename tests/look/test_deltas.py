"""Deltas: who applies them has the state, and nobody gets more than the budget."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from look.scene import Fleet
from oserve.look.deltas import BYTES_PER_TICK, ORDER, DeltaBudget, event, sections_of
from oserve.look.sections import PageState

Values = dict[str, int]


def sections(values: Values, size: int = 0) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(b"[%d%b]" % (n, b" " * size)) for name, n in values.items()}


def test_all_sections_have_their_place() -> None:
    assert set(ORDER) == {*PageState.__struct_fields__, "point", "recent", "replay"}


def test_only_what_changed_is_sent() -> None:
    budget = DeltaBudget()
    assert set(budget.next(sections({"now": 1, "loads": 1}))) == {"now", "loads"}
    assert set(budget.next(sections({"now": 2, "loads": 1}))) == {"now"}
    assert budget.next(sections({"now": 2, "loads": 1})) == {}


@given(
    st.lists(st.dictionaries(st.sampled_from(ORDER), st.integers(0, 2)), max_size=30),
    st.integers(0, 30),
    st.integers(0, 400),
)
def test_every_viewer_ends_with_the_state(steps: list[Values], joins: int, size: int) -> None:
    budget = DeltaBudget(200)
    state: dict[str, msgspec.Raw] = {}
    first: dict[str, bytes] = {}
    late: dict[str, bytes] | None = None
    for number, values in enumerate(steps):
        state |= sections(values, size)
        if number == joins:
            late = {name: bytes(raw) for name, raw in state.items()}
            budget.shown(state)
        changed = {name: bytes(raw) for name, raw in budget.next(state).items()}
        first |= changed
        if late is not None:
            late |= changed
    for _ in range(3 * len(ORDER) + 3 * size):
        changed = {name: bytes(raw) for name, raw in budget.next(state).items()}
        first |= changed
        late = None if late is None else late | changed
    expected = {name: bytes(raw) for name, raw in state.items()}
    assert first == expected
    if late is not None:
        assert late == expected


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_the_budget_holds_on_average(sizes: list[int]) -> None:
    budget = DeltaBudget(1000)
    sent = 0
    for number, size in enumerate(sizes):
        chosen = budget.next(sections(dict.fromkeys(ORDER, number), size))
        sent += sum(len(bytes(raw)) for raw in chosen.values())
        # The debt of one section at most.
        assert sent <= 1000 * (number + 1) + max(sizes) + 100


def test_the_largest_fleet_fits_into_ten_kilobytes_a_second() -> None:
    """64 GPUs, 18 types in three tiers, a switch under way, everything changing each second."""
    fleet = Fleet(nodes=8, tiers=3, lengths=6)
    fleet.advance(600.0)
    budget = DeltaBudget()
    budget.next(sections_of(fleet.document()))
    fleet.begin_switch()
    sent, waiting = 0, 0
    for second in range(120):
        fleet.advance(10.0 if second % 10 == 9 else 0.0)
        fleet.at_s += 1.0
        if second % 7 == 6 and fleet.switch is not None and fleet.switch["ended_s"] is None:
            fleet.next_phase()
        if second % 30 == 29:
            fleet.decide()
        chosen = budget.next(sections_of(fleet.document()))
        sent += len(event({"sections": chosen, "away_s": 0.0}))
        waiting = 0 if "now" in chosen else waiting + 1
        assert waiting < 3, "a debt must be paid soon"
    assert sent <= 120 * BYTES_PER_TICK
