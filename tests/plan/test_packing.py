"""Packing against plain enumeration of placements."""

import random
from functools import cache
from itertools import product

import numpy as np
import pytest

from oserve.core import ReplicaShape
from oserve.plan.packing import Packing, node_groups
from oserve.plan.programme import Column, LinearProgramme, SolveStatus
from plan.instances import Kind, devices_of


def packs(groups: tuple[int, ...], nodes: tuple[int, ...]) -> bool:
    """Whether groups fit in nodes, by trying every node for every group."""

    @cache
    def put(left: tuple[int, ...], free: tuple[int, ...]) -> bool:
        if not left:
            return True
        return any(
            room >= left[0]
            and put(left[1:], tuple(sorted((*free[:at], room - left[0], *free[at + 1 :]))))
            for at, room in enumerate(free)
        )

    return put(tuple(sorted(groups, reverse=True)), tuple(sorted(nodes)))


def shape(width: int, depth: int, kind: str) -> ReplicaShape:
    return ReplicaShape(tensor_parallel_size=width, pipeline_parallel_size=depth, device_kind=kind)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("widths", [(1, 2, 4, 8), (1, 2, 3, 6), (2, 3, 5)])
def test_counts_fit_if_and_only_if_their_groups_can_be_placed(
    seed: int, widths: tuple[int, ...]
) -> None:
    rng = random.Random(seed)
    kinds = tuple(
        Kind(name=name, nodes=tuple(rng.randint(1, 8) for _ in range(rng.randint(1, 3))), speed=1)
        for name in ("a", "b")[: rng.randint(1, 2)]
    )
    shapes = [
        shape(rng.choice(widths), rng.choice([1, 1, 2]), rng.choice(kinds).name) for _ in range(4)
    ]
    packing = Packing(devices_of(kinds), shapes)
    for _ in range(15):
        counts = tuple(rng.randint(0, 2) for _ in shapes)
        wanted = True
        for kind in kinds:
            groups = [
                s.tensor_parallel_size
                for s, count in zip(shapes, counts, strict=True)
                if s.device_kind == kind.name
                for _ in range(count * s.pipeline_parallel_size)
            ]
            wanted = wanted and packs(tuple(groups), kind.nodes)
        assert packing.fits(counts) == wanted
        assert rows_allow(packing, counts) == wanted


def rows_allow(packing: Packing, counts: tuple[int, ...]) -> bool:
    """Whether the linear rows have whole numbers of groups for these counts."""
    columns = [
        Column(
            entries={
                number: row.groups[index]
                for number, row in enumerate(packing.rows)
                if index in row.groups
            },
            upper=upper,
            integer=True,
        )
        for index, upper in enumerate(packing.extra_columns)
    ]
    rows = []
    for row in packing.rows:
        taken = sum(coefficient * counts[i] for i, coefficient in row.counts.items())
        rows.append((-np.inf, row.upper - taken))
    columns.append(Column(entries={}, upper=1.0))
    return LinearProgramme(columns=columns, rows=rows).solve() is SolveStatus.OPTIMAL


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_count_is_the_largest_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    kind = Kind(name="a", nodes=tuple(rng.randint(1, 8) for _ in range(3)), speed=1)
    packing = Packing(devices_of((kind,)), [shape(rng.choice([1, 2, 3]), rng.randint(1, 2), "a")])
    most = packing.largest(0)
    assert packing.fits([most])
    assert not packing.fits([most + 1])


def test_groups_may_span_nodes_where_that_is_allowed() -> None:
    devices = devices_of((Kind(name="a", nodes=(4, 4), speed=1),))
    assert not Packing(devices, [shape(8, 1, "a")]).fits([1])
    assert Packing(devices, [shape(8, 1, "a")], tensor_parallel_across_nodes=True).fits([1])
    # Stages are apart anyway.
    assert Packing(devices, [shape(4, 2, "a")]).fits([1])


def test_any_kind_stands_for_the_only_one() -> None:
    one = Kind(name="a", nodes=(2,), speed=1)
    other = Kind(name="b", nodes=(2,), speed=1)
    assert Packing(devices_of((one,)), [shape(1, 1, "any")]).largest(0) == 2
    assert Packing(devices_of((one, other)), [shape(1, 1, "any")]).largest(0) == 0


def test_all_counts_are_exactly_those_that_fit() -> None:
    devices = devices_of((Kind(name="a", nodes=(3, 2), speed=1),))
    packing = Packing(devices, [shape(1, 1, "a"), shape(2, 1, "a"), shape(1, 2, "a")])
    listed = list(packing.all_counts())
    assert len(listed) == len(set(listed))
    assert set(listed) == {c for c in product(range(6), repeat=3) if packing.fits(c)}


def test_first_fit_may_fail_where_a_packing_exists() -> None:
    """Descending first fit puts both 4s on one node; 4 + 3 + 3 twice fits."""
    placed = node_groups({4: 2, 3: 4}, {"x": 10, "y": 10})
    assert placed == {"x": {4: 1, 3: 2}, "y": {4: 1, 3: 2}}
    assert node_groups({5: 3}, {"x": 9, "y": 9}) is None
