"""What metrics count of switches."""

from oserve.switching.report import SwitchReport, SwitchStatus, SwitchTally


def report(name: str, moved_bytes: int = 0) -> SwitchReport:
    return SwitchReport(id=name, plan="p", by="operator", began_s=0.0, moved_bytes=moved_bytes)


def test_a_switch_counts_once_when_it_has_ended() -> None:
    tally, first, second = SwitchTally(), report("1", 10), report("2", 7)
    before = tally.observe([first.document()])
    assert before["oserve_switches"]["rolled_back"] == [0.0]
    assert before["oserve_switch_moved_bytes"] == {"": [0.0]}
    first.ended(SwitchStatus.DONE, "", 1.0)
    for _ in range(2):
        counted = tally.observe([first.document(), second.document()])
    assert counted["oserve_switches"]["done"] == [1.0]
    second.ended(SwitchStatus.ROLLED_BACK, "a node is lost", 2.0)
    # Reports that are no longer kept have been counted.
    counted = tally.observe([second.document()])
    assert counted["oserve_switches"] == {
        "done": [1.0],
        "rolled_back": [1.0],
        "superseded": [0.0],
        "failed": [0.0],
    }
    assert counted["oserve_switch_moved_bytes"] == {"": [17.0]}
