"""The kernel against the live request machine and iteration-level engines, to the picosecond.

Of every request: which replica had it, when it was dispatched, had its first token and ended, how
it ended, and how often it was preempted and moved. Of every replica: what it owes.
"""

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
    "live": scenarios(replicas=4, gateway=True, operations=True, live=True),
    "tenants": scenarios(replicas=3, gateway=True, operations=True, live=True, tenants=True),
    "tiers": scenarios(replicas=3, gateway=True, operations=True, live=True, tiers=True),
    "tiers and tenants": scenarios(
        replicas=3, gateway=True, operations=True, live=True, tenants=True, tiers=True
    ),
    "everything": scenarios(
        replicas=3, roles=True, stages=True, sessions=True, gateway=True, operations=True
    ),
}
LIVE = ("live", "tenants", "tiers", "tiers and tenants")
ENDS = st.sampled_from([END, 1500, 4000])


def check(scenario: Scenario, end: int, *, compiled: bool, watch: bool = False) -> None:
    reference = run_reference(scenario, end)
    told = told_by_fleet(run_fleet(scenario, end, compiled=compiled, watch=watch))
    expected = told_by_reference(reference)
    if told == expected:
        return
    differing = [item for item in zip(told, expected, strict=True) if item[0] != item[1]]
    lines = [f"kernel  {ours}\nmachine {theirs}" for ours, theirs in differing]
    numbers = [ours[0] for ours, _ in differing if isinstance(ours, tuple)]
    if reference.witness is not None:
        lines += [reference.witness.story(item) for item in numbers[:2] if isinstance(item, int)]
    raise AssertionError("\n".join(lines))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(KINDS["live"], KINDS["tiers and tenants"]), ENDS)
def test_the_kernel_is_the_machine(scenario: Scenario, end: int) -> None:
    check(scenario, end, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_skipping_changes_nothing(kind: str) -> None:
    @settings(
        max_examples=300 if kind in LIVE else 60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind], ENDS, st.booleans())
    def equal(scenario: Scenario, end: int, watch: bool) -> None:
        check(scenario, end, compiled=False, watch=watch)

    equal()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(KINDS["everything"], KINDS["live"], KINDS["tiers and tenants"]), st.booleans())
def test_compiled_is_the_same(scenario: Scenario, watch: bool) -> None:
    check(scenario, END, compiled=True, watch=watch)
