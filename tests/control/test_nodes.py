"""States of nodes: properties over any course of silence, deaths, returns and words."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.nodes import NodeBook, NodePolicy
from oserve.core import NodePhase, NodeSighting, NodeState, OServeError

POLICY = NodePolicy(hold_s=6.0, max_hold_s=48.0, forget_s=60.0)
STEP_S = 0.5


@dataclass(frozen=True, slots=True)
class Stretch:
    """For so many seconds the node is heard or silent, or is told dead; a word comes first."""

    seconds: float
    kind: str
    word: str = ""


WORDS = ("", "", "", "cordon", "drain", "uncordon")
STRETCHES = st.lists(
    st.builds(
        Stretch,
        st.sampled_from((0.5, 2.0, 4.0, 6.0, 12.0, 30.0, 70.0)),
        st.sampled_from(("heard", "heard", "silent", "dead", "unseen")),
        st.sampled_from(WORDS),
    ),
    max_size=12,
)


def play(stretches: list[Stretch], book: NodeBook) -> list[tuple[float, NodeState, str]]:
    """Each round's time, state and the operator's word in force."""
    now_s = heard_s = 0.0
    word, found = "", []
    found.append((now_s, book.observe(now_s, [NodeSighting(name="n")])[0], word))
    for stretch in stretches:
        if stretch.word:
            getattr(book, stretch.word)("n")
            word = {"cordon": "cordoned", "drain": "draining", "uncordon": ""}[stretch.word]
        for _ in range(round(stretch.seconds / STEP_S)):
            now_s += STEP_S
            if stretch.kind == "heard":
                heard_s = now_s
            sighting = NodeSighting(
                name="n",
                silent_s=now_s - heard_s,
                dead="it was told dead" if stretch.kind == "dead" else "",
            )
            seen = [] if stretch.kind == "unseen" else [sighting]
            found.append((now_s, book.observe(now_s, seen)[0], word))
    return found


@given(STRETCHES)
@settings(deadline=None, max_examples=50)
def test_no_device_is_usable_before_the_hold_down_has_ended(stretches: list[Stretch]) -> None:
    stretches = [s for s in stretches if s.word != "uncordon"]
    back_s: float | None = None
    lost = False
    losses = 0
    for now_s, state, _ in play(stretches, NodeBook(POLICY)):
        if state.phase is NodePhase.LOST:
            losses += 0 if lost else 1
            lost, back_s = True, None
        elif lost and back_s is None:
            back_s = now_s
        if state.reachable and lost:
            assert back_s is not None
            # The node's own record tells how long; it is never less than the first hold-down.
            assert now_s - back_s >= POLICY.hold_s
            lost = False
        assert not (state.usable and lost)
        assert not (state.startable and not state.usable)


@given(STRETCHES)
@settings(deadline=None, max_examples=50)
def test_nothing_flaps_faster_than_the_hold_down(stretches: list[Stretch]) -> None:
    stretches = [s for s in stretches if not s.word]
    came_s: list[float] = []
    before = True
    for now_s, state, _ in play(stretches, NodeBook(POLICY)):
        if state.usable and not before:
            came_s.append(now_s)
        before = state.usable
    gaps = [later - sooner for sooner, later in pairwise(came_s)]
    assert all(gap >= POLICY.hold_s for gap in gaps)
    # Within the time of a clean record each return waits twice as long as the last.
    for number, (sooner, later) in enumerate(pairwise(came_s), 2):
        if later - came_s[0] < POLICY.forget_s:
            assert later - sooner >= POLICY.hold_down_s(number)


@given(STRETCHES)
@settings(deadline=None, max_examples=50)
def test_an_operators_word_always_holds(stretches: list[Stretch]) -> None:
    for _, state, word in play(stretches, NodeBook(POLICY)):
        assert state.word == word
        if word:
            assert not state.usable
            assert not state.startable
            assert state.phase in {NodePhase.LOST, NodePhase(word)}


def sight(book: NodeBook, now_s: float, silent_s: float = 0.0, dead: str = "") -> NodeState:
    (state,) = book.observe(now_s, [NodeSighting(name="n", silent_s=silent_s, dead=dead)])
    return state


def test_the_hold_down_doubles_and_a_clean_record_ends_that() -> None:
    book, now_s, held_s = NodeBook(POLICY), 0.0, []
    for pause_s in (10.0, 10.0, 10.0, 10.0, 10.0, 61.0):
        sight(book, now_s)
        now_s += pause_s
        sight(book, now_s)
        assert sight(book, now_s, dead="gone").phase is NodePhase.LOST
        state = sight(book, now_s + 1.0)
        held_s.append(state.until_s - now_s - 1.0)
        now_s = state.until_s
        assert sight(book, now_s - 0.5).phase is NodePhase.HELD_DOWN
        assert sight(book, now_s).phase is NodePhase.UP
    assert held_s == [6.0, 12.0, 24.0, 48.0, 48.0, 6.0]


def test_silence_is_no_loss_before_its_limit() -> None:
    book = NodeBook(POLICY)
    sight(book, 0.0)
    phases = [sight(book, 0.5 * n, silent_s=0.5 * n).phase for n in range(1, 11)]
    assert phases == [NodePhase.UP] * 4 + [NodePhase.SILENT] * 5 + [NodePhase.LOST]
    assert not sight(book, 5.5).usable


def test_the_servers_own_standstill_is_no_silence() -> None:
    book = NodeBook(POLICY)
    sight(book, 0.0)
    # The server was stopped for a minute, and has not read what nodes sent meanwhile.
    assert sight(book, 60.0, silent_s=60.0).phase is NodePhase.UP
    assert sight(book, 61.0, silent_s=0.0).phase is NodePhase.UP
    # But a server whose rounds are slow still notices.
    phases = [sight(book, 61.0 + 3 * n, silent_s=3.0 * n).phase for n in range(1, 5)]
    assert phases[-1] is NodePhase.LOST


def test_an_operator_may_end_a_hold_down() -> None:
    book = NodeBook(POLICY)
    sight(book, 0.0)
    sight(book, 1.0, dead="gone")
    assert sight(book, 2.0).phase is NodePhase.HELD_DOWN
    book.uncordon("n")
    assert sight(book, 2.5).phase is NodePhase.UP


def test_words_and_losses_outlive_the_server() -> None:
    book = NodeBook(POLICY)
    sight(book, 0.0)
    sight(book, 1.0, dead="gone")
    book.drain("n")
    again = NodeBook(POLICY)
    again.restore(book.state())
    assert again.state() == book.state()
    # It was lost then, so it is held down now that it is back.
    assert sight(again, 0.0).word == "draining"
    assert not sight(again, 0.5).reachable
    sight(again, 1.0, dead="gone")
    again.uncordon("n")
    assert sight(again, 2.0).until_s - 2.0 == 6.0
    broken: list[dict[str, Any]] = [
        {"nodes": {"n": ["gone", 0, False]}},
        {"nodes": {"n": ["", -1, False]}},
        {"nodes": []},
    ]
    for wrong in broken:
        with pytest.raises(ValueError, match="node"):
            again.restore(wrong)


def test_an_unknown_node_is_named() -> None:
    book = NodeBook(POLICY)
    sight(book, 0.0)
    with pytest.raises(OServeError, match="'m'") as caught:
        book.cordon("m")
    assert "n" in caught.value.remedy


def test_a_node_that_lacks_the_model_is_not_used_before_it_has_it() -> None:
    book = NodeBook(POLICY)

    def look(now_s: float, lacks: str | None, dead: str = "") -> NodeState:
        return book.observe(now_s, [NodeSighting(name="n", lacks=lacks, dead=dead)])[0]

    # Not known yet: plans may count on it, and nothing starts there.
    state = look(0.0, None)
    assert (state.phase, state.usable, state.startable) == (NodePhase.UP, True, False)
    state = look(1.0, "1 of 2 GiB")
    assert (state.phase, state.reason) == (NodePhase.FETCHING, "1 of 2 GiB")
    assert (state.usable, state.startable, state.reachable) == (False, False, True)
    state = look(2.0, "")
    assert (state.phase, state.usable, state.startable) == (NodePhase.UP, True, True)
    # A loss, and an operator's word, count for more.
    book.cordon("n")
    state = look(3.0, "2 of 2 GiB")
    assert (state.phase, state.usable) == (NodePhase.CORDONED, False)
    state = look(4.0, None, dead="its power was cut")
    assert (state.phase, state.reason) == (NodePhase.LOST, "its power was cut")
    # Held down, although it has everything.
    state = look(5.0, "")
    assert not state.usable
