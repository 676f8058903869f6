"""Switches teach how long the next one takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.switch.costs import PhaseSeconds
from oserve.switch.learned import LearnedPhases

SAID = PhaseSeconds(
    room_s=3.0, prepare_s=4.0, transfer_s=1.0, verify_s=0.5, commit_s=0.01, drain_s=10.0
)
SECONDS = st.floats(0.1, 100.0)


@given(prepare_s=SECONDS, transfer_s=SECONDS)
def test_the_first_switch_is_believed_and_equal_ones_change_nothing(
    prepare_s: float, transfer_s: float
) -> None:
    learned = LearnedPhases()
    took_s = {"prepare": prepare_s, "transfer": transfer_s, "commit": 0.001, "done": 0.0}
    for _ in range(3):
        learned.observe(learned.scaled(SAID), took_s)
        told = learned.scaled(SAID)
        limits = [min(30.0, max(1 / 30, took / said)) * said for took, said in _pairs(took_s)]
        assert [told.prepare_s, told.transfer_s] == pytest.approx(limits)
        assert (told.room_s, told.verify_s, told.commit_s) == (3.0, 0.5, 0.01)


def _pairs(took_s: dict[str, float]) -> list[tuple[float, float]]:
    return [(took_s["prepare"], SAID.prepare_s), (took_s["transfer"], SAID.transfer_s)]


def test_later_switches_count_half_and_memory_survives() -> None:
    learned = LearnedPhases()
    learned.observe(SAID, {"verify": 1.0})
    learned.observe(learned.scaled(SAID), {"verify": 4.0})
    assert learned.factor("verify") == pytest.approx(4.0)
    again = LearnedPhases()
    again.restore({**learned.state(), "room_s": 1.0, "no such phase": 2.0})
    assert again.scaled(SAID) == learned.scaled(SAID)
