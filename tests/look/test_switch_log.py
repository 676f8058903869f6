"""What is kept of switches: expectations, outcomes, and when a switch is judged."""

import msgspec
import pytest

from look.scene import Fleet
from oserve.look.sections import MOST_SWITCHES, PageSwitch, page_state
from oserve.look.switches import (
    FIRST_JUDGED_S,
    JUDGED_S,
    RUNNING_S,
    SeenSwitch,
    SwitchLog,
    SwitchOutcomeSeen,
)

RAN = SwitchOutcomeSeen(requests=10, moves=2, lost=0)


def switch(number: int, began_s: float, ended_s: float | None = None) -> PageSwitch:
    return PageSwitch(
        id=f"s{number}",
        plan=f"p{number}",
        by="interval",
        method="transfer",
        state="running" if ended_s is None else "done",
        reason="",
        phase="",
        wave=0,
        waves=1,
        moved_bytes=0,
        total_bytes=0,
        began_s=began_s,
        ended_s=ended_s,
        phases=[],
    )


def test_what_was_expected_stays_when_its_decision_is_forgotten() -> None:
    fleet = Fleet()
    fleet.begin_switch()
    assert fleet.switch is not None
    log = SwitchLog()
    log.observe(page_state(fleet.status(), [fleet.switch], {}, now_s=fleet.at_s).switches)
    for _ in range(20):
        fleet.at_s += 30.0
        fleet.decide()
    (later,) = page_state(fleet.status(), [fleet.switch], {}, now_s=fleet.at_s).switches
    assert later.expected_gain is None
    (seen,) = log.observe([later])
    assert seen.switch.expected_gain == 412.0


def test_it_survives_a_restart() -> None:
    log = SwitchLog()
    log.observe([switch(1, 0.0, 10.0)])
    log.learn({"s1": RAN})
    text = msgspec.json.encode(log.document())
    again = SwitchLog(msgspec.json.decode(text, type=list[SeenSwitch]))
    assert again.observe([]) == log.observe([])
    assert again.unknown() == []


def test_only_the_last_are_kept() -> None:
    log = SwitchLog()
    found = log.observe([switch(number, number * 100.0) for number in range(MOST_SWITCHES + 3)])
    assert [item.switch.id for item in found] == [f"s{n}" for n in range(3, MOST_SWITCHES + 3)]


def test_it_is_judged_soon_and_once_more() -> None:
    log = SwitchLog()
    log.observe([switch(1, 100.0, 110.0)])
    assert log.to_judge(10_000.0) is None, "its records were not looked at"
    log.learn({"s1": RAN})
    first_s = 110.0 + FIRST_JUDGED_S + RUNNING_S
    assert log.to_judge(first_s - 1.0) is None
    due = log.to_judge(first_s)
    assert due is not None
    assert (due.start_s, due.end_s) == (100.0, 110.0 + FIRST_JUDGED_S)
    log.judged(due, 40, 30, 42)
    (seen,) = log.observe([])
    assert seen.document()["realised_gain"] == 10
    assert log.to_judge(first_s + 10.0) is None
    due = log.to_judge(110.0 + JUDGED_S + RUNNING_S)
    assert due is not None
    assert due.end_s == 110.0 + JUDGED_S
    log.judged(due, None, None, None)
    assert log.to_judge(1e6) is None, "what cannot be judged is not tried for ever"


@pytest.mark.parametrize("begins_s", [130.0, 250.0])
def test_requests_after_the_next_switch_do_not_count(begins_s: float) -> None:
    log = SwitchLog()
    log.observe([switch(1, 100.0, 110.0), switch(2, begins_s)])
    log.learn({"s1": RAN})
    due = log.to_judge(1e6)
    assert due is not None
    assert (due.id, due.end_s) == ("s1", begins_s)
