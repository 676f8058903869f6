"""Rank orders, carried out part by part, do what the plan's copies do."""

from itertools import product

import numpy as np
import pytest

from oserve.core import OServeError, Precision
from oserve.switch.layout import Layout, ShardPlacement
from oserve.switch.orders import rank_orders
from oserve.switch.precision import WeightFormat, format_of
from oserve.switch.rank_order import RankOrder
from oserve.switch.transfer import fill_reason, plan_transfer
from switch.arrays import UNSET, Memory, empty, loaded, tiny, wholes
from switch.test_reassembly import cluster, placed, same

SIZES = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4)]


def carried(
    orders: tuple[RankOrder, ...], held: Memory, memory: Memory, devices: dict[int, str]
) -> None:
    """What each rank sends, in the order of both ends; nothing is written twice."""
    for number, order in enumerate(orders):
        for peer, sent in order.sends.items():
            got = orders[peer].receives[number]
            for (name, box), (own, place) in zip(sent, got, strict=True):
                value = held[devices[number], name][tuple(slice(*edge) for edge in box)]
                part = memory[devices[peer], own][tuple(slice(*edge) for edge in place)]
                assert not np.count_nonzero(part != UNSET)
                part[...] = value


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_parts_are_those_of_the_plan(family: str) -> None:
    architecture = tiny(family)
    held = format_of(Precision.BF16)
    whole = wholes(architecture, held)
    links = cluster(32)
    for old, new in product(SIZES, SIZES):
        source, target = placed(old, held, 0), placed(new, held, 1)
        plan = plan_transfer(architecture, [source], [target], links)
        orders = rank_orders(architecture, plan, [source], [target])
        assert [(o.replica, o.rank) for o in orders] == [
            (one.replica, rank) for one in (source, target) for rank in range(one.layout.ranks)
        ]
        devices = dict(enumerate((*source.devices, *target.devices)))
        memory = empty(architecture, target)
        carried(orders, loaded(architecture, source, whole), memory, devices)
        same(memory, loaded(architecture, target, whole))


def test_conversions_name_what_is_staged_and_who_shares_rows() -> None:
    architecture = tiny("llama")
    held = WeightFormat(precision=Precision.INT8, plain=Precision.BF16)
    for origin in (Precision.BF16, Precision.FP32):
        source = placed((1, 1), format_of(origin), 0)
        target = placed((2, 1), held, 1)
        assert fill_reason(target, [source], quantise=True) == ""
        assert "not allowed" in fill_reason(target, [source], quantise=False)
        plan = plan_transfer(architecture, [source], [target], cluster(8), quantise=True)
        orders = rank_orders(architecture, plan, [source], [target])
        for number, order in enumerate(orders[1:], start=1):
            schemes = {name: (scheme, peers) for name, scheme, peers in order.convert}
            assert set(schemes) == set(order.staged)
            stem = "model.layers.0.self_attn."
            assert schemes[stem + "qkv_proj.weight"] == ("int8", (number,))
            assert schemes[stem + "o_proj.weight"] == ("int8", (1, 2))
            # What stays plain is only made shorter, from fp32.
            cast = schemes.get("model.norm.weight")
            assert cast == (("cast", (number,)) if origin is Precision.FP32 else None)
            received = {name for parts in order.receives.values() for name, _ in parts}
            assert set(order.staged) <= received


def test_what_engines_cannot_make_is_refused() -> None:
    architecture = tiny("llama")
    source = placed((1, 1), format_of(Precision.BF16), 0)
    layout = Layout(held=format_of(Precision.FP8))
    target = ShardPlacement(replica="t", layout=layout, devices=("d1",))
    plan = plan_transfer(architecture, [source], [target], cluster(8), quantise=True)
    with pytest.raises(OServeError, match="fp8"):
        rank_orders(architecture, plan, [source], [target])
    back = placed((1, 1), format_of(Precision.FP32), 0)
    assert "turned back" in fill_reason(back, [source], quantise=True)
