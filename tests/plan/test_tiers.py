"""Demand and capacities by tier."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import Device, OServeError, Precision, ReplicaShape, Tier, WorkloadType
from oserve.perf import ShapePerformance
from oserve.perf.capacity import LatencyLimits
from oserve.plan.demand import demand_from_rates
from oserve.plan.problem import PlanProblem
from oserve.plan.search import DeploymentCandidate, plan_deployment
from oserve.plan.tier_pools import pooled
from oserve.plan.tier_table import tier_table
from oserve.plan.tiers import demand_by_tier, tier_indices, tier_limits, with_tiers
from oserve.plan.verify import climb
from oserve.traces import TraceRequest

TIGHT = Tier(name="tight", tpot_s=0.02, precisions=(Precision.BF16,))
BULK = Tier(name="bulk")
TIERS = (TIGHT, BULK)


def requests(count: int, *, bulk_code: bool = True) -> list[TraceRequest]:
    """Short chats and long documents; every third request is bulk, which has documents only."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        bulk = number % 3 == 0
        document = bulk and bulk_code
        made.append(
            TraceRequest(
                arrival_s=float(number),
                prompt_tokens=int(draw.normal(3000 if document else 200, 20)),
                output_tokens=int(draw.normal(20 if document else 300, 2)),
                tier="bulk" if bulk else "",
            )
        )
    return made


def test_types_are_length_clusters_by_tier_and_rates_add_up() -> None:
    demand = demand_by_tier(requests(300), TIERS, "tight", source="t", max_model_len=8192)
    assert demand.tiers == ("tight", "bulk")
    assert {kind.tier: kind.name.split(": ")[0] for kind in demand.types} == {
        "tight": "tight",
        "bulk": "bulk",
    }
    plain = demand_by_tier(requests(300), (), "", source="t", max_model_len=8192)
    assert demand.rate_rps == pytest.approx(plain.rate_rps)
    by_tier = {tier.name: 0.0 for tier in TIERS}
    for kind in demand.types:
        by_tier[kind.tier] += kind.arrival_rate_rps
    assert by_tier["bulk"] == pytest.approx(plain.rate_rps / 3)
    for mix in demand.class_mix.values():
        assert sum(mix.values()) == pytest.approx(1.0)
    # Documents are bulk only: no tight type of them.
    assert sum(kind.tier == "tight" for kind in demand.types) == 1


def test_few_requests_of_a_tier_count_with_the_nearest_cluster() -> None:
    made = requests(300)
    made[1] = replace(made[1], prompt_tokens=3000, output_tokens=20)
    demand = demand_by_tier(made, TIERS, "tight", source="t", max_model_len=8192)
    assert [kind.tier for kind in demand.types].count("tight") == 1


def test_a_tier_without_requests_has_a_type_without_traffic() -> None:
    empty = Tier(name="empty")
    demand = demand_by_tier(requests(30), (*TIERS, empty), "tight", source="t", max_model_len=8192)
    own = [kind for kind in demand.types if kind.tier == "empty"]
    assert [kind.arrival_rate_rps for kind in own] == [0.0]


def test_a_tier_that_is_not_there_is_named_with_its_place() -> None:
    with pytest.raises(OServeError, match="'gold'"):
        tier_indices([replace(requests(1)[0], tier="gold")], TIERS, "tight", source="t")
    rates = [
        WorkloadType(name="x", prompt_tokens=1, output_tokens=1, arrival_rate_rps=1.0, tier="gold")
    ]
    with pytest.raises(OServeError, match="'gold'"):
        with_tiers(demand_from_rates(rates, source="r", max_model_len=100), TIERS, "tight")


def test_limits_are_those_of_the_tier() -> None:
    demand = demand_by_tier(requests(30), TIERS, "tight", source="t", max_model_len=8192)
    limits = tier_limits(demand, TIERS, LatencyLimits(ttft_s=9.0))
    for kind in demand.types:
        assert limits[kind.name].tpot_s == (0.02 if kind.tier == "tight" else None)
        assert limits[kind.name].ttft_s is None


def row(seqs: int, capacity: tuple[float, ...], tpot_s: tuple[float, ...]) -> ShapePerformance:
    return ShapePerformance(
        shape=ReplicaShape(max_num_seqs=seqs),
        capacity_rps=capacity,
        latency_s=tuple(1.0 for _ in capacity),
        tpot_s=tpot_s,
    )


LIMITS = {"tight": LatencyLimits(tpot_s=0.02), "bulk": LatencyLimits()}


def made(limits: dict[str, LatencyLimits]) -> tuple[ShapePerformance, ...]:
    """A small batch is always quick, a large one only at a low rate."""
    large = [2.0 if limits[name].tpot_s else 8.0 for name in LIMITS]
    return (
        row(16, (3.0, 3.0), (0.015, 0.015)),
        row(256, tuple(large), (0.02, 0.09) if limits["tight"].tpot_s else (0.08, 0.09)),
    )


def test_what_shares_a_batch_with_a_tight_tier_counts_within_its_limit() -> None:
    small, large = tier_table(list(LIMITS), LIMITS, made)  # type: ignore[arg-type]
    assert small.capacity_rps == (3.0, 3.0)
    # Its batch of bulk would break the tight limit.
    assert large.capacity_rps == (0.0, 8.0)


def test_a_tier_that_only_unsafe_shapes_serve_keeps_them() -> None:
    def only_large(limits: dict[str, LatencyLimits]) -> tuple[ShapePerformance, ...]:
        return made(limits)[1:]

    (large,) = tier_table(list(LIMITS), LIMITS, only_large)  # type: ignore[arg-type]
    assert large.capacity_rps == (2.0, 8.0)


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(0, 3))
def test_all_requests_are_counted_whatever_their_tiers(count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    made = [replace(item, tier=str(draw.choice(["tight", "bulk", ""]))) for item in requests(count)]
    demand = demand_by_tier(made, TIERS, "bulk", source="t", max_model_len=8192)
    plain = demand_by_tier(made, (), "", source="t", max_model_len=8192)
    assert demand.rate_rps == pytest.approx(plain.rate_rps)
    assert {kind.tier for kind in demand.types} == {"tight", "bulk"}


def two_tiers(devices: int = 8) -> PlanProblem:
    """Small replicas serve bulk work alone, large ones both; the best mix is one of two shapes."""
    kinds = (
        WorkloadType(
            name="tight: a",
            prompt_tokens=100.0,
            output_tokens=100.0,
            arrival_rate_rps=2.0,
            tier="tight",
        ),
        WorkloadType(
            name="bulk: a",
            prompt_tokens=100.0,
            output_tokens=100.0,
            arrival_rate_rps=4.0,
            tier="bulk",
        ),
    )
    rows = [(1, (0.0, 3.0)), (2, (1.0, 4.0)), (4, (5.0, 6.0))]
    return PlanProblem(
        devices=tuple(Device(id=f"d{n}", node="n", kind="any") for n in range(devices)),
        types=kinds,
        options=tuple(
            ShapePerformance(
                shape=ReplicaShape(tensor_parallel_size=size),
                capacity_rps=capacity,
                latency_s=(1.0, 1.0),
                ttft_s=(0.1, 0.1),
                tpot_s=(0.01, 0.01),
                power_w=0.0,
            )
            for size, capacity in rows
        ),
    )


def test_one_shape_for_each_part_of_the_tiers_is_a_candidate() -> None:
    problem = two_tiers()
    found = pooled(problem, 3)
    assert found[0] == (4, 0, 1)
    assert len(found) == len(set(found)) == 3
    for counts in found:
        assert problem.packing.fits(counts)
        assert sum(1 for count in counts if count) == 2
    planned = plan_deployment(problem, candidates=6)
    known = {planned.best.counts, *(item.counts for item in planned.candidates)}
    assert set(found) <= known
    one_tier = replace(problem, types=tuple(replace(kind, tier="") for kind in problem.types))
    assert pooled(one_tier, 3) == []


def test_climbing_finds_what_another_score_likes_better() -> None:
    problem = two_tiers()
    planned = plan_deployment(problem, candidates=2)
    asked: list[tuple[int, ...]] = []

    def score(item: DeploymentCandidate) -> float:
        asked.append(item.counts)
        # The fewer replicas the better.
        return -float(sum(item.counts))

    start = planned.best
    found = climb(problem, start, score(start), score, known={start.counts}, most=12)
    assert 0 < len(found) == len(asked) - 1 <= 12
    assert start.counts not in {item.deployment.counts for item in found}
    assert max(item.scale for item in found) > -sum(start.counts)
    assert climb(problem, start, 0.0, score, most=0) == []
