"""What follows when replicas fail, refuse, break off, or do not understand."""

import pytest

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Refusal
from oserve.control.dispatch.events import Cause, Rest
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.router import RouteReason
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus

from .dispatch_driver import Driver, names, only
from .dispatch_scenario import Ask, Fake, replica_of

BOTH = (replica_of("r0"), replica_of("r1"))
REST = Rest(context_tokens=12, made_tokens=2)
MUTE = Fake(resumes=False)


def broken(number: int, cause: Cause, rest: Rest | None = REST, **fields: bool) -> on.Broken:
    return on.Broken(number=number, cause=cause, rest=rest, reason="broke", **fields)


def streaming(*replicas: TableReplica, max_moves: int = 3) -> Driver:
    """A machine with a request that streams at the first replica."""
    driver = Driver(*replicas, policy=DispatchPolicy(max_moves=max_moves))
    driver.ask(0.0, 1)
    assert names(driver.at(1.0, on.Streams(1))) == ["Forward"]
    return driver


def test_a_request_goes_from_replica_to_replica_until_its_attempts_are_used_up() -> None:
    driver = Driver(*BOTH, replica_of("r2"), policy=DispatchPolicy(max_attempts=2))
    send = only(driver.ask(0.0, 1), do.Send)
    assert (send.replica.id, send.reason) == ("r0", RouteReason.POOL)
    commands = driver.at(1.0, on.Refused(number=1, status=500, reason="500"))
    assert names(commands) == ["Retry", "Send"]
    assert driver.place(1) == "r1"
    # The client gets the answer of the last one, whatever it is.
    commands = driver.at(2.0, on.Refused(number=1, status=503, reason="503"))
    assert names(commands) == ["Forward"]
    record = only(driver.at(3.0, on.Finished(1, FinishStatus.FAILED)), do.Record)
    assert (record.replica, record.moves) == ("r1", 0)


def test_a_connection_that_breaks_means_another_try_or_an_error() -> None:
    driver = Driver(*BOTH, expected=False)
    driver.ask(0.0, 1)
    driver.at(0.5, on.Began(1))
    assert names(driver.at(1.0, on.Lost(number=1, reason="broke", status=200))) == ["Retry", "Send"]
    commands = driver.at(2.0, on.Lost(number=1, reason="broke"))
    # Nothing else serves and nothing is expected.
    assert names(commands) == ["LetGo", "Refuse", "Record"]
    refuse = only(commands, do.Refuse)
    assert (refuse.refusal, refuse.replica) == (Refusal.REPLICA_FAILED, "r1")


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_every_replica_would_refuse_is_refused(status: int) -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1, 2)
    commands = driver.at(1.0, on.Refused(number=1, status=status, reason="bad"))
    assert names(commands) == ["Forward"]
    # Its words are lost: the client is told that much.
    commands = driver.at(1.0, on.Lost(number=2, reason="broke", status=status))
    refuse = only(commands, do.Refuse)
    assert (refuse.refusal, refuse.status) == (Refusal.REFUSED_WITHOUT_BODY, status)
    assert only(commands, do.Record).status is FinishStatus.CLIENT_ERROR
    assert driver.machine.fleet.breakers.report(1.0) == {}


def test_what_an_attached_server_holds_against_us_is_not_for_the_client() -> None:
    driver = Driver(replica_of("r0", Fake(attached=True)))
    driver.ask(0.0, 1)
    commands = driver.at(1.0, on.Refused(number=1, status=401, reason="401"))
    refuse = only(commands, do.Refuse)
    assert refuse.refusal is Refusal.REPLICA_FAILED
    assert "401" in refuse.reason


def test_retry_after_sets_a_replica_aside_and_ends_in_time() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1)
    driver.at(0.0, on.Refused(number=1, status=429, reason="429", retry_after_s=7.0))
    assert driver.place(1) == "r1"
    driver.ask(1.0, 2, 3)
    # The other one is full: what comes waits until the back-off is over, and no longer.
    assert driver.place(2) == "r1"
    assert driver.waiting == {3}
    assert driver.machine.due_s == 7.0
    driver.at(7.0, on.Tick())
    assert driver.place(3) == "r0"


def test_a_trial_that_succeeds_lets_the_others_follow() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1)
    driver.at(0.0, on.Lost(number=1, reason="refused", connected=False))
    driver.ask(0.0, 2, 3, 4)
    assert driver.waiting == {3, 4}
    driver.at(1.0, on.Tick())
    # One is let through, the next follows once it has begun to answer.
    assert driver.place(3) == "r0"
    assert driver.waiting == {4}
    driver.at(1.5, on.Streams(3))
    assert driver.place(4) == "r0"


def test_if_all_replicas_are_set_aside_they_get_requests_all_the_same() -> None:
    one = Fake(most=1)
    driver = Driver(
        replica_of("r0", one), replica_of("r1", one), policy=DispatchPolicy(max_attempts=1)
    )
    driver.ask(0.0, 1, 2, 3)
    driver.at(0.5, on.Lost(number=1, reason="refused", connected=False))
    assert driver.waiting == {3}
    driver.at(0.6, on.Refused(number=2, status=429, reason="429"))
    assert driver.place(3) == "r0"


def test_a_trial_without_outcome_makes_room_for_another() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1)
    driver.at(0.0, on.Lost(number=1, reason="refused", connected=False))
    driver.ask(0.0, 2, 3, 4)
    driver.at(1.0, on.Tick())
    assert driver.place(3) == "r0"
    driver.at(1.2, on.ClientGone(3))
    assert driver.place(4) == "r0"


def test_an_answer_that_ends_well_closes_the_breaker() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1)
    driver.at(0.0, on.Lost(number=1, reason="refused", connected=False))
    assert driver.machine.fleet.breakers.report(1.0).keys() == {"r0"}
    driver.ask(1.0, 2, ask=Ask(kind="long"))
    assert driver.place(2) == "r0"
    driver.at(1.1, on.Began(2))
    driver.at(1.2, on.Shown(2))
    driver.at(1.3, on.Finished(2))
    assert driver.machine.fleet.breakers.report(1.3) == {}


def test_streams_that_end_do_not_hide_that_new_requests_fail() -> None:
    driver = Driver(replica_of("r0", Fake(most=8)))
    driver.ask(0.0, 1, 2, 3)
    for number in (1, 2, 3):
        driver.at(0.1, on.Streams(number))
    for number in (4, 5, 6):
        assert driver.machine.fleet.breakers.report(1.0) == {}
        driver.ask(1.0, number)
        driver.at(1.0, on.Refused(number=number, status=500, reason="500"))
        driver.at(1.0, on.Finished(number, FinishStatus.FAILED))
        driver.at(1.0, on.Finished(number - 3))
    assert driver.machine.fleet.breakers.report(1.0).keys() == {"r0"}


def test_an_engine_that_gives_a_request_up_is_not_set_aside() -> None:
    driver = Driver(*BOTH)
    for number in range(1, 6):
        driver.ask(float(number), number)
        driver.at(
            float(number), on.Refused(number=number, status=500, reason="aborted", aborted=True)
        )
        assert driver.place(number) == "r1"
        driver.at(number + 0.5, on.Finished(number))
    assert driver.machine.fleet.breakers.report(6.0) == {}


def test_what_is_better_worded_is_no_attempt() -> None:
    driver = Driver(replica_of("r0"), policy=DispatchPolicy(max_attempts=1))
    driver.ask(0.0, 1)
    assert names(driver.at(1.0, on.Reworded(1))) == ["LetGo", "Send"]
    assert driver.machine.requests[1].attempts == 1
    assert driver.place(1) == "r0"
    # Once the client has part of an answer there is nothing to reword.
    driver.at(2.0, on.Streams(1))
    assert driver.at(3.0, on.Reworded(1)) == []


def test_a_stream_goes_on_elsewhere_from_where_it_broke() -> None:
    driver = streaming(*BOTH)
    commands = driver.at(2.0, broken(1, Cause.LOST))
    assert names(commands) == ["Resume", "Send"]
    send = only(commands, do.Send)
    assert (send.replica.id, send.resumes) == ("r1", True)
    request = driver.machine.requests[1].request
    assert request is not None
    # Three were expected, two have been made.
    assert (request.prompt_tokens, request.output_tokens) == (12, 1)
    # What was held back of the first answer does not matter any more.
    assert driver.at(2.5, on.Streams(1)) == []
    driver.at(3.0, on.Began(1))
    record = only(driver.at(4.0, on.Finished(1)), do.Record)
    assert (record.status, record.replica, record.moves) == (FinishStatus.COMPLETED, "r1", 1)


def test_a_stream_moves_so_often_and_never_back() -> None:
    driver = streaming(*BOTH, replica_of("r2"), max_moves=1)
    driver.at(2.0, broken(1, Cause.LOST))
    driver.at(3.0, on.Began(1))
    commands = driver.at(4.0, broken(1, Cause.LOST))
    assert only(commands, do.Refuse).refusal is Refusal.REPLICA_FAILED
    driver = streaming(*BOTH)
    driver.at(2.0, broken(1, Cause.LOST))
    driver.at(3.0, broken(1, Cause.LOST))
    # It waits for a third one.
    assert driver.waiting == {1}
    driver.table(4.0, *BOTH, replica_of("r2"))
    assert driver.place(1) == "r2"


@pytest.mark.parametrize(
    ("others", "rest"),
    [
        ((replica_of("r2"),), None),
        ((replica_of("r2", MUTE),), REST),
        ((replica_of("r2", Fake(context=12)),), REST),
    ],
)
def test_a_stream_that_cannot_go_on_ends(
    others: tuple[TableReplica, ...], rest: Rest | None
) -> None:
    driver = Driver(replica_of("r0"), *others, expected=False)
    driver.ask(0.0, 1, 2)
    driver.at(1.0, on.Streams(1), on.Streams(2))
    assert driver.place(1) == driver.place(2) == "r0"
    commands = driver.at(2.0, broken(1, Cause.LOST, rest))
    assert names(commands) == ["LetGo", "Refuse", "Record"]
    # The replica itself tells an error: the client is shown that one.
    commands = driver.at(2.0, broken(2, Cause.FAILED, rest, can_end=True))
    assert names(commands) == ["ShowError"]
    assert names(driver.at(3.0, on.Finished(2, FinishStatus.FAILED))) == ["Record"]


def test_an_answer_that_is_no_stream_ends_with_its_connection() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1, ask=Ask(kind="long"))
    driver.at(1.0, on.Began(1))
    driver.at(2.0, on.Shown(1))
    assert driver.at(2.5, on.Lost(number=1, reason="broke")) == []
    commands = driver.at(3.0, broken(1, Cause.LOST, None))
    assert names(commands) == ["LetGo", "Refuse", "Record"]


def test_a_stream_that_diverged_may_go_on_where_it_is() -> None:
    driver = streaming(replica_of("r0"))
    commands = driver.at(2.0, broken(1, Cause.DIVERGED))
    assert names(commands) == ["Resume", "Send"]
    assert driver.place(1) == "r0"
    assert driver.machine.requests[1].tried == set()


def test_the_cache_goes_with_a_stream_if_the_world_says_so() -> None:
    for with_cache in (False, True):
        driver = streaming(*BOTH)
        commands = driver.at(2.0, broken(1, Cause.HANDED_OVER, with_cache=with_cache))
        resume = only(commands, do.Resume)
        assert (resume.with_cache, resume.replica) == (with_cache, "r0")


def test_a_session_is_sent_where_its_prompt_is_cached() -> None:
    driver = Driver(replica_of("r0", Fake(most=8)), replica_of("r1", Fake(most=8)))
    first = Ask(prompt=100, session="s")
    driver.ask(0.0, 1, ask=first)
    driver.ask(0.0, 2)
    assert (driver.place(1), driver.place(2)) == ("r0", "r1")
    sent = only(driver.ask(1.0, 3, ask=Ask(prompt=150, session="s")), do.Send)
    assert (sent.replica.id, sent.cached_tokens) == ("r0", 100)


def test_an_answer_longer_than_expected_is_booked_as_that() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1, ask=Ask(guess=4))
    forward = only(driver.at(1.0, on.Streams(1)), do.Forward)
    assert forward.credit_tokens == 4
    # Of 5 tokens it is 7.5 by now.
    forward = only(driver.at(2.0, on.Progressed(1, 5)), do.Forward)
    assert (forward.credit_tokens, forward.outgrown) == (7, True)
    work_s, _ = driver.machine.fleet.ledger.own()["r0"]
    assert work_s == pytest.approx(0.75)
    # Elsewhere only the rest is owed, and it outgrows what was booked in all.
    driver.at(3.0, broken(1, Cause.LOST, Rest(context_tokens=16, made_tokens=6)))
    work_s, _ = driver.machine.fleet.ledger.own()["r1"]
    assert work_s == pytest.approx(0.16 + 0.3)
    driver.at(4.0, on.Began(1), on.Progressed(1, 10))
    work_s, _ = driver.machine.fleet.ledger.own()["r1"]
    assert work_s == pytest.approx(0.3 + 0.6)


def test_what_raises_in_the_gateway_ends_that_request_alone() -> None:
    driver = Driver(*BOTH)
    driver.ask(0.0, 1, 2)
    commands = driver.at(1.0, on.Crashed(1), on.Crashed(7))
    assert names(commands) == ["LetGo", "Refuse", "Record"]
    assert only(commands, do.Refuse).refusal is Refusal.INTERNAL
    assert driver.place(2) != ""
