"""The request machine in random worlds: whatever happens, what must hold holds after each event."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.core import FinishStatus

from .dispatch_scenario import ANSWERS, BREAKS, FAULTS, Ask, Change, Fake, Scenario
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
        ["gone", "again", "drain", "elsewhere", "expected", "unexpected"] + ["vacate"] * 4
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
