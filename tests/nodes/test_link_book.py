"""Which links are measured when, and what is made of them."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from oserve.nodes.examination import LinkFacts
from oserve.nodes.link_book import MEASURED, LinkBook, LinkPolicy

POLICY = LinkPolicy(partners=4, holds_s=1000.0, retry_s=10.0, fresh_s=100.0)


def measured(book: LinkBook, up: dict[str, float], now_s: float, rate: float = 1e9) -> int:
    """Measure all that is due; how many pairs that were."""
    count = 0
    for pairs in book.due(up, now_s):
        for one, other in pairs:
            count += 1
            book.learn(
                one, LinkFacts(target=other, round_trip_s=1e-3, bytes_per_s=rate), now_s=now_s
            )
    return count


@given(count=st.integers(min_value=0, max_value=24))
def test_each_node_is_measured_with_a_few_others_and_no_node_twice_at_a_time(count: int) -> None:
    up = {f"n{number:02d}": 0.0 for number in range(count)}
    book = LinkBook(policy=POLICY)
    rounds = book.due(up, 0.0)
    for pairs in rounds:
        names = [name for pair in pairs for name in pair]
        assert len(set(names)) == len(names)
    pairs = [(min(pair), max(pair)) for pairs in rounds for pair in pairs]
    assert len(set(pairs)) == len(pairs)
    partners = Counter(name for pair in pairs for name in pair)
    wanted = min(POLICY.partners, count - 1)
    assert all(partners[name] >= wanted for name in up)
    # About as many as were asked for, not all.
    assert len(pairs) <= count * (POLICY.partners + 1)
    measured(book, up, 0.0)
    assert book.due(up, 1.0) == []


def test_a_node_that_comes_is_measured_and_the_others_are_left_alone() -> None:
    book = LinkBook(policy=POLICY)
    up = {"a": 0.0, "b": 0.0, "c": 0.0}
    assert measured(book, up, 0.0) == 3
    fresh = {one for pairs in book.due(up | {"d": 50.0}, 50.0) for one in pairs}
    assert {frozenset(pair) for pair in fresh} == {frozenset(("d", name)) for name in "abc"}


def test_when_links_are_measured_again() -> None:
    book = LinkBook(policy=POLICY)
    up = {"a": 0.0, "b": 0.0}
    measured(book, up, 0.0)
    assert book.due(up, 999.0) == []
    assert book.due(up, 1001.0) != []
    # A clock that was set back by more than that.
    assert book.due(up, -1001.0) != []
    # Back after a short while the network is the same; after a long one it may be another.
    assert book.due({"a": 90.0, "b": 0.0}, 90.0) == []
    assert book.due({"a": 200.0, "b": 0.0}, 200.0) != []
    book.learn("a", LinkFacts(target="b", error="no answer"), 300.0)
    assert book.due(up, 305.0) == []
    assert book.due(up, 311.0) != []


def test_rates_of_pairs_that_were_not_measured_are_those_of_others() -> None:
    book = LinkBook()
    assert (book.network(), dict(book.rates())) == (None, {})
    for one, other, rate in (("a", "b", 4e9), ("a", "c", 2e9), ("d", "b", 1e9)):
        book.learn(one, LinkFacts(target=other, round_trip_s=2e-3, bytes_per_s=rate), 0.0)
    book.learn("c", LinkFacts(target="d", error="no route"), 0.0)
    rates = book.rates()
    assert rates["a", "b"] == rates["b", "a"] == 4e9
    assert rates["d", "b"] == rates["b", "d"] == 1e9
    assert rates["c", "d"] == 1e9
    assert rates["b", "c"] == 2e9
    assert len(rates) == 12
    network = book.network()
    assert network is not None
    assert (network.name, network.bandwidth, network.latency_s) == (MEASURED, 2e9, 1e-3)
    summary = book.summary("d")
    assert (summary["measured"], summary["slowest"], summary["failed"]) == (1, "b", ["c"])
    assert LinkBook(book.links()).links() == book.links()
