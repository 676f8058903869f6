"""Who sends the model's files to whom: each node gets them once, and nobody sends two at a time."""

import math

from hypothesis import given
from hypothesis import strategies as st

from oserve.nodes.relay_tree import FileTransfer, next_transfers, relay_rounds, relay_s

NAMES = [f"n{number:02d}" for number in range(40)]


@given(
    holders=st.integers(min_value=1, max_value=5),
    seekers=st.integers(min_value=0, max_value=30),
    rates=st.dictionaries(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
        st.floats(min_value=1.0, max_value=1e10),
        max_size=60,
    ),
)
def test_the_tree(holders: int, seekers: int, rates: dict[tuple[str, str], float]) -> None:
    having, lacking = NAMES[:holders], NAMES[holders : holders + seekers]
    rounds = relay_rounds(having, lacking, rates)
    received = [one.receiver for transfers in rounds for one in transfers]
    assert sorted(received) == sorted(lacking)
    able = set(having)
    for transfers in rounds:
        senders = [one.sender for one in transfers]
        # Nobody sends twice at a time, or what it has not received yet.
        assert len(set(senders)) == len(senders)
        assert able >= set(senders)
        able |= {one.receiver for one in transfers}
    assert len(rounds) == math.ceil(math.log2((holders + seekers) / holders))


@given(
    holders=st.sets(st.sampled_from(NAMES), max_size=8),
    seekers=st.sets(st.sampled_from(NAMES), max_size=8),
    busy=st.sets(st.sampled_from(NAMES), max_size=8),
    barred=st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=20),
)
def test_what_begins_now(
    holders: set[str], seekers: set[str], busy: set[str], barred: set[tuple[str, str]]
) -> None:
    found = next_transfers(holders, seekers, {}, busy=busy, barred=barred)
    ends = [end for one in found for end in (one.sender, one.receiver)]
    assert len(set(ends)) == len(ends)
    assert not busy & set(ends)
    for one in found:
        assert one.sender in holders
        assert one.receiver in seekers - holders
        if (one.sender, one.receiver) in barred:
            assert all((other, one.receiver) in barred for other in holders)


def test_the_fastest_link_is_used_first() -> None:
    rates = {("a", "c"): 1e9, ("b", "c"): 5e9, ("a", "d"): 2e9, ("b", "d"): 4e9}
    rounds = relay_rounds("ab", "cd", rates)
    assert rounds == [
        [FileTransfer(sender="b", receiver="c"), FileTransfer(sender="a", receiver="d")]
    ]
    assert relay_s(rounds, 10**10, rates) == 5.0
    assert relay_s(rounds, 10**10, {}) is None
    assert relay_rounds("", "ab") == []


def test_a_sender_that_failed_is_the_last_resort() -> None:
    one, other = (FileTransfer(sender=name, receiver="c") for name in "ab")
    assert next_transfers("a", "c", {}, barred=[("a", "c")]) == [one]
    assert next_transfers("ab", "c", {("a", "c"): 9e9}, barred=[("a", "c")]) == [other]
    # The other one is at work: it is worth waiting for.
    assert next_transfers("ab", "c", {}, busy="b", barred=[("a", "c")]) == []
