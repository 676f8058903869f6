"""Parts of replicas: ranks are dealt node by node, as vLLM does; what it cannot run is refused."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import Device, OServeError, ReplicaShape, ReplicaSpec, node_of_rank, parts_of


def made(width: int, nodes: list[str]) -> tuple[ReplicaSpec, dict[str, Device]]:
    """A replica whose stages lie on these nodes, and its devices."""
    devices = {
        f"{node}/{stage}.{rank}": Device(id=f"{node}/{stage}.{rank}", kind="cpu", node=node)
        for stage, node in enumerate(nodes)
        for rank in range(width)
    }
    shape = ReplicaShape(tensor_parallel_size=width, pipeline_parallel_size=len(nodes))
    return ReplicaSpec(id="r", shape=shape, devices=tuple(devices)), devices


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_every_rank_has_its_node_and_parts_are_alike(width: int, count: int, each: int) -> None:
    nodes = [f"n{number}" for number in range(count) for _ in range(each)]
    spec, devices = made(width, nodes)
    parts = parts_of(spec, devices)
    assert [part.node for part in parts] == list(dict.fromkeys(nodes))
    assert [part.index for part in parts] == list(range(count))
    assert {part.count for part in parts} == {count}
    assert [rank for part in parts for rank in part.ranks] == list(range(len(spec.devices)))
    assert {len(part.ranks) for part in parts} == {width * each}
    for rank, name in enumerate(spec.devices):
        assert node_of_rank(parts, rank) == devices[name].node
        part = next(part for part in parts if rank in part.ranks)
        assert part.devices[rank - part.ranks.start] is devices[name]


@given(st.integers(1, 2), st.lists(st.sampled_from("abc"), min_size=1, max_size=6))
def test_only_layouts_that_vllm_deals_are_accepted(width: int, nodes: list[str]) -> None:
    spec, devices = made(width, nodes)
    runs = [len(list(run)) for _, run in groupby(nodes)]
    runnable = len(runs) == len(set(nodes)) and len(set(runs)) == 1
    if runnable:
        assert len(parts_of(spec, devices)) == len(runs)
    else:
        with pytest.raises(OServeError, match=r"equally many|not consecutive"):
            parts_of(spec, devices)


def test_a_stage_stays_on_one_node_and_has_all_its_devices() -> None:
    spec, devices = made(2, ["a"])
    apart = {name: Device(id=name, kind="cpu", node=name) for name in devices}
    with pytest.raises(OServeError, match=r"over nodes a/0\.0, a/0\.1") as told:
        parts_of(spec, apart, place="plan.replicas[0].devices")
    assert told.value.place == "plan.replicas[0].devices"
    short = ReplicaSpec(id="r", shape=spec.shape, devices=spec.devices[:1])
    with pytest.raises(OServeError, match="needs 2 devices, but 1 are listed"):
        parts_of(short, devices)


@pytest.mark.parametrize(
    ("width", "text"),
    [(1, "part 2 of 2 (node b, rank 1)"), (2, "part 2 of 2 (node b, ranks 2 to 3)")],
)
def test_a_part_tells_its_node_and_ranks(width: int, text: str) -> None:
    assert str(parts_of(*made(width, ["a", "b"]))[1]) == text
