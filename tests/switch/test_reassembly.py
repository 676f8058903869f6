"""Tensors moved between any two layouts arrive whole: plans carried out on numpy arrays."""

import functools
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from oserve.core import Device, Precision
from oserve.perf.device import find_link
from oserve.switch.layout import Layout, ShardPlacement
from oserve.switch.links import Links, links_of
from oserve.switch.precision import WeightFormat, format_of
from oserve.switch.transfer import Method, plan_transfer
from switch.arrays import Memory, carried_out, loaded, tiny, wholes

SIZES = list(product((1, 2, 4, 8), (1, 2, 4)))
FAMILIES = ("llama", "opt", "qwen2", "qwen3", "mixtral", "qwen3-moe")


def cluster(count: int, node_size: int = 8) -> Links:
    devices = [
        Device(id=f"d{index}", kind="H100", node=f"n{index // node_size}") for index in range(count)
    ]
    return links_of(devices, find_link("infiniband-400"))


def placed(
    size: tuple[int, int], held: WeightFormat, first: int, *, experts: bool = False
) -> ShardPlacement:
    layout = Layout(
        tensor_parallel_size=size[0],
        pipeline_parallel_size=size[1],
        held=held,
        expert_parallel=experts,
    )
    devices = tuple(f"d{first + index}" for index in range(layout.ranks))
    return ShardPlacement(replica=f"r{first}-{size}", layout=layout, devices=devices)


def same(one: Memory, other: Memory) -> None:
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert np.array_equal(array, other[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision", [Precision.BF16, Precision.INT8, Precision.FP8, Precision.INT4]
)
def test_every_pair_of_sizes(precision: Precision) -> None:
    """The families take turns; half of the source's devices are the target's as well."""
    held = replace(format_of(precision), group_size=8)
    links = cluster(64)
    models = [tiny(name) for name in FAMILIES]

    @functools.cache
    def full(turn: int, one: ShardPlacement) -> Memory:
        return loaded(models[turn], one, whole[turn])

    whole = [wholes(architecture, held) for architecture in models]
    for number, (old, new) in enumerate(product(SIZES, SIZES)):
        turn = (number + list(Precision).index(precision)) % len(models)
        source, target = placed(old, held, 0), placed(new, held, new[0] // 2)
        method = Method.GREEDY if number % 4 == 0 else Method.BALANCED
        plan = plan_transfer(models[turn], [source], [target], links, method=method)
        got = carried_out(models[turn], plan, [source], [target], full(turn, source))
        same(got, full(turn, target))
