"""Spread: the loss of a node leaves every type a replica, where that costs no more than is said."""

import random
from collections.abc import Set
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import Device, ReplicaShape, ReplicaSpec, WorkloadType
from oserve.perf import ShapePerformance
from oserve.plan.place import place_replicas
from oserve.plan.problem import PlanProblem
from oserve.plan.redundancy import place_redundantly
from oserve.plan.search import Search, plan_deployment
from oserve.plan.spread import exposed_types, runs_as_parts, spread_out
from plan.instances import Kind, devices_of, random_problem

SMALL = ReplicaShape(device_kind="a")
WIDE = ReplicaShape(tensor_parallel_size=2, device_kind="a")
DEEP = ReplicaShape(pipeline_parallel_size=2, device_kind="a")
SHAPES = (SMALL, WIDE, DEEP)


def nodes_of(*sizes: int) -> tuple[Device, ...]:
    return devices_of((Kind(name="a", nodes=sizes, speed=1.0),))


def by_shape(shape: ReplicaShape) -> Set[str]:
    """Two types, one of which only wide replicas serve."""
    return {"short", "long"} if shape == WIDE else {"short"}


def lost_with(
    node: str, replicas: tuple[ReplicaSpec, ...], devices: tuple[Device, ...]
) -> set[str]:
    """What is served now and by nobody left, plainly."""
    home = {device.id: device.node for device in devices}
    left = [spec for spec in replicas if all(home[name] != node for name in spec.devices)]

    def served(some: list[ReplicaSpec]) -> set[str]:
        return {kind for spec in some for kind in by_shape(spec.shape)}

    return served(list(replicas)) - served(left)


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[ReplicaSpec, ...], tuple[Device, ...]]:
    """Replicas anywhere on two or three nodes."""
    devices = nodes_of(*draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    free = [device.id for device in devices]
    random.Random(draw(st.integers(0, 10**6))).shuffle(free)
    home = {device.id: device.node for device in devices}
    replicas: list[ReplicaSpec] = []
    for shape in draw(st.lists(st.sampled_from(SHAPES), max_size=5)):
        for first in free:
            near = [name for name in free if home[name] == home[first]]
            chosen = near if shape == WIDE else free
            if len(chosen) >= shape.device_count:
                own = tuple(chosen[: shape.device_count])
                free = [name for name in free if name not in own]
                replicas.append(ReplicaSpec(id=f"r{len(replicas)}", shape=shape, devices=own))
                break
    return tuple(replicas), devices


@given(placed())
def test_exposed_is_what_the_loss_of_a_node_takes(
    case: tuple[tuple[ReplicaSpec, ...], tuple[Device, ...]],
) -> None:
    replicas, devices = case
    exposed = exposed_types(replicas, devices, by_shape)
    nodes = {device.node for device in devices}
    if len(nodes) < 2:
        assert exposed == {}
        return
    for node in nodes:
        assert exposed.get(node, frozenset()) == lost_with(node, replicas, devices)


@given(placed(), st.sets(st.sampled_from(["r0", "r1", "r2", "r3", "r4"])))
def test_spreading_exposes_no_more_and_moves_only_what_may_move(
    case: tuple[tuple[ReplicaSpec, ...], tuple[Device, ...]], movable: set[str]
) -> None:
    replicas, devices = case
    after = spread_out(replicas, movable, devices, by_shape)

    def pairs(some: tuple[ReplicaSpec, ...]) -> int:
        return sum(map(len, exposed_types(some, devices, by_shape).values()))

    assert pairs(after) <= pairs(replicas)
    used = [name for spec in after for name in spec.devices]
    assert len(used) == len(set(used))
    home = {device.id: device.node for device in devices}
    for before, now in zip(replicas, after, strict=True):
        assert replace(now, devices=before.devices) == before
        assert now == before or before.id in movable
        if now.shape == WIDE:
            assert len({home[name] for name in now.devices}) == 1


def test_two_replicas_go_to_two_nodes_and_moving_costs_are_told() -> None:
    found = place_replicas([(SMALL, 2)], nodes_of(4, 4))
    assert {name[:2] for spec in found.replicas for name in spec.devices} == {"a0", "a1"}
    assert found.moved_fraction == pytest.approx(2.0)


def test_a_type_with_few_replicas_changes_places_with_another() -> None:
    """All devices are taken, so the second wide replica must change places with small ones."""
    devices = nodes_of(2, 2)
    replicas = (
        ReplicaSpec(id="r0", shape=DEEP, devices=("a0.0", "a0.1")),
        ReplicaSpec(id="r1", shape=replace(DEEP, max_num_seqs=7), devices=("a1.0", "a1.1")),
    )
    assert spread_out(replicas, {"r0", "r1"}, devices, by_shape) == replicas
    four = nodes_of(4, 4)
    wide = [
        ReplicaSpec(id=f"w{i}", shape=WIDE, devices=(f"a0.{2 * i}", f"a0.{2 * i + 1}"))
        for i in (0, 1)
    ]
    deep = [
        ReplicaSpec(id=f"d{i}", shape=DEEP, devices=(f"a1.{2 * i}", f"a1.{2 * i + 1}"))
        for i in (0, 1)
    ]
    after = spread_out((*wide, *deep), {"w1", "d0", "d1"}, four, by_shape)
    assert exposed_types(after, four, by_shape) == {}
    assert after[0] == wide[0]


@settings(derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 2),
    st.integers(2, 4),
)
def test_a_replica_larger_than_a_node_takes_equal_shares(
    sizes: list[int], width: int, stages: int
) -> None:
    """If some nodes have room for equal shares, the first replica is one that vLLM can run."""
    shape = ReplicaShape(tensor_parallel_size=width, pipeline_parallel_size=stages, device_kind="a")
    devices = nodes_of(*sizes)
    possible = any(
        sum(size >= stages // parts * width for size in sizes) >= parts
        for parts in range(1, stages + 1)
        if stages % parts == 0
    )
    if sum(size // width for size in sizes) < stages:
        return
    found = place_replicas([(shape, 1)], devices)
    assert runs_as_parts(found.replicas, devices) == possible


@settings(derandomize=True, max_examples=20)
@given(st.integers(0, 400), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_no_more_is_paid_than_allowed(seed: int, spread: float) -> None:
    problem = random_problem(seed, option_count=3)
    planned = plan_deployment(problem, candidates=2)
    choice = place_redundantly(problem, planned, planned.best, spread=spread, time_limit_s=5.0)
    known = {device.id for device in problem.devices}
    assert {name for spec in choice.placed.replicas for name in spec.devices} <= known
    plain = place_redundantly(problem, planned, planned.best, spread=0.0, time_limit_s=5.0)
    if runs_as_parts(choice.placed.replicas, problem.devices) and plain.price <= 1e-6:
        assert choice.price <= spread + 2e-6
        # More may be paid for fewer types exposed, and for nothing else.
        assert sum(map(len, choice.exposed.values())) <= sum(map(len, plain.exposed.values()))
        value = "scale" if planned.bounds_scale else "served_rps"
        best, got = (getattr(one.score, value) for one in (planned.best, choice.deployment))
        if problem.enough_scale is None or not planned.bounds_scale:
            assert got >= best * (1 - choice.price) * (1 - 1e-6)


@settings(derandomize=True, max_examples=20)
@given(st.integers(0, 400))
def test_two_replicas_of_each_type_are_the_best_such_deployment(seed: int) -> None:
    problem = replace(random_problem(seed, option_count=2), min_replicas=2)
    exact = plan_deployment(problem, candidates=0).best
    brute = plan_deployment(problem, Search.BRUTE, candidates=0).best
    assert problem.is_redundant(exact.counts) == problem.is_redundant(brute.counts)
    if problem.is_redundant(brute.counts):
        assert exact.score.served_rps == pytest.approx(brute.score.served_rps, rel=1e-5)


def test_survival_has_its_price() -> None:
    """One large replica carries more than two small ones on as many devices."""

    def row(shape: ReplicaShape, rps: float) -> ShapePerformance:
        return ShapePerformance(shape=shape, capacity_rps=(rps,), latency_s=(1.0,))

    four = ReplicaShape(pipeline_parallel_size=4, device_kind="a")
    kind = WorkloadType(name="t", prompt_tokens=9, output_tokens=9, arrival_rate_rps=1.0)
    problem = PlanProblem(
        devices=nodes_of(2, 2), types=(kind,), options=(row(four, 10.0), row(WIDE, 4.5))
    )
    planned = plan_deployment(problem)
    cheap, dear = (
        place_redundantly(problem, planned, planned.best, spread=spread, time_limit_s=5.0)
        for spread in (0.05, 0.1)
    )
    assert [spec.shape for spec in cheap.placed.replicas] == [four]
    assert set(cheap.exposed) == {"a0", "a1"}
    assert cheap.price == 0.0
    assert [spec.shape for spec in dear.placed.replicas] == [WIDE, WIDE]
    assert dear.exposed == {}
    assert dear.price == pytest.approx(0.1)
