"""The request machine in random worlds: whatever happens, what must hold holds after each event."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.core import FinishStatus

from .dispatch_world import ANSWERS, FAULTS, Ask, Change, Fake, Scenario, World

ASKS = st.builds(
    Ask,
    at=st.integers(0, 24),
    prompt=st.sampled_from([1, 10, 40, 200]),
    output=st.integers(1, 6),
    guess=st.none() | st.integers(1, 8),
    kind=st.sampled_from(["stream", "stream", "stream", "whole", "long", "auxiliary"]),
    movable=st.booleans(),
    hidden=st.sampled_from([False, False, False, True]),
    leaves=st.none() | st.integers(0, 12),
    session=st.sampled_from(["", "", "s"]),
)
FAKES = st.builds(
    Fake,
    most=st.integers(1, 3),
    context=st.sampled_from([0, 0, 50]),
    first=st.integers(0, 4),
    each=st.integers(0, 3),
    resumes=st.sampled_from([True, True, False]),
    attached=st.booleans(),
    script=st.lists(st.sampled_from(ANSWERS * 6 + FAULTS), min_size=1, max_size=5).map(tuple),
)
CHANGES = st.builds(
    Change,
    at=st.integers(0, 32),
    what=st.sampled_from(
        ["gone", "again", "again", "drain", "vacate", "elsewhere", "expected", "unexpected"]
    ),
    replica=st.integers(0, 2),
    steps=st.integers(0, 6),
)
POLICIES = st.builds(
    DispatchPolicy,
    max_queued=st.sampled_from([0, 1, 3, 100]),
    max_attempts=st.integers(1, 3),
    max_moves=st.integers(0, 3),
    request_timeout_s=st.sampled_from([1.3, 10.0, 600.0]),
    no_replica_wait_s=st.sampled_from([0.7, 30.0]),
    overflow_s=st.sampled_from([0.1, 2.0]),
    drain_limit_s=st.none() | st.just(0.6),
    overload=st.builds(
        OverloadPolicy,
        ttft_s=st.none() | st.sampled_from([0.5, 2.0]),
        shed_after_s=st.none() | st.sampled_from([0.3, 1.7]),
    ),
    processes=st.integers(1, 2),
    learns_speed=st.booleans(),
)


@given(
    st.builds(
        Scenario,
        fakes=st.lists(FAKES, min_size=1, max_size=3).map(tuple),
        asks=st.lists(ASKS, min_size=1, max_size=12).map(tuple),
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
