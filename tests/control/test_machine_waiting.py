"""Who waits, who passes whom, who is refused, and what ends the waiting."""

import pytest

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Refusal
from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.events import Cause, Rest
from oserve.control.dispatch.fleet import Choice
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.router import NoRoute
from oserve.control.dispatch.state import RequestState
from oserve.core import FinishStatus, Request

from .dispatch_driver import Driver, names, only
from .dispatch_scenario import Ask, Fake, arrival, replica_of, table_of

ONE = Fake(most=1)
SHORT, LONG = Ask(prompt=10), Ask(prompt=100)


def refusals(commands: list[do.Command]) -> dict[int, Refusal]:
    return {item.number: item.refusal for item in commands if isinstance(item, do.Refuse)}


def test_of_one_moment_the_best_rank_is_sent_first_whatever_the_order_of_events() -> None:
    driver = Driver(replica_of("r0", ONE))
    commands = driver.at(1.0, arrival(1, 1.0, LONG), arrival(2, 1.0, SHORT))
    assert driver.place(2) == "r0"
    assert names(commands) == ["Send", "Hold"]
    # A request that comes while a slot is freed does not take it from one that waits.
    commands = driver.at(2.0, arrival(3, 30.0, LONG), on.Finished(2))
    assert driver.place(1) == "r0"
    assert driver.waiting == {3}
    # By rank, it is the newest.
    driver.at(3.0, arrival(4, 3.0, SHORT), on.Finished(1))
    assert driver.place(4) == "r0"


def test_a_request_passes_those_that_wait_for_other_replicas() -> None:
    driver = Driver(replica_of("r0", ONE), expected=True)
    driver.ask(0.0, 1)
    commands = driver.at(1.0, on.Lost(number=1, reason="broke"))
    # The only replica failed it: it waits for another, and those who come later do not.
    assert names(commands) == ["Retry", "Hold"]
    driver.ask(1.0, 2, 3)
    assert driver.place(2) == "r0"
    assert driver.waiting == {1, 3}
    driver.at(2.0, on.Finished(2))
    assert driver.place(3) == "r0"
    driver.table(3.0, replica_of("r0", ONE), replica_of("r1", ONE))
    assert driver.place(1) == "r1"


def test_a_short_request_passes_long_ones_that_only_a_full_replica_can_hold() -> None:
    small, large = Fake(most=1, context=50), Fake(most=1, context=500)
    driver = Driver(replica_of("r0", small), replica_of("r1", large))
    driver.ask(0.0, 1, 2, 3, ask=LONG)
    driver.ask(10.0, 4, 5, ask=SHORT)
    assert driver.place(1) == "r1"
    assert driver.place(4) == "r0"
    driver.at(11.0, on.Finished(4))
    assert driver.place(5) == "r0"
    assert driver.waiting == {2, 3}
    driver.at(12.0, on.Finished(1))
    assert driver.place(2) == "r1"


def test_a_full_queue_refuses_those_that_came_last() -> None:
    driver = Driver(replica_of("r0", ONE), policy=DispatchPolicy(max_queued=1))
    driver.ask(0.0, 1)
    commands = driver.at(1.0, arrival(2, 1.0), arrival(3, 1.0), arrival(4, 1.0))
    assert refusals(commands) == {3: Refusal.QUEUE_FULL, 4: Refusal.QUEUE_FULL}
    assert driver.waiting == {2}
    record = only(driver.ask(2.0, 5), do.Record)
    assert record.status is FinishStatus.REJECTED


def test_a_late_request_is_demoted_once_and_served_last() -> None:
    policy = DispatchPolicy(overload=OverloadPolicy(ttft_s=2.0))
    driver = Driver(replica_of("r0", ONE), policy=policy)
    driver.ask(0.0, 1, 2)
    # The second cannot have its first token in time any more, the third can.
    assert names(driver.ask(1.9, 3)) == ["Demote", "Hold"]
    driver.at(2.0, on.Finished(1))
    assert driver.place(3) == "r0"
    commands = driver.at(3.0, on.Finished(3))
    assert names(commands) == ["Record", "Send"]
    assert driver.place(2) == "r0"


def test_a_replica_that_owes_prompts_gets_another_once_they_are_computed() -> None:
    policy = DispatchPolicy(overload=OverloadPolicy(ttft_s=20.0))
    driver = Driver(replica_of("r0", Fake(most=8)), policy=policy)
    # 3 s of prompts, of the 2.5 s that it may owe.
    driver.ask(0.0, 1, 2, ask=Ask(prompt=300))
    assert driver.waiting == {2}
    driver.at(1.0, on.Streams(1))
    assert driver.place(2) == "r0"


def test_one_that_waits_too_long_is_shed_at_that_moment() -> None:
    # Sums of these are not exact.
    policy = DispatchPolicy(overload=OverloadPolicy(shed_after_s=0.7))
    driver = Driver(replica_of("r0", ONE), policy=policy)
    driver.ask(0.1, 1, 2)
    assert driver.machine.due_s == pytest.approx(0.8)
    refuse = only(driver.at(driver.machine.due_s, on.Tick()), do.Refuse)
    assert (refuse.number, refuse.refusal) == (2, Refusal.SHED)
    assert refuse.retry_after_s == 1
    assert driver.place(1) == "r0"


def test_a_request_waits_for_a_replica_that_is_expected_and_gives_up() -> None:
    driver = Driver(policy=DispatchPolicy(no_replica_wait_s=5.0))
    assert names(driver.ask(1.0, 1)) == ["Hold"]
    assert driver.machine.due_s == 6.0
    assert driver.at(3.0, on.Tick()) == []
    commands = driver.at(6.0, on.Tick())
    assert refusals(commands) == {1: Refusal.NONE_READY_IN_TIME}
    driver.table(7.0, expected=False)
    assert refusals(driver.ask(8.0, 2)) == {2: Refusal.NO_REPLICA}


def test_one_that_waits_for_room_gives_up_when_no_replica_is_left() -> None:
    driver = Driver(replica_of("r0", ONE), policy=DispatchPolicy(no_replica_wait_s=5.0))
    driver.ask(0.0, 1, 2)
    driver.table(10.0)
    assert driver.machine.due_s == 15.0
    # One comes back, full: the request waits for room again.
    back = on.TableChanged(table_of([replica_of("r0", ONE)]))
    driver.at(14.0, back, on.LoadElsewhere({"r0": (1.0, 1)}))
    assert driver.at(15.0, on.Tick()) == []
    assert driver.waiting == {2}
    # It goes for good.
    driver.table(16.0)
    assert driver.machine.due_s == 21.0
    assert refusals(driver.at(21.0, on.Tick())) == {2: Refusal.NONE_READY_IN_TIME}


def test_a_request_ends_at_its_deadline_wherever_it_is() -> None:
    driver = Driver(replica_of("r0", ONE), policy=DispatchPolicy(request_timeout_s=60.0))
    driver.ask(0.0, 1, 2)
    driver.ask(1.0, 3)
    assert driver.machine.due_s == 60.0
    commands = driver.at(60.0, on.Tick())
    assert refusals(commands) == {1: Refusal.DEADLINE, 2: Refusal.DEADLINE}
    assert names(commands).count("LetGo") == 1
    assert driver.place(3) == "r0"
    assert driver.machine.due_s == 61.0
    driver.at(60.5, on.Finished(3))
    driver.at(61.0, on.Tick())
    assert driver.machine.due_s == float("inf")


def test_less_load_from_other_processes_makes_room() -> None:
    driver = Driver(replica_of("r0", ONE))
    driver.at(0.0, on.LoadElsewhere({"r0": (3.0, 1)}))
    driver.ask(1.0, 1)
    assert driver.waiting == {1}
    driver.at(2.0, on.LoadElsewhere({}))
    assert driver.place(1) == "r0"


def test_auxiliary_calls_neither_wait_nor_count() -> None:
    driver = Driver(replica_of("r0", ONE))
    driver.ask(0.0, 1)
    tokenize = Ask(kind="auxiliary")
    sent = only(driver.ask(0.0, 2, ask=tokenize), do.Send)
    assert sent.reason is None
    assert driver.machine.fleet.ledger.own()["r0"][1] == 1
    commands = driver.at(1.0, on.Refused(number=2, status=500, reason="500"))
    # There is no other replica, so the client gets the answer.
    assert names(commands) == ["Forward"]
    driver.at(1.0, on.Finished(2, FinishStatus.FAILED))
    driver.table(2.0, expected=True)
    assert refusals(driver.ask(3.0, 4, ask=tokenize)) == {4: Refusal.NO_REPLICA}


def test_a_client_that_goes_frees_its_slot() -> None:
    driver = Driver(replica_of("r0", ONE))
    driver.ask(0.0, 1, 2, 3)
    assert names(driver.at(1.0, on.ClientGone(2))) == ["Record"]
    commands = driver.at(2.0, on.ClientGone(1))
    assert names(commands) == ["LetGo", "Record", "Send"]
    assert only(commands, do.Record).status is FinishStatus.DISCONNECTED
    assert driver.place(3) == "r0"
    # The world may tell of it late.
    assert driver.at(3.0, on.Streams(1), on.Finished(2), on.ClientGone(1)) == []


def test_a_shut_down_breaks_off_all_requests() -> None:
    driver = Driver(replica_of("r0", ONE))
    driver.ask(0.0, 1, 2)
    commands = driver.at(1.0, on.ShutDown(), arrival(3, 1.0))
    assert refusals(commands) == {1: Refusal.SHUTTING_DOWN, 2: Refusal.SHUTTING_DOWN}
    assert driver.place(3) == "r0"


def test_streams_that_wait_for_the_same_replicas_are_not_all_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = replica_of("r0", Fake(most=50))
    driver = Driver(first)
    driver.ask(0.0, *range(50))
    driver.at(0.1, *(on.Streams(number) for number in range(50)))
    # Another goes on with one at a time; a third has room, and can go on with none.
    others = replica_of("r1", ONE), replica_of("r2", Fake(most=9, resumes=False))
    driver.table(0.2, first, *others)
    for number in range(50):
        rest = Rest(context_tokens=12, made_tokens=2)
        driver.at(0.3, on.Broken(number=number, cause=Cause.LOST, rest=rest))
    assert len(driver.waiting) == 49
    fleet, chosen = driver.machine.fleet, []
    choose = fleet.choose

    def noted(
        state: RequestState, request: Request, now_s: float, *, tight: bool = False
    ) -> Choice | NoRoute:
        chosen.append(state.number)
        return choose(state, request, now_s, tight=tight)

    monkeypatch.setattr(fleet, "choose", noted)
    driver.at(0.4, on.Finished(0))
    assert driver.place(1) == "r1"
    assert set(chosen) == {1, 2}
    assert names(driver.ask(0.5, 50)) == ["Send"]
    assert driver.place(50) == "r2"


def test_constants_of_a_table_apply_to_those_that_wait_already() -> None:
    driver = Driver(replica_of("r0", ONE))
    driver.ask(0.0, 1, 2)
    late = DispatchConstants(overload=OverloadPolicy(ttft_s=2.0))
    tuned = on.TableChanged(table_of([replica_of("r0", ONE)], constants=late))
    assert names(driver.at(1.9, tuned)) == ["Demote"]
    driver.ask(1.9, 3)
    driver.at(2.0, on.Finished(1))
    assert driver.place(3) == "r0"
    # Without them the policy holds again: what was demoted stays so, nothing else is.
    driver.at(2.1, on.TableChanged(table_of([replica_of("r0", ONE)])))
    assert names(driver.ask(9.0, 4)) == ["Hold"]
    driver.at(9.1, on.Finished(3))
    assert driver.place(4) == "r0"
    assert driver.waiting == {2}


def test_constants_say_how_many_prompts_a_replica_may_owe() -> None:
    deep = DispatchConstants(overload=OverloadPolicy(ttft_s=20.0, owed_of_ttft=0.5))
    policy = DispatchPolicy(overload=OverloadPolicy(ttft_s=20.0))
    driver = Driver(replica_of("r0", Fake(most=8)), policy=policy)
    driver.ask(0.0, 1, 2, ask=Ask(prompt=300))
    assert driver.waiting == {2}
    driver.at(0.1, on.TableChanged(table_of([replica_of("r0", Fake(most=8))], constants=deep)))
    assert driver.place(2) == "r0"
