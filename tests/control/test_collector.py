"""Counting: nothing is lost or counted twice, types are corrected, gaps are told."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.collector import Collector
from oserve.control.tally import Batch, Tally

NAMES = ("short", "long")


def ticked(collector: Collector, first: int, last: int) -> Collector:
    for second in range(first, last + 1):
        collector.tick(second + 0.5)
    return collector


requests = st.lists(
    st.tuples(st.integers(0, 59), st.floats(0, 1), st.integers(0, 1), st.integers(0, 30)),
    max_size=60,
)


@given(requests, st.sets(st.integers(0, 200)), st.sets(st.integers(0, 200)))
def test_counts_end_at_the_truth_whatever_is_lost_or_repeated_on_the_way(
    given_requests: list[tuple[int, float, int, int]], lost: set[int], unanswered: set[int]
) -> None:
    tally, collector = Tally(NAMES), ticked(Collector(NAMES, size_s=100), 0, 99)
    seen = 0
    exchanges = 0

    def exchange() -> None:
        """A report that may be lost, or taken while its answer is lost."""
        nonlocal seen, exchanges
        exchanges += 1
        batch = msgspec.json.decode(msgspec.json.encode(tally.take()), type=Batch)
        if exchanges in lost:
            return
        if batch.number > seen:
            collector.add(batch)
            seen = batch.number
        if exchanges not in unanswered:
            tally.acknowledge(batch.number)

    for second, chance, kind, later in sorted(given_requests):
        probabilities = (chance, 1 - chance)
        tally.arrived(second + 0.2, probabilities)
        exchange()
        tally.ended(
            second + later,
            arrival_s=second + 0.2,
            probabilities=probabilities,
            kind=kind,
            prompt_tokens=10,
            output_tokens=5,
        )
        exchange()
    for index in range(500):
        if index > 250:
            lost = unanswered = set()
        exchange()
    truth = np.zeros((60, 2))
    for second, _, kind, _ in given_requests:
        truth[second, kind] += 1
    window = collector.window(60, 60, parts=60)
    assert np.allclose(window.parts, truth, atol=1e-6)
    assert np.allclose(window.counts, truth.sum(axis=0), atol=1e-6)
    if given_requests:
        assert sum(collector.tokens_per_s(100, 100)) * 100 == pytest.approx(
            15 * len(given_requests)
        )


def test_a_gap_is_marked_and_a_small_one_filled() -> None:
    collector = ticked(ticked(Collector(["a"], size_s=300), 0, 59), 100, 219)
    for second in [*range(60), *range(100, 220)]:
        collector.add(Batch(names=("a",), arrivals={second: [2.0]}))
    assert collector.window(60, 60).counts.tolist() == [120]
    assert np.isnan(collector.window(110, 60).counts).all()
    assert collector.window(150, 60).counts.tolist() == [pytest.approx(120.0)]
    parts = collector.window(120, 60, parts=3).parts[:, 0]
    assert np.isnan(parts[:2]).all()
    assert parts[2] == 40


def test_what_is_older_than_the_ring_is_only_counted() -> None:
    collector = ticked(Collector(["a"], size_s=10), 0, 30)
    collector.add(Batch(names=("a",), arrivals={5: [1.0], 25: [1.0]}))
    assert collector.too_late == 1
    assert collector.window(31, 10).counts.tolist() == [1]


def test_the_state_survives_a_restart_and_the_time_between_is_a_gap() -> None:
    collector = ticked(Collector(NAMES, size_s=120), 0, 60)
    collector.add(Batch(names=NAMES, arrivals={30: [1.0, 3.0]}, tokens={31: [1, 10, 20]}))
    state = json.loads(json.dumps(collector.state()))
    again = Collector(("long", "short"), size_s=120)
    again.restore(state)
    ticked(again, 110, 115)
    assert again.window(60, 60).counts.tolist() == [3, 1]
    assert again.tokens_per_s(60, 60) == (10 / 60, 20 / 60)
    assert np.isnan(again.window(110, 40).counts).all()


def test_unknown_types_are_left_out_and_names_decide() -> None:
    collector = ticked(Collector(NAMES, size_s=60), 0, 9)
    collector.add(Batch(names=("long", "new", "short"), arrivals={3: [1.0, 5.0, 2.0]}))
    assert collector.window(10, 10).counts.tolist() == [2, 1]
    tally = Tally(NAMES)
    tally.arrived(1.0, (1.0, 0.0))
    tally.follow(("new",))
    assert tally.take().arrivals == {}
