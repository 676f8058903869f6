"""Sizes of KV caches: what one request needs, what there is room for."""

from collections import Counter
from dataclasses import replace
from itertools import product

from hypothesis import assume, given
from hypothesis import strategies as st

from oserve.core import Precision, ReplicaShape
from oserve.perf.kv_cache import (
    BLOCK_TOKENS,
    EngineMemory,
    blind_cache_bytes,
    cache_size,
    shared_cache_bytes,
)
from oserve.perf.memory import MEMORY_SHARE, kv_bytes_per_token, memory_fit
from oserve.perf.model import ModelFacts
from oserve.perf.shapes import splits

SMOLLM2 = ModelFacts(
    name="smollm2",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    tied=True,
    max_model_len=8192,
)
GIB = 1 << 30


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    """From a few million to some 100 billion parameters, every kind of head sharing."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4, 8]))
    head_dim = draw(st.sampled_from([32, 64, 80, 128, 256]))
    hidden = heads * head_dim
    return ModelFacts(
        name="m",
        layers=draw(st.integers(1, 126)),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=hidden * draw(st.sampled_from([2, 4])),
        vocab=draw(st.sampled_from([320, 32_000, 151_936])),
        tied=draw(st.booleans()),
        max_model_len=draw(st.sampled_from([2048, 4096, 8192, 32_768, 131_072])),
    )


@st.composite
def memories(draw: st.DrawFn) -> EngineMemory:
    model = draw(models())
    return EngineMemory(
        model=model,
        context_tokens=model.max_model_len,
        device_bytes=draw(st.floats(1e8, 2e12)),
        copies=draw(st.integers(1, 2)),
        engine_bytes=draw(st.sampled_from([0.0, 0.7e9, 2e9])),
    )


def shapes_of(model: ModelFacts) -> list[ReplicaShape]:
    return [
        ReplicaShape(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            precision=precision,
            max_num_batched_tokens=chunk,
            max_num_seqs=32,
        )
        for tp, pp, precision, chunk in product(
            (1, 2, 3, 4), (1, 2), (Precision.FP32, Precision.BF16, Precision.INT8), (256, 2048)
        )
        if splits(model, tp) and pp <= model.layers
    ]


@given(memory=memories())
def test_every_shape_that_fits_holds_one_request_and_stays_within_memory(
    memory: EngineMemory,
) -> None:
    shapes = shapes_of(memory.model)
    found = cache_size(memory, shapes)
    assert Counter((*found.fitting, *found.misfits)) == Counter(shapes)
    assert (found.cache_bytes > 0) == bool(found.fitting)
    for shape in found.fitting:
        assert found.cache_bytes >= memory.request_bytes(shape)
        assert memory.fixed_bytes(shape) + found.cache_bytes <= memory.device_bytes * MEMORY_SHARE
        # vLLM keeps one block back, and counts in whole ones.
        held = found.cache_bytes // (BLOCK_TOKENS * kv_bytes_per_token(memory.model, shape))
        assert (held - 1) * BLOCK_TOKENS >= memory.context_tokens
    for shape in shapes:
        alone = cache_size(memory, [shape])
        assert bool(alone.fitting) == (memory.request_bytes(shape) <= memory.room_bytes(shape))


@given(memory=memories(), factor=st.floats(1.0, 10.0))
def test_more_memory_never_gives_less(memory: EngineMemory, factor: float) -> None:
    shape = shapes_of(memory.model)[0]
    more = replace(memory, device_bytes=memory.device_bytes * factor)
    assert cache_size(more, [shape]).cache_bytes >= cache_size(memory, [shape]).cache_bytes


@given(memory=memories(), share=st.floats(0.0, 1.0))
def test_the_context_that_is_proposed_fits_and_the_next_block_does_not(
    memory: EngineMemory, share: float
) -> None:
    shape = shapes_of(memory.model)[0]
    cache = share * 1e11
    held = memory.held_tokens(shape, cache)
    assume(held > 0)
    assert memory.request_bytes(shape, held) <= cache + 1
    assert memory.request_bytes(shape, held + 1) > cache


@given(memory=memories(), counts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_replicas_of_a_plan_share_one_memory(memory: EngineMemory, counts: list[int]) -> None:
    shapes = shapes_of(memory.model)
    planned = [(shapes[n % len(shapes)], n * 2) for n in counts]
    size = shared_cache_bytes(memory, memory.device_bytes, planned)
    need = max(memory.request_bytes(shape) for shape, _ in planned)
    total = sum(count * (memory.fixed_bytes(shape) + size) for shape, count in planned)
    assert size >= need
    # More than the least only in the half that serving may fill.
    assert size == need or total <= memory.device_bytes / 2 + 1


def test_a_small_model_gets_eight_requests_and_no_more() -> None:
    memory = EngineMemory(
        model=SMOLLM2, context_tokens=8192, device_bytes=12 * GIB, copies=2, engine_bytes=0.7e9
    )
    shape = ReplicaShape(precision=Precision.FP32, max_num_batched_tokens=2048, max_num_seqs=32)
    # 30 layers x 2 x 3 heads x 64 x 4 bytes = 46,080 bytes a token, and 8,192 + 128 tokens.
    assert memory.request_bytes(shape) == 46_080 * 8320
    assert cache_size(memory, [shape]).cache_bytes == 8 * 46_080 * 8320
    assert memory.held_tokens(shape, 256 << 20) == 5632
    tight = replace(memory, device_bytes=2.7 * GIB)
    assert cache_size(tight, [shape]).cache_bytes == 46_080 * 8320


def test_a_precision_that_does_not_fit_does_not_take_the_others_with_it() -> None:
    wide, narrow = (
        ReplicaShape(precision=precision, max_num_batched_tokens=2048, max_num_seqs=32)
        for precision in (Precision.FP32, Precision.INT8)
    )
    memory = EngineMemory(
        model=SMOLLM2, context_tokens=8192, device_bytes=1.8 * GIB, copies=2, engine_bytes=0.7e9
    )
    found = cache_size(memory, [wide, narrow])
    assert (found.fitting, found.misfits) == ((narrow,), (wide,))


def test_memory_fit_agrees() -> None:
    shape = ReplicaShape(precision=Precision.BF16, max_num_batched_tokens=2048, max_num_seqs=32)
    fit = memory_fit(SMOLLM2, shape, 80 * GIB)
    memory = EngineMemory(
        model=SMOLLM2, context_tokens=8192, device_bytes=80.0 * GIB, engine_bytes=2e9
    )
    assert fit.weights_bytes + fit.reserve_bytes == memory.fixed_bytes(shape)
    assert fit.kv_tokens == int(memory.room_bytes(shape) / fit.kv_bytes_per_token)


@given(size=st.floats(0.0, 1e13))
def test_of_an_unknown_model_a_part_within_bounds(size: float) -> None:
    assert 64 << 20 <= blind_cache_bytes(size) <= 4 << 30
