"""Deployments for a ladder: each can be placed, and no devices are lost to a rule."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.config import load_cluster
from oserve.control.ladder import counted, device_count
from oserve.core import Device, ReplicaShape
from oserve.plan.mixtures import homogeneous, mixtures, smaller
from oserve.plan.packing import Packing
from oserve.plan.place import place_replicas

CLUSTERS = ("2xH100", "8xH100", "2x4xH100", "8xH100+4xL40S", "2x4xH100+2x2xL40S", "3xH100")
SIZES = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2))


def shape(kind: str, tensor: int, pipeline: int = 1, chunk: int = 2048) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        max_num_batched_tokens=chunk,
        device_kind=kind,
    )


def devices_of(cluster: str) -> tuple[Device, ...]:
    return load_cluster(cluster).devices


def fits(devices: Sequence[Device], counts: Counter[ReplicaShape]) -> None:
    assert counts
    assert min(counts.values()) > 0
    assert Packing(devices, list(counts)).fits(list(counts.values()))
    placed = place_replicas(counted(counts), devices).replicas
    assert Counter(spec.shape for spec in placed) == counts
    used = [name for spec in placed for name in spec.devices]
    assert len(used) == len(set(used)) == device_count(counted(counts))


@st.composite
def choices(draw: st.DrawFn) -> tuple[tuple[Device, ...], list[ReplicaShape]]:
    devices = devices_of(draw(st.sampled_from(CLUSTERS)))
    kinds = sorted({device.kind for device in devices})
    able = [shape(k, *size, chunk=c) for k in kinds for size in SIZES for c in (512, 2048)]
    return devices, draw(st.lists(st.sampled_from(able), min_size=1, max_size=6, unique=True))


@given(choices())
def test_every_deployment_can_be_placed(
    choice: tuple[tuple[Device, ...], list[ReplicaShape]],
) -> None:
    devices, shapes = choice
    plain = homogeneous(devices, shapes)
    for counts in plain:
        fits(devices, counts)
        # One form, and nothing more of it fits.
        assert len({(s.tensor_parallel_size, s.pipeline_parallel_size) for s in counts}) == 1
        for each in counts:
            assert not Packing(devices, list(counts)).fits(
                [count + (item == each) for item, count in counts.items()]
            )
    mixed = list(mixtures(devices, plain, most=24))
    assert len(mixed) <= 24
    for counts in mixed:
        fits(devices, counts)
        assert len(counts) > 1
    for counts in plain:
        ever = list(smaller(counts))
        for fewer in ever:
            fits(devices, fewer)
            assert fewer < counts
        assert len({frozenset(item.items()) for item in ever}) == len(ever)
        assert bool(ever) == (counts.total() > 1)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_mixtures_have_a_limit(most: int) -> None:
    devices = devices_of("8xH100")
    plain = homogeneous(devices, [shape("H100", 1), shape("H100", 2), shape("H100", 4)])
    assert len(list(mixtures(devices, plain, most=most))) == most


def test_shapes_that_do_not_fit_are_left_out() -> None:
    devices = devices_of("2x4xH100")
    assert homogeneous(devices, [shape("H100", 8), shape("L40S", 1)]) == []
    # Stages of a pipeline may lie on different nodes.
    assert homogeneous(devices, [shape("H100", 4, 2)]) == [Counter({shape("H100", 4, 2): 1})]


def test_two_kinds_of_devices_may_have_different_shapes() -> None:
    devices = devices_of("8xH100+4xL40S")
    plain = homogeneous(
        devices, [shape(kind, size) for kind in ("H100", "L40S") for size in (2, 4)]
    )
    assert [sorted(item.values()) for item in plain] == [[2, 4], [1, 2]]
    best = Counter({shape("H100", 2): 4, shape("L40S", 4): 1})
    assert best in list(mixtures(devices, plain, most=24))
    # Where no shape suits both kinds, both are used all the same.
    apart = homogeneous(devices, [shape("H100", 2), shape("L40S", 4)])
    assert best in list(mixtures(devices, apart, most=24))


def test_energy_may_switch_off_either_kind() -> None:
    both = Counter({shape("H100", 2): 2, shape("L40S", 2): 1})
    found = list(smaller(both))
    assert Counter({shape("H100", 2): 2}) in found
    assert Counter({shape("L40S", 2): 1}) in found
    assert all(item.total() < 3 for item in found)
