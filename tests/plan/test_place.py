"""Placement: never twice, never across nodes, never moving what may stay."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    LengthClass,
    OServeError,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)
from oserve.plan import place
from oserve.plan.packing import Packing
from oserve.plan.place import place_replicas
from oserve.plan.shard import Shard, shards_of
from plan.instances import Kind, devices_of, plan_of

SHAPES = (
    ReplicaShape(device_kind="a"),
    ReplicaShape(tensor_parallel_size=2, device_kind="a"),
    ReplicaShape(tensor_parallel_size=2, device_kind="a", precision=Precision.FP8),
    ReplicaShape(tensor_parallel_size=4, device_kind="a"),
    ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2, device_kind="a"),
    ReplicaShape(pipeline_parallel_size=3, device_kind="a"),
    ReplicaShape(tensor_parallel_size=3, device_kind="b"),
    ReplicaShape(tensor_parallel_size=2, device_kind="b"),
)

Wanted = list[tuple[ReplicaShape, int]]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[tuple[Device, ...], random.Random]:
    nodes = st.lists(st.integers(1, 8), min_size=1, max_size=3)
    kinds = tuple(Kind(name=name, nodes=tuple(draw(nodes)), speed=1.0) for name in ("a", "b"))
    return devices_of(kinds), random.Random(draw(st.integers(0, 10**6)))


def some_wanted(devices: tuple[Device, ...], rng: random.Random) -> Wanted:
    """Random counts that fit, often filling the cluster."""
    packing = Packing(devices, SHAPES)
    counts = [0] * len(SHAPES)
    for _ in range(rng.randint(1, 20)):
        index = rng.randrange(len(SHAPES))
        counts[index] += 1
        if not packing.fits(counts):
            counts[index] -= 1
    return list(zip(SHAPES, counts, strict=True))


def check(replicas: tuple[ReplicaSpec, ...], wanted: Wanted, devices: tuple[Device, ...]) -> None:
    by_id = {device.id: device for device in devices}
    used = [device for spec in replicas for device in spec.devices]
    assert len(used) == len(set(used))
    assert len({spec.id for spec in replicas}) == len(replicas)
    assert Counter(spec.shape for spec in replicas) == +Counter(dict(wanted))
    for spec in replicas:
        assert len(spec.devices) == spec.shape.device_count
        width = spec.shape.tensor_parallel_size
        for start in range(0, len(spec.devices), width):
            group = [by_id[device] for device in spec.devices[start : start + width]]
            assert {device.kind for device in group} == {spec.shape.device_kind}
            assert len({device.node for device in group}) == 1


@settings(derandomize=True, deadline=None, max_examples=80)
@given(clusters())
def test_a_placement_holds_what_is_wanted(case: tuple[tuple[Device, ...], random.Random]) -> None:
    devices, rng = case
    wanted = some_wanted(devices, rng)
    first = place_replicas(wanted, devices)
    check(first.replicas, wanted, devices)
    assert first.moved_fraction == pytest.approx(len(first.replicas))
    if not first.replicas:
        return
    # The same again stays as it is.
    again = place_replicas(wanted, devices, current=plan_of(*first.replicas))
    assert set(again.replicas) == set(first.replicas)
    assert again.moved_fraction == 0.0
    # And something else is placed as rightly, with ids that tell the changed from the kept.
    other = some_wanted(devices, rng)
    second = place_replicas(other, devices, current=plan_of(*first.replicas))
    check(second.replicas, other, devices)
    before = {spec.id: spec for spec in first.replicas}
    for spec in second.replicas:
        assert before.get(spec.id, spec) == spec
    new = sum(spec not in first.replicas for spec in second.replicas)
    assert 0.0 <= second.moved_fraction <= new + 1e-9


def on(*devices: str, tp: int = 1, pp: int = 1, name: str = "r0") -> ReplicaSpec:
    shape = ReplicaShape(tensor_parallel_size=tp, pipeline_parallel_size=pp, device_kind="a")
    return ReplicaSpec(id=name, shape=shape, devices=devices)


def test_halves_become_a_whole_where_half_of_it_is() -> None:
    devices = devices_of((Kind(name="a", nodes=(2,), speed=1.0),))
    current = plan_of(on("a0.1", "a0.0", tp=2))
    # One half is there, the other must come.
    found = place_replicas([(ReplicaShape(device_kind="a"), 1)], devices, current=current)
    assert found.replicas[0].devices[0] in {"a0.0", "a0.1"}
    assert found.moved_fraction == pytest.approx(0.5)
    assert found.replicas[0].id == "r1"


def test_new_replicas_start_beside_old_ones_where_devices_are_vacant() -> None:
    devices = devices_of((Kind(name="a", nodes=(4, 8), speed=1.0),))
    current = plan_of(on("a0.2", "a0.1", tp=2), on("a1.0", "a1.1", tp=2, name="r1"))
    occupied = {"a0.2", "a0.1", "a1.0", "a1.1"}
    single, wide = on("x").shape, on("x", tp=4).shape
    few = place_replicas([(single, 2), (wide, 1)], devices, current=current)
    assert not occupied & {device for spec in few.replicas for device in spec.devices}
    # As many as must take occupied devices do, and bring fewest weights.
    many = place_replicas([(wide, 3)], devices, current=current)
    apart = [spec for spec in many.replicas if not occupied & set(spec.devices)]
    assert len(apart) == 1


def test_ranks_go_where_their_part_of_the_weights_is() -> None:
    devices = devices_of((Kind(name="a", nodes=(4,), speed=1.0),))
    current = plan_of(on("a0.3", "a0.1", tp=2), on("a0.0", "a0.2", tp=2, name="r1"))
    wide = ReplicaShape(tensor_parallel_size=4, device_kind="a")
    found = place_replicas([(wide, 1)], devices, current=current)
    assert set(found.replicas[0].devices[:2]) == {"a0.3", "a0.0"}
    assert set(found.replicas[0].devices[2:]) == {"a0.1", "a0.2"}
    assert found.moved_fraction == 0.0


def test_stages_keep_to_one_node_where_they_can() -> None:
    devices = devices_of((Kind(name="a", nodes=(3, 4), speed=1.0),))
    deep = ReplicaShape(tensor_parallel_size=2, pipeline_parallel_size=2, device_kind="a")
    found = place_replicas([(deep, 1)], devices)
    assert {name[:2] for name in found.replicas[0].devices} == {"a1"}
    apart = devices_of((Kind(name="a", nodes=(3, 3), speed=1.0),))
    across = place_replicas([(deep, 1)], apart).replicas[0].devices
    assert {name[:2] for name in across[:2]} != {name[:2] for name in across[2:]}


def test_the_fewest_replicas_give_way_to_what_must_fit() -> None:
    devices = devices_of((Kind(name="a", nodes=(2, 2), speed=1.0),))
    current = plan_of(on("a0.0"), on("a1.0", name="r1"))
    pair = ReplicaShape(tensor_parallel_size=2, device_kind="a")
    found = place_replicas([(on("x").shape, 2), (pair, 1)], devices, current=current)
    stayed = [spec for spec in found.replicas if spec.id in {"r0", "r1"}]
    assert len(stayed) == 1
    assert found.moved_fraction > 0


def test_the_surplus_that_goes_frees_whole_nodes() -> None:
    devices = devices_of((Kind(name="a", nodes=(2, 2), speed=1.0),))
    current = plan_of(
        on("a0.0"), on("a1.0", name="r1"), on("a0.1", name="r2"), on("a1.1", name="r3")
    )
    pair = ReplicaShape(tensor_parallel_size=2, device_kind="a")
    found = place_replicas([(on("x").shape, 2), (pair, 1)], devices, current=current)
    stayed = {spec.id for spec in found.replicas} & {"r0", "r1", "r2", "r3"}
    assert stayed in ({"r0", "r2"}, {"r1", "r3"})


def test_a_kept_replica_keeps_its_engine_arguments_and_new_ones_get_theirs() -> None:
    devices = devices_of((Kind(name="a", nodes=(2,), speed=1.0),))
    old = replace(on("a0.1"), backend=VllmBackend(engine_args=("--x",)))
    attached = ReplicaSpec(
        id="far", shape=old.shape, devices=(), backend=AttachedBackend(url="http://x")
    )
    found = place_replicas(
        [(old.shape, 2)],
        devices,
        current=plan_of(old, attached),
        backend=VllmBackend(engine_args=("--y",)),
    )
    assert old in found.replicas
    new = next(spec for spec in found.replicas if spec != old)
    assert new.backend == VllmBackend(engine_args=("--y",))
    assert new.id == "r1"


def test_replicas_on_devices_that_are_gone_are_not_kept() -> None:
    devices = devices_of((Kind(name="a", nodes=(1,), speed=1.0),))
    found = place_replicas([(on("x").shape, 1)], devices, current=plan_of(on("gone")))
    assert found.replicas[0].devices == ("a0.0",)
    assert found.moved_fraction == 1.0


def test_what_does_not_fit_is_an_error() -> None:
    devices = devices_of((Kind(name="a", nodes=(1,), speed=1.0),))
    with pytest.raises(OServeError, match="do not fit"):
        place_replicas([(on("x").shape, 2)], devices)


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES))
def test_the_shards_of_a_replica_cover_the_model_once(
    one: ReplicaShape, other: ReplicaShape
) -> None:
    assert sum(shard.share for shard in shards_of(one)) == pytest.approx(1.0)
    common = sum(a.overlap(b) for a in shards_of(one) for b in shards_of(other))
    assert common == pytest.approx(1.0 if one.precision is other.precision else 0.0)
    first: Shard = shards_of(one)[0]
    assert first.overlap(first) == first.share


def test_a_large_cluster_is_placed_with_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small replicas all over must make way for wide ones: too many choices to try them all."""
    devices = tuple(
        Device(id=f"n{node}/{slot}", kind="gpu", node=f"n{node}")
        for node in range(112)
        for slot in range(8)
    )
    narrow, wide = (ReplicaShape(tensor_parallel_size=width, device_kind="gpu") for width in (1, 8))
    current = DeploymentPlan(
        id="now",
        replicas=tuple(
            ReplicaSpec(id=f"s{n}", shape=narrow, devices=(device.id,))
            for n, device in enumerate(devices)
            if n % 8 < 5
        ),
        length_classes=(LengthClass(name="all"),),
        routing_shares={},
    )
    asked = 0
    answer = place._Board.holds

    def counted(board: place._Board, left: Counter[ReplicaShape]) -> bool:
        nonlocal asked
        asked += 1
        return answer(board, left)

    monkeypatch.setattr(place._Board, "holds", counted)
    monkeypatch.setattr(place, "_MOST_WORK", 20_000)
    found = place.place_replicas([(narrow, 480), (wide, 52)], devices, current=current).replicas
    assert asked < 2 * len(current.replicas)
    assert Counter(spec.shape for spec in found) == {narrow: 480, wide: 52}
    taken = [device for spec in found for device in spec.devices]
    assert sorted(taken) == sorted(device.id for device in devices)
    # Of the 60 nodes that stay with small replicas each keeps its own five.
    assert len({*found} & {*current.replicas}) >= 280
