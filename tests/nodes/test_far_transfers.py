"""Whole transfers between ranks of two nodes, as engines do them, without engines."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from hatches import LIMIT_S, running_hatch
from oserve.engines.rank_commands import MoveShards
from oserve.engines.weights.sockets import Listener, addresses_from
from oserve.switch.rank_order import RankOrder, ShardPart

pytestmark = pytest.mark.extra

SHAPES = {"qkv": (96, 64), "down": (64, 96), "norm": (64,), "experts": (4, 32, 48)}


def whole(name: str) -> ShardPart:
    return ShardPart(name, tuple((0, size) for size in SHAPES[name]))


def half(name: str, number: int) -> ShardPart:
    """Of a sharded parameter: rows of ``qkv``, columns of ``down``, rows of each expert."""
    dim = {"qkv": 0, "down": 1, "experts": 1}.get(name)
    if dim is None:
        return whole(name)
    size = SHAPES[name][dim] // 2
    box = list(whole(name).box)
    box[dim] = (number * size, (number + 1) * size)
    return ShardPart(name, tuple(box))


def own(part: ShardPart) -> ShardPart:
    """The same in the tensor of a rank that holds no more."""
    return ShardPart(part.parameter, tuple((0, stop - start) for start, stop in part.box))


def orders() -> list[RankOrder]:
    """One rank gives two of another node their halves."""
    first = RankOrder(replica="a", rank=0)
    halves = [RankOrder(replica="w", rank=number) for number in range(2)]
    for number, order in enumerate(halves):
        parts = [half(name, number) for name in SHAPES]
        first.sends[1 + number] = parts
        order.receives[0] = [own(part) for part in parts]
    return [first, *halves]


def back() -> list[RankOrder]:
    """The two give a third on the first node what they hold."""
    last = RankOrder(replica="c", rank=0)
    halves = [RankOrder(replica="w", rank=number) for number in range(2)]
    for number, order in enumerate(halves):
        names = [name for name in SHAPES if number == 0 or name != "norm"]
        order.sends[0] = [own(half(name, number)) for name in names]
        last.receives[1 + number] = [half(name, number) for name in names]
    return [last, *halves]


@pytest.mark.parametrize("bytes_per_s", [0.0, 1e6])
async def test_weights_are_the_same_after_two_journeys(tmp_path: Path, bytes_per_s: float) -> None:
    torch = pytest.importorskip("torch")
    from oserve.engines.weights.memory import WeightMemory  # noqa: PLC0415
    from oserve.engines.weights.transfer import Transfer  # noqa: PLC0415

    torch.manual_seed(0)

    def rank(shapes: dict[str, tuple[int, ...]], fill: Any) -> tuple[dict[str, Any], Any]:
        held = {name: torch.nn.Parameter(fill(*shape)) for name, shape in shapes.items()}
        memory = WeightMemory(held.values())
        return {name: one.data for name, one in held.items()}, memory

    async with running_hatch(tmp_path) as a, running_hatch(tmp_path) as b:
        a.knows(b=b)
        b.knows(a=a)
        half_shapes = {name: own(half(name, 0)).box for name in SHAPES}
        shapes = {name: tuple(stop for _, stop in box) for name, box in half_shapes.items()}
        first, last = rank(SHAPES, torch.randn), rank(SHAPES, torch.zeros)
        middle = [rank(shapes, torch.zeros) for _ in range(2)]

        async def move(given: list[RankOrder], outer: Any) -> None:
            ranks, nodes = [outer, *middle], ["a", "b", "b"]
            folders = [a, b, b]
            paths = [
                str(hatch.listener(f"e{number}/w{number}.sock"))
                for number, hatch in enumerate(folders)
            ]
            transfers = []
            for number, (order, (tensors, memory)) in enumerate(zip(given, ranks, strict=True)):
                command = MoveShards(
                    name="t",
                    number=number,
                    addresses=addresses_from(number, paths, nodes),
                    limit_s=LIMIT_S,
                    order=order,
                    bytes_per_s=bytes_per_s,
                )
                transfers.append(Transfer(command, tensors, Listener(paths[number]), memory))
            for transfer in transfers:
                transfer.start()
            end_s = time.monotonic() + LIMIT_S
            while any(one.report().state == "running" for one in transfers):
                assert time.monotonic() < end_s
                await asyncio.sleep(0.002)
            reports = [one.report() for one in transfers]
            assert [report.reason for report in reports] == [""] * 3
            sent, received = (
                [getattr(r, f"{way}_bytes") for r in reports] for way in ("sent", "received")
            )
            assert sum(sent) == sum(received) > 0

        await move(orders(), first)
        await move(back(), last)
    for name in SHAPES:
        assert torch.equal(last[0][name], first[0][name]), name
