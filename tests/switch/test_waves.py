"""Orders of a switch: memory fits and capacity stays above the floor, moment by moment."""

import random
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import Device, OServeError, Precision
from oserve.perf.device import find_link
from oserve.switch.costs import SwitchCosts, switch_cost
from oserve.switch.layout import Layout, ShardPlacement
from oserve.switch.links import links_of
from oserve.switch.precision import format_of
from oserve.switch.transfer import plan_transfer
from oserve.switch.waves import Wave, WaveOrder, WavePolicy, WaveReplica, order_switch
from switch.arrays import tiny

MEMORY = 80.0
WEIGHTS = 100.0


def standing(
    name: str,
    devices: tuple[str, ...],
    capacity: tuple[float, ...],
    *,
    kv: float | None = None,
    precision: Precision = Precision.BF16,
) -> WaveReplica:
    """Weights are shared by the devices; the cache fills what 90 % of the memory leaves."""
    layout = Layout(tensor_parallel_size=len(devices), held=format_of(precision))
    weights = WEIGHTS / len(devices) / (1 if precision is Precision.BF16 else 2)
    return WaveReplica(
        placed=ShardPlacement(replica=name, layout=layout, devices=devices),
        weights_bytes=weights,
        kv_bytes=MEMORY * 0.9 - weights - 2.0 if kv is None else kv,
        engine_bytes=2.0,
        capacity_rps=capacity,
    )


def deployment(
    rng: random.Random, prefix: str, devices: int, kv: float | None
) -> list[WaveReplica]:
    found: list[WaveReplica] = []
    left = [f"d{index}" for index in range(devices)]
    if rng.random() < 0.5:
        rng.shuffle(left)
    while left:
        width = rng.choice([size for size in (1, 2, 4) if size <= len(left)])
        # One device alone holds the weights of 8 bits only.
        precision = Precision.INT8 if width == 1 else Precision.BF16
        capacity = (width * rng.uniform(0.6, 1.4), width * rng.uniform(0.3, 1.0))
        own, left = tuple(left[:width]), left[width:]
        name = f"{prefix}{len(found)}"
        found.append(standing(name, own, capacity, kv=kv, precision=precision))
    return found


def walk(
    order: WaveOrder, old: list[WaveReplica], new: list[WaveReplica], policy: WavePolicy
) -> float:
    """Plays the order and checks each moment; the least share of the floor that was ready."""
    every = {one.id: one for one in (*old, *new)}
    kept = set(order.kept)
    serving = {one.id for one in old}
    held = {one.id: one.total_bytes for one in old}
    worst = float("inf")

    def check() -> None:
        nonlocal worst
        for device in policy.memory_bytes:
            used = sum(held[name] for name in held if device in every[name].placed.devices)
            assert used <= policy.memory_bytes[device] + 1e-9
        for kind, floor in enumerate(policy.floor_rps):
            ready = sum(every[name].capacity_rps[kind] for name in serving)
            worst = min(worst, ready / floor)

    for wave in order.waves:
        for name in (*wave.release, *wave.stop):
            serving.remove(name)
            held[name] -= every[name].kv_bytes
        for name in wave.stop:
            del held[name]
        assert set(wave.sources) == set(held)
        for name in wave.start:
            assert name not in held
            held[name] = every[name].total_bytes
        check()
        serving |= set(wave.start)
        serving -= set(wave.retire)
        check()
        for name in (*wave.retire, *wave.release):
            del held[name]
    check()
    wanted = {
        one.id for one in new if one.placed.devices not in {every[k].placed.devices for k in kept}
    }
    assert serving == wanted | kept
    assert set(held) == serving
    return worst


def ordered(old: list[WaveReplica], new: list[WaveReplica], policy: WavePolicy) -> WaveOrder | None:
    """An order, or None where there is nothing to copy from."""
    try:
        return order_switch(old, new, policy)
    except OServeError as error:
        reasons = ("cannot be filled", "would have to stop")
        if not any(reason in error.message for reason in reasons):
            raise
        return None


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_two_deployments(seed: int) -> None:
    rng = random.Random(seed)
    devices = rng.choice([2, 4, 8, 16])
    kv = rng.choice([None, 5.0, 5.0])
    old = deployment(rng, "o", devices, kv)
    new = deployment(rng, "n", devices, kv)
    total = [sum(one.capacity_rps[kind] for one in old) for kind in (0, 1)]
    policy = WavePolicy(
        floor_rps=tuple(rng.choice([0.3, 0.6, 0.9]) * each for each in total),
        memory_bytes={f"d{index}": MEMORY for index in range(devices)},
        releases_cache=rng.random() < 0.5,
        quantise=True,
    )
    order = ordered(old, new, policy)
    if order is None:
        return
    assert walk(order, old, new, policy) == pytest.approx(order.floor_share)
    assert (order.reason == "") == (order.floor_share >= 1.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_order_keeps_more_than_a_proved_one(seed: int) -> None:
    """Against all ways to start up to four replicas, together or one after another."""
    rng = random.Random(seed)
    kv = rng.choice([5.0, 15.0])
    old, new = deployment(rng, "o", 4, kv), deployment(rng, "n", 4, kv)
    memory = {f"d{index}": MEMORY for index in range(4)}
    policy = WavePolicy(floor_rps=(50.0, 50.0), memory_bytes=memory, quantise=True)
    order = ordered(old, new, policy)
    if order is None:
        return
    assert order.proved
    for names in permutations([one.id for one in new]):
        for cuts in range(2 ** (len(names) - 1)):
            steps: list[list[str]] = [[names[0]]]
            for index, name in enumerate(names[1:]):
                if cuts >> index & 1:
                    steps.append([name])
                else:
                    steps[-1].append(name)
            share = played(old, new, policy, steps)
            assert share is None or share <= order.floor_share + 1e-9


def played(
    old: list[WaveReplica], new: list[WaveReplica], policy: WavePolicy, steps: list[list[str]]
) -> float | None:
    """The share that a given sequence keeps; None if nothing is left to copy from."""
    every = {one.id: one for one in new}
    kept = {
        one.id
        for one in new
        for other in old
        if one.placed.devices == other.placed.devices and one.placed.layout == other.placed.layout
    }
    ready = list(old)
    worst = float("inf")

    def least(replicas: list[WaveReplica]) -> float:
        return min(
            sum(one.capacity_rps[kind] for one in replicas) / policy.floor_rps[kind]
            for kind in (0, 1)
        )

    for step in steps:
        start = [every[name] for name in step if name not in kept]
        touched = {device for one in start for device in one.placed.devices}
        crowded = [
            other
            for other in ready
            if other.id not in every
            and any(
                set(one.placed.devices) & set(other.placed.devices)
                and one.total_bytes + other.total_bytes > MEMORY
                for one in start
            )
        ]
        left = [one for one in ready if one not in crowded]
        if start and not left:
            return None
        if any(
            one.placed.layout.held.precision is Precision.BF16
            and all(other.placed.layout.held.precision is Precision.INT8 for other in left)
            for one in start
        ):
            return None
        if start:
            worst = min(worst, least(left))
        ready = [
            one for one in left if one.id in every or not touched & set(one.placed.devices)
        ] + start
        worst = min(worst, least(ready))
    return worst


def test_room_for_both_needs_one_wave() -> None:
    old = [standing("o0", ("d0", "d1"), (2.0,), kv=5.0)]
    new = [
        standing(f"n{index}", (f"d{index}",), (1.2,), kv=5.0, precision=Precision.INT8)
        for index in (0, 1)
    ]
    memory = {"d0": 140.0, "d1": 140.0}
    policy = WavePolicy(floor_rps=(2.0,), memory_bytes=memory, quantise=True)
    order = order_switch(old, new, policy)
    assert order.waves == (
        Wave(start=("n0", "n1"), retire=("o0",), sources=("o0",), capacity_rps=(2.0,)),
    )
    refused = "not allowed"
    with pytest.raises(OServeError, match=refused):
        order_switch(old, new, replace(policy, quantise=False))


def test_a_floor_that_cannot_be_kept_is_told() -> None:
    """Two pairs become two others on the same devices, and only one fits at a time."""
    old = [standing("o0", ("d0", "d1"), (1.0,)), standing("o1", ("d2", "d3"), (1.0,))]
    new = [standing("n0", ("d1", "d0"), (1.0,)), standing("n1", ("d3", "d2"), (1.0,))]
    memory = {f"d{index}": MEMORY for index in range(4)}
    policy = WavePolicy(floor_rps=(2.0,), memory_bytes=memory)
    order = order_switch(old, new, policy)
    assert (order.floor_share, order.proved) == (0.5, True)
    assert order.reason == "capacity falls to 0.50 of the floor, the most that any order keeps"
    assert len(order.waves) == 2
    assert order_switch(old, new, replace(policy, floor_rps=(1.0,))).reason == ""


def test_the_last_source_is_not_stopped() -> None:
    old = [standing("o0", ("d0", "d1"), (1.0,))]
    new = [standing("n0", ("d1", "d0"), (1.0,))]
    policy = WavePolicy(floor_rps=(0.0,), memory_bytes={"d0": MEMORY, "d1": MEMORY})
    with pytest.raises(OServeError, match="would have to stop"):
        order_switch(old, new, policy)
    # Weights, two engines and one cache do not fit either; with a smaller cache they do.
    small = [replace(new[0], kv_bytes=5.0)]
    with pytest.raises(OServeError, match="would have to stop"):
        order_switch(old, small, policy)


def test_released_caches_make_room() -> None:
    old = [replace(standing("o0", ("d0", "d1", "d2", "d3"), (1.0,)), kv_bytes=45.0)]
    new = [replace(standing("n0", ("d0", "d1", "d3", "d2"), (1.0,)), kv_bytes=20.0)]
    memory = {f"d{index}": MEMORY for index in range(4)}
    policy = WavePolicy(floor_rps=(0.0,), memory_bytes=memory, releases_cache=True)
    (wave,) = order_switch(old, new, policy).waves
    assert (wave.release, wave.stop, wave.start, wave.sources) == (("o0",), (), ("n0",), ("o0",))


def test_a_standby_engine_without_a_cache_fits_beside_a_released_one() -> None:
    old = [standing("o0", ("d0", "d1", "d2", "d3"), (1.0,))]
    new = [standing("n0", ("d0", "d1", "d3", "d2"), (1.0,))]
    memory = {f"d{index}": MEMORY for index in range(4)}
    policy = WavePolicy(floor_rps=(0.0,), memory_bytes=memory, releases_cache=True)
    with pytest.raises(OServeError, match="would have to stop"):
        order_switch(old, new, policy)
    (wave,) = order_switch(old, new, replace(policy, standby_without_cache=True)).waves
    assert (wave.release, wave.stop, wave.start, wave.sources) == (("o0",), (), ("n0",), ("o0",))


def test_what_is_in_both_stays() -> None:
    old = [standing("o0", ("d0", "d1"), (1.0,)), standing("o1", ("d2", "d3"), (1.0,))]
    new = [standing("other-name", ("d0", "d1"), (1.0,))]
    memory = {f"d{index}": MEMORY for index in range(4)}
    order = order_switch(old, new, WavePolicy(floor_rps=(1.0,), memory_bytes=memory))
    assert order.kept == ("o0",)
    assert [wave.retire for wave in order.waves] == [("o1",)]
    assert order_switch(old, old, WavePolicy(floor_rps=(1.0,), memory_bytes=memory)).waves == ()


def test_a_replica_that_fits_nowhere_is_refused() -> None:
    old = [standing("o0", ("d0", "d1"), (1.0,))]
    new = [standing("n0", ("d0",), (1.0,), kv=0.0)]
    policy = WavePolicy(floor_rps=(0.0,), memory_bytes={"d0": MEMORY, "d1": MEMORY})
    with pytest.raises(OServeError, match="of a device's"):
        order_switch(old, new, policy)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_large_clusters_are_ordered_in_time(seed: int) -> None:
    rng = random.Random(seed)
    old, new = deployment(rng, "o", 64, 15.0), deployment(rng, "n", 64, 15.0)
    policy = WavePolicy(
        floor_rps=(30.0, 15.0),
        memory_bytes={f"d{index}": MEMORY for index in range(64)},
        quantise=True,
    )
    order = order_switch(old, new, policy)
    assert walk(order, old, new, policy) == pytest.approx(order.floor_share)


def test_seconds_of_each_phase() -> None:
    devices = [Device(id=f"d{index}", kind="H100") for index in range(4)]
    links = links_of(devices, find_link("infiniband-400"))
    layout = Layout(tensor_parallel_size=2)
    source = ShardPlacement(replica="o0", layout=layout, devices=("d0", "d1"))
    target = ShardPlacement(replica="n0", layout=layout, devices=("d2", "d3"))
    transfer = plan_transfer(tiny("llama"), [source], [target], links)
    wave = Wave(stop=("o1",), start=("n0",), retire=("o0",), capacity_rps=(1.0,))
    costs = SwitchCosts(link_share=0.5)
    cost = switch_cost([wave], [transfer], costs, hosts={"n0": "local"}, capacity_rps=(2.0,))
    (phase,) = cost.waves
    assert phase.transfer_s == pytest.approx(0.5 + 2 * transfer.busy_s + transfer.latency_s)
    assert (phase.room_s, phase.prepare_s, phase.drain_s) == (11.0, 4.0, 10.0)
    assert cost.ready_s == pytest.approx(phase.until_commit_s)
    assert cost.total_s == pytest.approx(cost.ready_s + 10.0)
    assert cost.missing_requests == pytest.approx((phase.until_commit_s,))
