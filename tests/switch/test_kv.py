"""Running requests drain, move or are computed again; caches move between layouts."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import Device, OServeError, Precision
from oserve.perf.device import find_link
from oserve.switch.kv import (
    CacheContents,
    CacheMove,
    DrainPolicy,
    RunningRequest,
    TargetRoom,
    Way,
    decide_requests,
    plan_caches,
)
from oserve.switch.layout import Layout, ShardPlacement, pieces_by_key, place_of
from oserve.switch.links import links_of
from oserve.switch.precision import WeightFormat, format_of
from switch.arrays import tiny

POLICY = DrainPolicy(limit_s=10.0, decode_s_per_token=0.02, headroom=0.1)
ROOM = TargetRoom(kv_tokens=100_000, free_tokens=60_000, bandwidth=1e10, prefill_s_per_token=1e-4)
LONG = RunningRequest(id="a", context_tokens=20_000, remaining_tokens=1000, target="n")


@pytest.mark.parametrize(
    ("request_", "room", "way", "reason"),
    [
        (replace(LONG, remaining_tokens=100), ROOM, Way.DRAIN, "within the limit"),
        (LONG, ROOM, Way.MOVE, "computing it again 2.02 s"),
        (replace(LONG, context_tokens=100), ROOM, Way.REPLAY, "moving it"),
        (LONG, replace(ROOM, free_tokens=30_000), Way.REPLAY, "no room beside the headroom"),
        (replace(LONG, carries=False), ROOM, Way.DRAIN, "cannot be carried"),
        (replace(LONG, target=""), ROOM, Way.DRAIN, "no replica can take it"),
    ],
)
def test_verdicts(request_: RunningRequest, room: TargetRoom, way: Way, reason: str) -> None:
    (verdict,) = decide_requests([request_], {"n": room}, POLICY, kv_bytes_per_token=3e5)
    assert verdict.way is way
    assert reason in verdict.reason
    assert (verdict.moved_bytes > 0) == (way is Way.MOVE)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_moved_caches_leave_the_headroom_free(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        RunningRequest(
            id=str(index),
            context_tokens=rng.randint(1, 30_000),
            remaining_tokens=rng.randint(0, 2000),
            target=rng.choice(["n", "m"]),
        )
        for index in range(20)
    ]
    rooms = {"n": ROOM, "m": replace(ROOM, free_tokens=rng.randint(0, 100_000))}
    verdicts = decide_requests(requests, rooms, POLICY, kv_bytes_per_token=3e5)
    assert [one.request for one in verdicts] == [one.id for one in requests]
    for name, room in rooms.items():
        moved = sum(
            one.context_tokens + one.remaining_tokens
            for one, verdict in zip(requests, verdicts, strict=True)
            if verdict.way is Way.MOVE and one.target == name
        )
        assert moved == 0 or room.free_tokens - moved >= POLICY.headroom * room.kv_tokens


@pytest.mark.parametrize(("old", "new"), [((1, 1), (4, 1)), ((4, 2), (2, 1)), ((2, 1), (8, 2))])
def test_caches_move_between_layouts(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Two KV heads: more ranks hold copies of the same head."""
    model = tiny("llama").model
    devices = [Device(id=f"d{index}", kind="H100", node=f"n{index // 8}") for index in range(32)]
    links = links_of(devices, find_link("infiniband-400"))
    source, target = (
        ShardPlacement(
            replica=name,
            layout=Layout(tensor_parallel_size=size[0], pipeline_parallel_size=size[1]),
            devices=tuple(f"d{first + index}" for index in range(size[0] * size[1])),
        )
        for name, size, first in (("o", old, 0), ("n", new, 16))
    )
    plan = plan_caches(model, [CacheMove(source=source, target=target, tokens=7)], links)
    contents = CacheContents(model=model, tokens=7, tag="@o>n")
    (parameter,) = contents.parameters(WeightFormat())
    (tensor,) = parameter.parts
    for rank, device in enumerate(target.devices):
        _, piece = pieces_by_key(contents, target.layout, rank)[tensor.key]
        stage = rank // target.layout.tensor_parallel_size
        layers = contents.stages(tensor.where, target.layout.pipeline_parallel_size)[stage][1]
        seen = np.zeros((model.layers, *(stop - start for start, stop in piece.box)))
        for copy in plan.copies:
            if copy.target == device:
                where = place_of(piece, copy.item.box)
                seen[(slice(*copy.item.layers), *where)] += 1
        assert (seen[slice(*layers)] == 1).all()
        assert seen.sum() == seen[slice(*layers)].size
    copied = 2 * 2 * model.layers * model.head_dim * 7 * max(new[0], model.kv_heads)
    assert plan.traffic.moved_bytes == copied


def test_caches_of_other_types_are_refused() -> None:
    links = links_of(
        [Device(id=f"d{index}", kind="H100") for index in (0, 1)], find_link("roce-100")
    )
    source = ShardPlacement(replica="o", layout=Layout(), devices=("d0",))
    held = format_of(Precision.FP32)
    target = ShardPlacement(replica="n", layout=Layout(held=held), devices=("d1",))
    move = CacheMove(source=source, target=target, tokens=3)
    with pytest.raises(OServeError, match="holds model"):
        plan_caches(tiny("llama").model, [move], links)
