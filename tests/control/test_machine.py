"""The request machine in random worlds: whatever happens, what must hold holds after each event."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch import events as on
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.state import Ended, Placed
from oserve.control.dispatch.witness import InvariantError, faults
from oserve.core import FinishStatus

from .dispatch_driver import Driver
from .dispatch_scenario import (
    ANSWERS,
    BREAKS,
    FAULTS,
    Ask,
    Change,
    Fake,
    Scenario,
    arrival,
    replica_of,
)
from .dispatch_world import World

ASKS = st.builds(
    Ask,
    at=st.integers(0, 8),
    prompt=st.sampled_from([1, 10, 40, 200]),
    output=st.sampled_from([1, 3, 6, 12]),
    guess=st.none() | st.integers(1, 8),
    kind=st.sampled_from(["stream"] * 7 + ["whole", "long", "auxiliary"]),
    movable=st.sampled_from([True, True, True, False]),
    hidden=st.sampled_from([False, False, False, True]),
    leaves=st.sampled_from([None] * 7 + [0, 3, 12]),
    session=st.sampled_from(["", "", "s"]),
)
FAKES = st.builds(
    Fake,
    most=st.sampled_from([1, 2, 6]),
    context=st.sampled_from([0, 0, 50]),
    first=st.integers(0, 4),
    each=st.integers(0, 3),
    resumes=st.sampled_from([True] * 5 + [False]),
    attached=st.sampled_from([False, False, True]),
    script=st.lists(st.sampled_from(ANSWERS * 8 + BREAKS * 3 + FAULTS), min_size=1, max_size=5).map(
        tuple
    ),
)
CHANGES = st.builds(
    Change,
    at=st.integers(0, 24),
    what=st.sampled_from(
        ["gone", "again", "drain", "elsewhere", "expected", "unexpected", "tune", "tune"]
        + ["vacate"] * 4
    ),
    replica=st.integers(0, 3),
    steps=st.integers(0, 6),
)
POLICIES = st.builds(
    DispatchPolicy,
    max_queued=st.sampled_from([100, 100, 3, 1, 0]),
    max_attempts=st.sampled_from([3, 3, 2, 1]),
    max_moves=st.sampled_from([3, 3, 1, 0]),
    request_timeout_s=st.sampled_from([600.0, 600.0, 10.0, 1.3]),
    no_replica_wait_s=st.sampled_from([0.7, 30.0]),
    overflow_s=st.sampled_from([0.1, 2.0]),
    drain_limit_s=st.none() | st.just(0.6),
    overload=st.builds(
        OverloadPolicy,
        ttft_s=st.sampled_from([None, None, 2.0, 0.5]),
        shed_after_s=st.sampled_from([None, None, None, 1.7, 0.3]),
    ),
    processes=st.integers(1, 2),
    learns_speed=st.booleans(),
)


@given(
    st.builds(
        Scenario,
        fakes=st.lists(FAKES, min_size=1, max_size=4).map(tuple),
        asks=st.lists(ASKS, min_size=1, max_size=16).map(tuple),
        changes=st.lists(CHANGES, max_size=5).map(tuple),
        policy=POLICIES,
        together=st.booleans(),
        reading=st.integers(0, 2),
    )
)
def test_whatever_happens_all_that_must_hold_holds(scenario: Scenario) -> None:
    World(scenario).play()


WORKING = st.builds(Fake, most=st.integers(1, 3), first=st.integers(0, 4), each=st.integers(0, 3))


@given(
    st.builds(
        Scenario,
        fakes=st.lists(WORKING, min_size=1, max_size=3).map(tuple),
        asks=st.lists(ASKS.map(lambda ask: replace(ask, leaves=None)), min_size=1, max_size=12).map(
            tuple
        ),
        changes=st.lists(
            CHANGES.map(lambda change: replace(change, what="elsewhere", steps=change.steps % 2)),
            max_size=3,
        ).map(lambda changes: (*changes, Change(at=99, what="elsewhere"))),
        policy=st.just(DispatchPolicy()),
        together=st.booleans(),
    )
)
def test_a_fleet_that_works_answers_every_request(scenario: Scenario) -> None:
    world = World(scenario).play()
    for client in world.clients.values():
        assert client.records[0].status is FinishStatus.COMPLETED
        assert client.sends == 1


# -- stories ----------------------------------------------------------------------------------


def test_a_failure_tells_the_story_of_its_request() -> None:
    driver = Driver(replica_of("r0"), replica_of("r1"))
    driver.ask(0.0, 1, 2)
    driver.at(1.0, on.Refused(number=1, status=500, reason="an error"))
    # Break the machine: the request's slot is freed behind its back.
    phase = driver.machine.requests[1].phase
    assert isinstance(phase, Placed)
    assert phase.booking.entry is not None
    phase.booking.entry.close(1.0, done=False)
    with pytest.raises(InvariantError) as caught:
        driver.at(2.0, on.Streams(1))
    lines = str(caught.value).splitlines()
    assert lines[0] == "a request at a replica has no booked slot"
    assert lines[1].startswith("after (Streams(number=1")
    assert lines[2].startswith("request 1: Streaming(")
    story = [" ".join(line.partition("(")[0].split()) for line in lines[3:]]
    assert story == [
        "event Arrived",
        "command Send",
        "event Refused",
        "command Retry",
        "command Send",
        "event Streams",
        "command Forward",
    ]
    assert "an error" in lines[5]


def test_each_fault_of_the_books_and_of_the_queue_is_found() -> None:
    driver = Driver(replica_of("r0", Fake(most=1)))
    driver.ask(0.0, 1, 2)
    machine = driver.machine
    assert faults(machine, 100) == []
    # More may not wait.
    assert [fault for _, fault in faults(machine, 0)] == ["1 requests wait, more than 0"]
    # A slot that no request has.
    other = arrival(3).request
    assert other is not None  # it is no auxiliary call
    entry = machine.fleet.ledger.admit("r0", other, 0.0)
    found = [fault for _, fault in faults(machine)]
    assert found == [
        "2 slots of r0 are booked, 1 used",
        "the work booked at r0 differs from that of its requests",
    ]
    entry.close(0.0, done=False)
    # A request that waits though it is not in the queue; one that is at a replica and in the queue.
    machine.waiting.discard(machine.requests[2])
    machine.waiting.push(machine.requests[1])
    assert [number for number, _ in faults(machine)] == [1, 2]
    machine.waiting.discard(machine.requests[1])
    machine.waiting.push(machine.requests[2])
    # One that has ended is kept.
    machine.requests[2].phase = Ended(FinishStatus.FAILED)
    assert (2, "an ended request is still open") in faults(machine)
    # An unknown request waits.
    state = machine.requests.pop(2)
    assert (2, "an unknown request is in the queue") in faults(machine)
    assert driver.witness.story(2).startswith("request 2: unknown\nevent   Arrived(")
    machine.requests[2] = state
