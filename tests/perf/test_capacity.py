"""Capacity per shape and type: bounds, limits and the shapes considered."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError, Precision, ReplicaShape, WorkloadType
from oserve.perf.capacity import Capacity, LatencyLimits, TypeLoad, capacities, closed_loop
from oserve.perf.known_models import find_model
from oserve.perf.memory import memory_fit
from oserve.perf.shapes import ShapeChoices, candidate_shapes, refuse_no_fit, splits
from oserve.perf.source import RooflineSource
from oserve.perf.table import performance_table

MODEL = find_model("llama-2-70b")
SOURCE = RooflineSource(MODEL, node_devices={"H100": 8})


def shape(tp: int = 4, pp: int = 1, chunk: int = 2048, seqs: int = 256) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        max_num_batched_tokens=chunk,
        max_num_seqs=seqs,
        device_kind="H100",
    )


def one(
    of: ReplicaShape, prompt: float, output: float, limits: LatencyLimits | None = None
) -> Capacity:
    load = TypeLoad(prompt_tokens=prompt, output_tokens=output, limits=limits or LatencyLimits())
    return capacities(SOURCE.step_model(of), of, SOURCE.kv_tokens(of), [load])[0]


lengths = st.tuples(st.integers(1, 3000), st.integers(2, 800))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(lengths, st.sampled_from([(4, 1), (8, 1), (4, 2)]), st.sampled_from([512, 2048, 8192]))
def test_tighter_limits_and_longer_requests_never_raise_capacity(
    length: tuple[int, int], size: tuple[int, int], chunk: int
) -> None:
    prompt, output = length
    of = shape(*size, chunk=chunk)
    free = one(of, prompt, output).capacity_rps
    loose = one(of, prompt, output, LatencyLimits(ttft_s=4, tpot_s=0.2)).capacity_rps
    tight = one(of, prompt, output, LatencyLimits(ttft_s=1, tpot_s=0.05)).capacity_rps
    assert math.isfinite(free)
    assert free > 0
    assert free >= loose >= tight >= 0
    assert one(of, 2 * prompt, output).capacity_rps <= free * 1.02
    assert one(of, prompt, 2 * output).capacity_rps <= free * 1.02


@settings(derandomize=True, deadline=None, max_examples=30)
@given(lengths)
def test_capacity_is_what_a_full_closed_loop_approaches(length: tuple[int, int]) -> None:
    prompt, output = length[0], length[1] + 1
    of = shape(tp=8, chunk=8192)
    kv_tokens = SOURCE.kv_tokens(of)
    loop = closed_loop(
        SOURCE.step_model(of),
        of,
        kv_tokens,
        inflight=1e9,
        prompt_tokens=prompt,
        output_tokens=output,
    )
    assert loop.rate_rps <= one(of, prompt, output).capacity_rps * 1.3


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(500, 3000), st.integers(3, 12), st.sampled_from([256, 512, 2048]))
def test_what_is_served_in_time_alone_is_served_if_it_is_rare(
    prompt: int, output: int, chunk: int
) -> None:
    of = shape(chunk=chunk)
    alone = closed_loop(
        SOURCE.step_model(of),
        of,
        SOURCE.kv_tokens(of),
        inflight=1,
        prompt_tokens=prompt,
        output_tokens=output,
    )
    # A prompt that comes meanwhile would be seen in TPOT: of a few tokens each counts.
    limits = LatencyLimits(ttft_s=1.2 * alone.ttft_s, tpot_s=1.5 * alone.tpot_s)
    assert one(of, prompt, output, limits).capacity_rps > 0


def test_what_meets_no_limit_says_what_would_be_met() -> None:
    found = one(shape(), 4000, 100, LatencyLimits(ttft_s=0.05))
    assert found.capacity_rps == 0
    assert "TTFT" in found.why
    assert one(shape(), 4000, 100, LatencyLimits(ttft_s=found.ttft_s * 1.01)).capacity_rps > 0
    slow = one(shape(), 4000, 100, LatencyLimits(tpot_s=0.001))
    assert "TPOT" in slow.why
    assert slow.tpot_s > 0.001


def test_short_kv_room_is_refused() -> None:
    of = shape()
    load = TypeLoad(prompt_tokens=2000, output_tokens=500)
    step = SOURCE.step_model(of)
    assert capacities(step, of, 19_000, [load])[0].capacity_rps == 0
    assert capacities(step, of, 21_000, [load])[0].capacity_rps > 0
    longest = TypeLoad(prompt_tokens=2000, output_tokens=500, longest_tokens=30_000)
    assert capacities(step, of, 21_000, [longest])[0].capacity_rps == 0


def test_memory_adds_up() -> None:
    """Llama-2-70B in bf16: 138 GB of weights, 320 KiB of cache a token over all devices."""
    four, eight = (memory_fit(MODEL, shape(tp=tp), 80 * 2**30) for tp in (4, 8))
    assert 4 * four.weights_bytes == pytest.approx(138e9, rel=0.01)
    assert 4 * four.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2
    assert eight.kv_tokens > 2 * four.kv_tokens > 0
    none = memory_fit(MODEL, shape(tp=1), 80 * 2**30)
    assert none.kv_tokens == 0
    assert none.missing_bytes > 50e9
    # Key-value heads are copied where there are more ranks than heads.
    wide = memory_fit(MODEL, shape(tp=16), 80 * 2**30)
    assert wide.kv_bytes_per_token == eight.kv_bytes_per_token


def test_the_table_leaves_out_what_does_not_fit() -> None:
    shapes = candidate_shapes(MODEL, {"H100": 32}, node_devices={"H100": 8})
    kinds = [
        WorkloadType(name="chat", prompt_tokens=500, output_tokens=200, arrival_rate_rps=1),
        WorkloadType(name="code", prompt_tokens=2000, output_tokens=20, arrival_rate_rps=1),
    ]
    table = performance_table(SOURCE, shapes, kinds)
    assert {row.shape for row in table} < set(shapes)
    assert all(SOURCE.kv_tokens(row.shape) > 0 for row in table)
    assert all(len(row.capacity_rps) == 2 for row in table)
    for row in table:
        devices = row.shape.device_count
        assert devices * 122 < row.power_w < devices * 700
        assert row.energy_j(0) == pytest.approx(row.power_w / (0.7 * row.capacity_rps[0]))
    assert all((row.capacity_rps[0] > 0) == math.isfinite(row.latency_s[0]) for row in table)


def test_shapes_respect_heads_nodes_and_layers() -> None:
    llama30 = find_model("llama-30b")
    assert splits(llama30, 4)
    assert not splits(llama30, 8)
    sizes = {
        (item.tensor_parallel_size, item.pipeline_parallel_size)
        for item in candidate_shapes(llama30, {"H100": 6}, node_devices={"H100": 2})
    }
    assert sizes == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}


def test_a_model_that_fits_nothing_is_told_what_is_missing_and_what_would_fit() -> None:
    devices = {"L4": 2}
    source = RooflineSource(MODEL, node_devices=devices)
    shapes = candidate_shapes(MODEL, devices, node_devices=devices)
    with pytest.raises(OServeError, match="missing") as caught:
        refuse_no_fit(source, shapes, devices)
    assert "L4" in caught.value.remedy
    fitting = candidate_shapes(
        MODEL, {"H100": 2}, ShapeChoices(precisions=(Precision.FP8,)), node_devices={"H100": 2}
    )
    refuse_no_fit(SOURCE, fitting, {"H100": 2})
