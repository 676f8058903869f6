"""Replicas that are to give up their requests: which leave, when, how many at once."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.events import Cause, Progress, Rest
from oserve.control.dispatch.policy import DispatchPolicy, DrainCandidate, Exit
from oserve.control.dispatch.table import TableReplica
from oserve.core import FinishStatus, ReplicaPhase

from .dispatch_driver import Driver, names, only
from .dispatch_scenario import Ask, Change, Fake, Scenario, replica_of
from .dispatch_world import World

WIDE = Fake(most=8)
STAYS = Progress(2, False, 0.1)
MOVES = Progress(2, True, 0.1)


def surveyed(command: do.Survey, progress: Progress = MOVES) -> on.Surveyed:
    return on.Surveyed(command.replica, command.started_s, dict.fromkeys(command.numbers, progress))


def handed_over(number: int) -> on.Broken:
    return on.Broken(number=number, cause=Cause.HANDED_OVER, rest=Rest(12, 2))


def departing(commands: Sequence[do.Command]) -> list[int]:
    return [command.number for command in commands if isinstance(command, do.Depart)]


def vacated(streams: int, within_s: float, *others: TableReplica) -> tuple[Driver, do.Survey]:
    """So many streams at a replica that is vacated, which are to be surveyed."""
    driver = Driver(replica_of("r0", WIDE), expected=False)
    numbers = range(1, streams + 1)
    driver.ask(0.0, *numbers)
    driver.at(1.0, *(on.Streams(number) for number in numbers))
    driver.table(2.0, replica_of("r0", WIDE), *others, expected=False)
    assert driver.at(2.0, on.Vacate(replica="r0", within_s=within_s)) == []
    assert driver.machine.due_s == 2.0
    return driver, only(driver.at(2.0, on.Tick()), do.Survey)


def test_streams_leave_a_few_at_a_time_and_each_is_asked_once() -> None:
    driver, survey = vacated(6, 0.0, replica_of("r1", WIDE))
    assert survey.numbers == (1, 2, 3, 4, 5, 6)
    commands = driver.at(2.0, surveyed(survey))
    assert departing(commands) == [1, 2, 3, 4]
    # The others are looked at as soon as the gateway has had its turn, though no stream has left.
    assert driver.machine.due_s == 2.0
    survey = only(driver.at(2.0, on.Tick()), do.Survey)
    assert survey.numbers == (5, 6)
    assert departing(driver.at(2.0, surveyed(survey))) == [5, 6]
    assert driver.machine.due_s == 2.5
    for number in range(1, 6):
        assert names(driver.at(2.1, handed_over(number))) == ["Resume", "Send"]
        assert driver.place(number) == "r1"
    # The one that has not left is asked again.
    survey = only(driver.at(2.5, on.Tick()), do.Survey)
    assert survey.numbers == (6,)
    assert departing(driver.at(2.5, surveyed(survey))) == [6]
    driver.at(2.6, on.Finished(6))
    assert driver.at(3.0, on.Tick()) == []


def test_streams_that_cannot_leave_stay_and_are_not_asked_without_pause() -> None:
    driver, survey = vacated(6, 0.0)
    asked = departing(driver.at(2.0, surveyed(survey)))
    survey = only(driver.at(2.0, on.Tick()), do.Survey)
    asked += departing(driver.at(2.0, surveyed(survey)))
    assert asked == [1, 2, 3, 4, 5, 6]
    for number in asked:
        # There is no other replica.
        assert driver.at(2.1, handed_over(number)) == []
    assert driver.machine.due_s == 2.5
    assert driver.place(6) == "r0"


def test_before_the_time_is_up_only_those_leave_for_whom_there_is_room() -> None:
    driver, survey = vacated(4, 10.0, replica_of("r1", Fake(most=2)))
    commands = driver.at(2.0, surveyed(survey))
    assert departing(commands) == [1, 2]
    assert driver.machine.due_s == 2.5
    driver.at(2.1, handed_over(1))
    # One is there, one on its way: no further one has room.
    survey = only(driver.at(2.5, on.Tick()), do.Survey)
    assert survey.numbers == (2, 3, 4)
    assert departing(driver.at(2.5, surveyed(survey))) == [2]
    driver.at(2.6, handed_over(2))
    survey = only(driver.at(3.0, on.Tick()), do.Survey)
    assert departing(driver.at(3.0, surveyed(survey))) == []
    driver.at(3.1, on.Finished(1))
    survey = only(driver.at(3.5, on.Tick()), do.Survey)
    assert departing(driver.at(3.5, surveyed(survey))) == [3]


def test_when_the_time_is_up_all_leave_and_wait_for_room() -> None:
    driver, survey = vacated(3, 0.2, replica_of("r1", Fake(most=1)))
    assert departing(driver.at(2.0, surveyed(survey))) == [1]
    driver.at(2.0, handed_over(1))
    assert driver.machine.due_s == 2.2
    survey = only(driver.at(2.2, on.Tick()), do.Survey)
    assert departing(driver.at(2.2, surveyed(survey))) == [2, 3]
    driver.at(2.3, handed_over(2), handed_over(3))
    assert driver.waiting == {2, 3}
    driver.at(3.0, on.Finished(1))
    assert driver.place(2) == "r1"


def test_what_has_no_answer_yet_is_tried_elsewhere_and_what_cannot_move_stays() -> None:
    driver, survey = vacated(2, 0.0, replica_of("r1"))
    driver = Driver(replica_of("r0", WIDE))
    driver.ask(0.0, 1, 2, 3)
    driver.at(1.0, on.Streams(1), on.Began(2))
    driver.table(1.0, replica_of("r0", WIDE), replica_of("r1"))
    driver.at(2.0, on.Vacate(replica="r0", within_s=0.0))
    survey = only(driver.at(2.0, on.Tick()), do.Survey)
    commands = driver.at(2.0, surveyed(survey, STAYS))
    assert names(commands) == ["Retry", "Retry", "Send", "Send"]
    assert [driver.place(number) for number in (1, 2, 3)] == ["r0", "r1", "r1"]


def test_a_vacated_replica_gets_nothing_new_and_another_start_of_it_does() -> None:
    driver = Driver(replica_of("r0"))
    driver.at(1.0, on.Vacate(replica="r0", within_s=5.0, started_s=7.0))
    driver.ask(1.0, 1)
    assert driver.place(1) == "r0"
    driver.at(2.0, on.Vacate(replica="r0", within_s=5.0, started_s=0.0))
    driver.ask(2.0, 2)
    assert driver.waiting == {2}
    driver.table(3.0, replica_of("r0", started_s=3.0))
    assert driver.place(2) == "r0"


def test_the_drain_decision_sees_each_request_and_says_how_it_leaves() -> None:
    seen: list[DrainCandidate] = []

    def decide(
        running: Sequence[DrainCandidate], others: Sequence[TableReplica], left_s: float
    ) -> Sequence[Exit]:
        assert [item.id for item in others] == ["r1"]
        assert left_s == 0.0
        seen.extend(running)
        return [Exit.STAY, Exit.WITH_CACHE]

    driver = Driver(replica_of("r0"), replica_of("r1"), drain=decide)
    driver.ask(0.0, 1)
    driver.at(0.0, on.LoadElsewhere({"r1": (9.0, 1)}))
    driver.ask(0.0, 2, ask=Ask(prompt=20, output=9))
    driver.at(1.0, on.Streams(1), on.Streams(2))
    driver.at(2.0, on.Vacate(replica="r0", within_s=0.0))
    survey = only(driver.at(2.0, on.Tick()), do.Survey)
    depart = only(driver.at(2.0, surveyed(survey)), do.Depart)
    assert (depart.number, depart.with_cache) == (2, True)
    assert [item.context_tokens for item in seen] == [12, 22]
    assert [item.remaining_tokens for item in seen] == [1.0, 7.0]


def test_a_replica_that_drains_too_long_is_vacated() -> None:
    policy = DispatchPolicy(drain_limit_s=60.0)
    driver = Driver(replica_of("r0"), replica_of("r1"), policy=policy)
    driver.ask(0.0, 1)
    driver.at(1.0, on.Streams(1))
    draining = replica_of("r0", phase=ReplicaPhase.DRAINING)
    driver.table(2.0, draining, replica_of("r1"))
    assert driver.machine.due_s == 62.0
    survey = only(driver.at(62.0, on.Tick()), do.Survey)
    assert (survey.replica, survey.numbers) == ("r0", (1,))
    assert departing(driver.at(62.0, surveyed(survey))) == [1]
    # Once it is gone nothing is looked at.
    driver.at(62.0, handed_over(1))
    driver.table(62.1, replica_of("r1"))
    assert driver.at(62.5, on.Tick()) == []


ASKS = st.builds(
    Ask,
    at=st.integers(0, 8),
    prompt=st.sampled_from([1, 10, 40]),
    output=st.sampled_from([3, 12, 30]),
    guess=st.none() | st.integers(1, 8),
    kind=st.sampled_from(["stream"] * 8 + ["whole", "long"]),
    movable=st.sampled_from([True, True, True, False]),
    hidden=st.sampled_from([False, False, True]),
)
FAKES = st.builds(Fake, most=st.integers(1, 8), first=st.integers(0, 3), each=st.integers(0, 2))
CHANGES = st.builds(
    Change,
    at=st.integers(1, 12),
    what=st.just("vacate"),
    replica=st.integers(0, 2),
    steps=st.integers(0, 20),
)


@given(
    st.builds(
        Scenario,
        fakes=st.lists(FAKES, min_size=3, max_size=3).map(lambda fakes: (*fakes, Fake(most=2))),
        asks=st.lists(ASKS, min_size=6, max_size=16).map(tuple),
        changes=st.lists(CHANGES, min_size=1, max_size=4).map(tuple),
        policy=st.just(DispatchPolicy(max_moves=3, max_attempts=4)),
        together=st.booleans(),
        reading=st.integers(0, 6),
    )
)
def test_vacated_replicas_lose_no_request(scenario: Scenario) -> None:
    """A replica that nobody vacates is left, so all of them complete; none moves in circles."""
    world = World(scenario).play()
    vacated = {change.replica for change in scenario.changes}
    for client in world.clients.values():
        assert client.records[0].status is FinishStatus.COMPLETED
        assert client.records[0].moves <= len(vacated)


@given(st.integers(1, 20), st.integers(0, 4))
def test_streams_that_find_no_room_elsewhere_wait_in_no_loop(streams: int, reading: int) -> None:
    """None of them can move, which shows when it is to; they end where they are."""
    ask = Ask(at=0, output=12, hidden=True)
    scenario = Scenario(
        fakes=(Fake(most=20), Fake(most=20)),
        asks=(ask,) * streams,
        changes=(Change(at=4, what="vacate", replica=0, steps=2),),
        reading=reading,
    )
    world = World(replace(scenario, policy=DispatchPolicy(overflow_s=1e9))).play()
    assert world.told["Resume"] == 0
    assert all(
        client.records[0].status is FinishStatus.COMPLETED for client in world.clients.values()
    )
