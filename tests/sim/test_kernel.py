"""The kernel against the reference: every moment of every request, to the picosecond."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oserve.sim.compiled import HAS_NUMBA
from sim.scenario import (
    Scenario,
    run_fleet,
    run_reference,
    scenarios,
    told_by_fleet,
    told_by_reference,
)

END = 2_000_000
KINDS = {
    "one replica": scenarios(),
    "pipeline": scenarios(stages=True),
    "sessions": scenarios(replicas=2, sessions=True),
    "gateway": scenarios(replicas=3, gateway=True),
    "roles": scenarios(replicas=3, roles=True),
    "operations": scenarios(replicas=3, operations=True),
    "everything": scenarios(
        replicas=3, roles=True, stages=True, sessions=True, gateway=True, operations=True
    ),
}


def check(scenario: Scenario, end: int, *, compiled: bool, watch: bool = False) -> None:
    told = told_by_reference(run_reference(scenario, end))
    assert told_by_fleet(run_fleet(scenario, end, compiled=compiled, watch=watch)) == told


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_skipping_changes_nothing(kind: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(KINDS[kind], st.sampled_from([END, 1500]), st.booleans())
    def equal(scenario: Scenario, end: int, watch: bool) -> None:
        check(scenario, end, compiled=False, watch=watch)

    equal()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(KINDS["everything"], st.booleans())
def test_compiled_is_the_same(scenario: Scenario, watch: bool) -> None:
    check(scenario, END, compiled=True, watch=watch)
