"""Tiers in simulations: who may go where, who is late, whose limits count."""

import numpy as np

from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import (
    DeploymentPlan,
    LengthClass,
    OverloadAction,
    PlannedType,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    Tier,
)
from oserve.evaluate.attainment import attainment, met, surely_failed, tier_attainment
from oserve.evaluate.tiers import (
    BARRED,
    late_after_s,
    tier_routing,
    tier_shifts_s,
    tier_slo,
)
from oserve.perf import TokenCosts
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables
from oserve.sim.types import RequestTable, Status

TIGHT = Tier(name="tight", ttft_s=1.0, tpot_s=0.02, precisions=(Precision.BF16,))
BULK = Tier(name="bulk", e2e_s=60.0)
TIERS = (TIGHT, BULK)


def spec(name: str, precision: Precision) -> ReplicaSpec:
    return ReplicaSpec(id=name, shape=ReplicaShape(precision=precision), devices=())


def plan(tight: dict[str, float], bulk: dict[str, float]) -> DeploymentPlan:
    return DeploymentPlan(
        id="p",
        replicas=(spec("a", Precision.BF16), spec("b", Precision.INT4), spec("c", Precision.BF16)),
        length_classes=(LengthClass(name="short", max_prompt_tokens=100), LengthClass(name="long")),
        routing_shares={},
        planned_types=tuple(
            PlannedType(name=name, prompt_tokens=50, output_tokens=10, shares=shares, tier=name)
            for name, shares in (("tight", tight), ("bulk", bulk))
        ),
    )


def test_each_tier_has_its_pool_and_no_replica_of_an_excluded_precision() -> None:
    routing = tier_routing(plan({"a": 1.0}, {"b": 0.5, "c": 0.5}), TIERS)
    assert routing.shares[0] == {"a": 1.0, "b": BARRED, "c": BARRED}
    assert routing.shares[2] == {"a": BARRED, "b": 0.5, "c": 0.5}
    # The classes of a tier without types of their own have those of all its types.
    assert routing.shares[1] == routing.shares[0]
    # A share that breaks the precision counts for nothing; the tier goes where it may.
    wrong = tier_routing(plan({"b": 1.0}, {"b": 1.0}), TIERS)
    assert wrong.shares[0] == {"a": 0.0, "b": BARRED, "c": 0.0}


def results(tier: list[int], ttft_s: list[float], e2e_s: list[float]) -> FleetResults:
    count = len(tier)
    zero = np.zeros(count, dtype=np.int64)
    return FleetResults(
        now_s=1000.0,
        arrival_s=np.zeros(count),
        dispatch_s=np.zeros(count),
        first_token_s=np.array(ttft_s),
        finish_s=np.array(e2e_s),
        replica=zero,
        status=np.full(count, int(Status.COMPLETED)),
        preemptions=zero,
        replays=zero,
        prompt_tokens=zero + 1,
        output_tokens=zero + 11,
        made_tokens=zero + 11,
        reused_tokens=zero,
        class_index=zero,
        tier=np.array(tier),
        replica_names=(),
        totals=(),
    )


def test_the_tier_that_keeps_least_decides() -> None:
    slo = tier_slo(TIERS)
    found = results([0, 0, 1, 1], [0.5, 0.5, 30.0, 30.0], [0.6, 9.0, 40.0, 50.0])
    assert met(found, slo).tolist() == [True, False, True, True]
    assert tier_attainment(found, slo) == [0.5, 1.0]
    assert attainment(found, slo) == 0.5
    assert surely_failed(found, slo)
    assert not surely_failed(results([1, 1], [1.0, 1.0], [2.0, 2.0]), slo)


def test_ranks_and_deadlines_are_those_of_the_live_gateway() -> None:
    tier = np.array([0, 1, 0])
    expected = np.array([10, 10, 500])
    first = Tier(name="first", ttft_s=1.0, overload=OverloadAction.FIRST)
    shifts = tier_shifts_s(OrderPolicy(max_penalty_s=60.0), (first, BULK), tier, expected)
    assert shifts.tolist() == [-60.0, 30.0, -60.0]
    late = late_after_s(OverloadPolicy(late_of_ttft=0.5), (TIGHT, BULK), tier, expected)
    assert late.tolist() == [0.5, 15.0, 0.5]
    assert np.isinf(late_after_s(OverloadPolicy(), (first, BULK), tier, expected)).tolist() == [
        True,
        False,
        True,
    ]


def test_a_barred_replica_gets_nothing_and_blocks_no_other_class() -> None:
    tables = StepTables(
        prompts=np.full(65, 10**10),
        joint=np.zeros(9, dtype=np.int64),
        decodes=np.full(9, 10**10),
        kv_rate=0,
        pair_rate=0,
    )
    requests = RequestTable.of(
        [0.0, 0.0, 0.0, 0.0], [16, 16, 16, 8], [50, 50, 50, 50], class_index=[0, 0, 0, 1]
    )
    fleet = SimulatedFleet(requests, classes=2, compiled=False)
    shape = ReplicaShape(max_num_batched_tokens=64, max_num_seqs=8)
    costs = TokenCosts(prefill_s_per_token=1e-3, decode_s_per_token=1e-3)
    for name in ("a", "b"):
        fleet.add_replica(name, shape, tables, kv_tokens=4096, costs=costs, max_inflight=1)
    fleet.set_routing(shares={0: {"a": 1.0, "b": BARRED}, 1: {"a": BARRED, "b": 1.0}})
    fleet.advance(0.001)
    now = fleet.results()
    # Class 0 waits for its one replica; class 1 passes it to its own.
    assert now.replica.tolist() == [0, -1, -1, 1]
    fleet.run()
    assert fleet.results().replica.tolist() == [0, 0, 0, 1]
