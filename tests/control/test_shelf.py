"""The shelf of ladders: which one is used, and when another is asked for."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.ladder import Ladder
from oserve.control.shelf import LadderShelf, ShelvedLadder
from oserve.perf.corrected import Speeds, speed_key

from .ladders import everywhere, ladder_of, rung, shape

NONE = Speeds()
SLOW = Speeds(known={speed_key(shape(1)): 0.5})
CHAT, DOCS, EVEN = (0.9, 0.1), (0.1, 0.9), (0.5, 0.5)
MINE = everywhere(2)
REST_S = 120.0


def made(mix: tuple[float, ...], *shapes: int) -> Ladder:
    rungs = [rung(everywhere(each), 1.0, 1.0, kinds=2) for each in shapes or (1, 2)]
    return replace(ladder_of(*rungs, kinds=2), rates=mix)


def shelved(mix: tuple[float, ...], *shapes: int, speeds: Speeds = NONE) -> ShelvedLadder:
    return ShelvedLadder(ladder=made(mix, *shapes), speeds=speeds, present=MINE)


def test_an_empty_shelf_needs_a_ladder_and_waits_for_it() -> None:
    shelf = LadderShelf()
    assert shelf.ladder is None
    assert shelf.take(CHAT, MINE, NONE) is None
    asked = [second for second in range(500) if shelf.needs(CHAT, MINE, NONE, float(second))]
    # It may be built in vain.
    assert asked == [0, 120, 240, 360, 480]


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.sampled_from((CHAT, DOCS, EVEN))), max_size=80))
def test_it_asks_at_most_once_in_a_rest(steps: list[tuple[float, tuple[float, ...]]]) -> None:
    shelf, now_s, asked = LadderShelf(), 0.0, []
    for passed_s, mix in steps:
        now_s += passed_s
        if shelf.needs(mix, MINE, NONE, now_s):
            asked.append(now_s)
            shelf.add(shelved(mix))
    assert all(later - earlier >= REST_S for earlier, later in pairwise(asked))


def test_a_mix_that_returns_finds_its_ladder() -> None:
    shelf = LadderShelf()
    chat, docs = shelved(CHAT), shelved(DOCS)
    for item in (chat, docs):
        shelf.add(item)
    assert shelf.ladder is docs.ladder
    assert shelf.take(CHAT, MINE, NONE) is chat.ladder
    assert not shelf.needs(CHAT, MINE, NONE, 1000.0)
    # Both fit as badly: the one in use stays.
    assert shelf.take(EVEN, MINE, NONE) is chat.ladder
    assert shelf.needs(EVEN, MINE, NONE, 1000.0)


def test_a_ladder_of_other_speeds_or_without_the_deployment_does_not_fit() -> None:
    shelf = LadderShelf()
    shelf.add(shelved(CHAT))
    assert shelf.needs(CHAT, MINE, SLOW, 0.0)
    assert shelf.needs(CHAT, everywhere(4), NONE, 200.0)
    # Until there is a better one, the last one is used.
    assert shelf.take(CHAT, everywhere(4), SLOW) is shelf.ladder
    shelf.add(shelved(CHAT, 1, 2, speeds=SLOW))
    assert not shelf.needs(CHAT, MINE, SLOW, 400.0)
    assert not shelf.needs(CHAT, MINE, NONE, 400.0)


def test_a_ladder_of_other_speeds_is_better_than_one_without_the_deployment() -> None:
    shelf = LadderShelf()
    old, new = shelved(CHAT, 1, 4, speeds=SLOW), shelved(CHAT, 1, 2)
    for item in (old, new):
        shelf.add(item)
    # A switch that began before the new ladder was ready ended in a deployment that it lacks.
    assert shelf.take(CHAT, everywhere(4), NONE) is old.ladder
    assert shelf.needs(CHAT, everywhere(4), NONE, 0.0)
    assert shelf.take(CHAT, everywhere(2), NONE) is new.ladder


def test_it_asks_soon_again_while_no_ladder_has_the_deployment() -> None:
    shelf = LadderShelf()
    shelf.add(shelved(CHAT))
    asked = [second for second in range(50) if shelf.needs(CHAT, everywhere(4), NONE, second)]
    assert asked == [0, 20, 40]


def test_it_asks_soon_again_while_speeds_are_far_from_those_of_the_ladder() -> None:
    for factor, asked in ((0.5, [0, 20, 40]), (0.9, [0])):
        shelf = LadderShelf()
        shelf.add(shelved(CHAT))
        speeds = Speeds(known={speed_key(shape(1)): factor})
        found = [second for second in range(50) if shelf.needs(CHAT, MINE, speeds, second)]
        assert found == asked


def test_a_deployment_that_cannot_be_simulated_is_not_asked_for_again() -> None:
    shelf = LadderShelf()
    odd = ((shape(8), 3),)
    shelf.add(replace(shelved(CHAT), present=odd))
    assert not shelf.needs(CHAT, odd, NONE, 0.0)
    assert shelf.needs(CHAT, ((shape(8), 2),), NONE, 0.0)


LADDERS = [shelved((0.04 * n + 0.1, 0.9 - 0.04 * n)) for n in range(21)]


@given(st.lists(st.integers(0, 20), max_size=40))
def test_it_holds_the_last_eight_that_were_used(used: list[int]) -> None:
    numbers = {item.ladder.rates: number for number, item in enumerate(LADDERS)}
    shelf, recent = LadderShelf(), list[int]()

    def use(number: int) -> None:
        nonlocal recent
        recent = [*(n for n in recent if n != number), number][-8:]

    for number in used:
        mix = LADDERS[number].ladder.rates
        ladder = shelf.take(mix, MINE, NONE)
        if ladder is not None:
            # Meanwhile the nearest serves.
            use(numbers[ladder.rates])
        if ladder is None or ladder.rates != mix:
            assert number not in recent
            shelf.add(LADDERS[number])
        use(number)
    for number in tuple(recent):
        found = shelf.take(LADDERS[number].ladder.rates, MINE, NONE)
        assert found is LADDERS[number].ladder


def test_a_cluster_that_has_grown_needs_a_ladder_at_once() -> None:
    shelf = LadderShelf()
    old = shelved(CHAT, 4)
    shelf.add(old)
    assert not shelf.needs(CHAT, MINE, NONE, 0.0)
    shelf.outdate()
    assert shelf.is_outdated
    assert shelf.needs(CHAT, MINE, NONE, 1.0)
    # Until it is there the old one serves, and one that was under way changes nothing.
    assert shelf.take(CHAT, MINE, NONE) is old.ladder
    shelf.add(shelved(CHAT, 4))
    assert shelf.is_outdated
    assert [second for second in range(2, 60) if shelf.needs(CHAT, MINE, NONE, second)] == [21, 41]
    fresh = replace(shelved(CHAT, 4), cluster=1)
    shelf.add(fresh)
    assert not shelf.needs(CHAT, MINE, NONE, 500.0)
    assert shelf.take(CHAT, MINE, NONE) is fresh.ladder
