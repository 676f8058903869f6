"""Fair shares in the simulator: the bound between tenants that wait, weights, lone tenants."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oserve.core import ReplicaShape
from oserve.perf import TokenCosts
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.steps import StepTables
from oserve.sim.types import FairShares, GatewayOptions, RequestTable, Status

PREFILL_S, DECODE_S = 0.001, 0.004
SEQS, BUDGET = 4, 64
_TINY_S = 1e-9


def fleet_of(
    requests: RequestTable,
    fair: FairShares | None,
    *,
    replicas: int = 1,
    max_queued: int = 1000,
) -> SimulatedFleet:
    tokens, seqs = np.arange(BUDGET + 1), np.arange(SEQS + 1)
    steps = StepTables(
        prompts=(5 + tokens) * 10**9 * (tokens > 0),
        joint=seqs * 10**9,
        decodes=(10 + seqs) * 10**9 * (seqs > 0),
        kv_rate=0,
        pair_rate=0,
    )
    options = GatewayOptions(fair=fair, max_queued=max_queued)
    fleet = SimulatedFleet(requests, gateway=options, compiled=False)
    for number in range(replicas):
        fleet.add_replica(
            f"r{number}",
            ReplicaShape(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET),
            steps,
            kv_tokens=4096,
            costs=TokenCosts(prefill_s_per_token=PREFILL_S, decode_s_per_token=DECODE_S),
            ordered=True,
        )
    fleet.set_routing()
    return fleet


def work_s(requests: RequestTable) -> np.ndarray:
    return requests.prompt_tokens * PREFILL_S + requests.output_tokens * DECODE_S


def table(rows: list[tuple[float, int, int, int]]) -> RequestTable:
    """Of (arrival, prompt, output, tenant); the outputs are known."""
    arrival, prompt, output, tenant = (list(column) for column in zip(*sorted(rows), strict=True))
    return RequestTable.of(
        arrival, prompt, output, expected_output_tokens=output, tenant=np.array(tenant)
    )


tenants = st.tuples(
    st.integers(5, 60), st.integers(1, 40), st.integers(6, 14), st.sampled_from([0.5, 1.0, 2.0])
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(tenants, min_size=2, max_size=3), st.sampled_from([0.0, 0.25]), st.integers(1, 2))
def test_tenants_that_wait_differ_by_at_most_twice_the_largest_request(
    kinds: list[tuple[int, int, int, float]], reserve: float, replicas: int
) -> None:
    """Between any two moments until one of them no longer waits, long against short requests."""
    rows = [
        (0.001 * number, prompt, output, tenant)
        for tenant, (prompt, output, count, _) in enumerate(kinds)
        for number in range(count)
    ]
    requests = table(rows)
    weights = np.array([weight for *_, weight in kinds])
    fair = FairShares(weights=tuple(weights.tolist()), reserve=reserve)
    fleet = fleet_of(requests, fair, replicas=replicas)
    tenant = requests.tenant
    assert tenant is not None
    largest_s = (work_s(requests) / weights[tenant]).max()
    since: dict[tuple[int, int], float] = {}
    for step in range(1, 4000):
        fleet.advance(0.02 + 0.005 * step)
        results = fleet.results()
        service_s = results.charged_s / weights
        waits = {int(own) for own in tenant[results.status == Status.QUEUED]}
        if len(waits) < 2:
            return
        for one in waits:
            for other in waits - {one}:
                gap_s = service_s[one] - service_s[other]
                first_s = since.setdefault((one, other), gap_s)
                assert abs(gap_s - first_s) <= 2 * largest_s + _TINY_S
    raise AssertionError("they wait for ever")


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60), st.integers(1, 30)), min_size=1))
@settings(max_examples=20, deadline=None)
def test_a_lone_tenant_has_what_all_have_without_shares(rows: list[tuple[int, int, int]]) -> None:
    requests = table([(0.01 * at, prompt, output, 0) for at, prompt, output in rows])
    alone, plain = (
        fleet_of(requests, fair) for fair in (FairShares(weights=(1.0,), reserve=0.25), None)
    )
    for fleet in (alone, plain):
        fleet.run()
    found, expected = alone.results(), plain.results()
    assert (found.dispatch_s == expected.dispatch_s).all()
    assert abs(found.charged_s[0] - work_s(requests).sum()) < 1e-6
    if len(set(requests.prompt_tokens)) == len(set(requests.output_tokens)) == 1:
        assert (found.finish_s == expected.finish_s).all()


def test_a_late_comer_goes_before_the_queue_of_a_flood() -> None:
    rows = [(0.0, 1, 1, 1)] + [(0.0, 30, 20, 0)] * 40 + [(1.0, 30, 20, 1)]
    requests = table(rows)
    fair, unfair = (
        fleet_of(requests, shares)
        for shares in (FairShares(weights=(1.0, 1.0), reserve=0.25), None)
    )
    waited = []
    for fleet in (fair, unfair):
        fleet.run()
        results = fleet.results()
        waited.append(float(results.first_token_s[-1] - results.arrival_s[-1]))
    assert waited[0] < 0.5
    assert waited[1] > 2.0


def test_a_full_queue_refuses_the_tenant_with_the_most() -> None:
    rows = [(0.0, 30, 40, 0)] * 16 + [(0.1, 30, 40, 1)]
    shares = FairShares(weights=(1.0, 1.0), reserve=0.0)
    for fair, refused in ((shares, 15), (None, 16)):
        fleet = fleet_of(table(rows), fair, max_queued=8)
        fleet.advance(0.1)
        assert fleet.results().status[refused] == Status.REFUSED
        assert fleet.results().status[31 - refused] != Status.REFUSED
