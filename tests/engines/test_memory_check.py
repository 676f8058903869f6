"""What fits is told before anything starts, with what to set where it does not."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import (
    AttachedBackend,
    Device,
    OServeError,
    Precision,
    ReplicaShape,
    ReplicaSpec,
    VllmBackend,
)
from oserve.engines.memory_check import MemoryCheck, cache_sized, with_settings
from oserve.engines.settings import EngineSettings
from oserve.perf.known_models import find_model
from oserve.perf.model import ModelFacts

GIB = 1 << 30
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


def shape(
    precision: Precision = Precision.FP32, tp: int = 1, kv: int | None = None
) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=tp,
        precision=precision,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        kv_cache_memory_bytes=kv,
    )


def spec(name: str, own: ReplicaShape, *arguments: str) -> ReplicaSpec:
    devices = tuple(f"{name}:{index}" for index in range(own.device_count))
    backend = VllmBackend(engine_args=arguments)
    return ReplicaSpec(id=name, shape=own, devices=devices, backend=backend)


def room(
    free: float, *, slots: int = 2, model: ModelFacts | None = SMOLLM2, **settings: object
) -> MemoryCheck:
    return MemoryCheck(
        settings=msgspec.convert(settings, EngineSettings),
        devices=tuple(Device(id=f"cpu:{n}", kind="cpu") for n in range(slots)),
        model=model,
        free_bytes=free,
    )


def sized(given: MemoryCheck, *specs: ReplicaSpec) -> MemoryCheck:
    return with_settings(given, given.sized((), specs)[0])


def refused(given: MemoryCheck, *specs: ReplicaSpec) -> OServeError:
    with pytest.raises(OServeError) as caught:
        sized(given, *specs).check(specs)
    assert caught.value.remedy
    return caught.value


def test_defaults_fit_the_first_time() -> None:
    given = room(20.0 * GIB)
    specs = [spec("a", shape()), spec("b", shape(Precision.INT8))]
    made = sized(given, *specs)
    made.check(specs)
    assert made.settings.kv_cache_memory_bytes == 8 * 46_080 * 8320
    assert "8.0 requests" in made.notes(specs)[0]


def test_a_size_that_is_set_stays_and_must_hold_a_request() -> None:
    given = room(20.0 * GIB, kv_cache_memory_bytes=256 << 20)
    assert given.sized([shape()])[0].kv_cache_memory_bytes == 256 << 20
    assert given.sized([shape(), shape(Precision.BF16)])[1] == (shape(Precision.BF16),)
    error = refused(given, spec("a", shape()))
    assert error.place == "engines.kv_cache_memory_bytes"
    assert "replica a" in error.message
    assert "8,192 tokens" in error.message
    assert str(46_080 * 8320) in (error.remedy or "")
    assert "engines.max_model_len to at most 5632" in (error.remedy or "")
    # The same where the shape sets it.
    assert "replica b" in refused(room(20.0 * GIB), spec("b", shape(kv=1 << 20))).message


@given(
    free=st.floats(1.0, 40.0),
    context=st.sampled_from([2048, 8192, 32_768, 131_072]),
    size=st.sampled_from([0, 1 << 24, 1 << 28, 1 << 30, 1 << 34]),
    slots=st.integers(1, 4),
    precision=st.sampled_from([Precision.FP32, Precision.INT8]),
)
def test_what_is_proposed_helps(
    free: float, context: int, size: int, slots: int, precision: Precision
) -> None:
    """Each remedy that names a setting and its value is enough alone."""
    given = room(free * GIB, slots=slots, max_model_len=context, kv_cache_memory_bytes=size or None)
    specs = [spec(f"r{n}", shape(precision)) for n in range(slots)]
    error = fault(given, specs)
    for part in (error.remedy or "").split("; or ") if error else ():
        found = re.search(r"set engines\.(\w+) to at (?:least|most) (\d+)", part)
        if found is None or error is None:
            continue
        changed = {found[1]: int(found[2])}
        if "leave engines.kv_cache_memory_bytes out" in part and found[1] == "max_model_len":
            changed["kv_cache_memory_bytes"] = 0
        settings = msgspec.structs.replace(given.settings, **changed)
        again = fault(with_settings(given, settings), specs)
        # A cache that was too small may be too large for the memory: another fault, told next.
        small = error.place == "engines.kv_cache_memory_bytes"
        assert again is None or (small and again.place != error.place)


def fault(given: MemoryCheck, specs: list[ReplicaSpec]) -> OServeError | None:
    try:
        sized(given, *specs).check(specs)
    except OServeError as error:
        return error
    return None


def test_too_many_replicas_for_the_memory() -> None:
    specs = [spec(f"r{n}", shape()) for n in range(4)]
    error = refused(room(4.0 * GIB, slots=4), *specs)
    assert "4 replicas need" in error.message
    assert "fewer replicas" in (error.remedy or "")
    # Two of them fit.
    sized(room(6.0 * GIB, slots=2), *specs[:2]).check(specs[:2])


def test_shapes_that_do_not_fit_are_left_out_and_named() -> None:
    given = room(4.0 * GIB)
    engines, fitting = given.sized([shape(), shape(Precision.INT8)])
    assert fitting == (shape(Precision.INT8),)
    made = with_settings(given, engines)
    assert "tp1-fp32 left out" in made.left_out([shape()])
    none = room(1.5 * GIB)
    assert none.sized([shape(), shape(Precision.INT8)])[1] == ()
    closest = none.closest([shape(), shape(Precision.INT8)])
    assert closest.precision is Precision.INT8
    assert "cluster.cpu_slots=1" in (none.refusal(closest).remedy or "")
    hopeless = room(0.4 * GIB)
    assert "free memory" in (hopeless.refusal(shape()).remedy or "")


def test_weights_kept_for_switches_count_twice() -> None:
    big = find_model("llama-3.1-8b")
    given = room(30.0 * GIB, slots=1, model=big, max_model_len=8192)
    error = given.refusal(shape(Precision.BF16))
    assert "engines.keep_weights to false" in (error.remedy or "")
    once = room(30.0 * GIB, slots=1, model=big, max_model_len=8192, keep_weights=False)
    assert once.sized([shape(Precision.BF16)])[1] == (shape(Precision.BF16),)


def test_a_plan_may_leave_slots_empty() -> None:
    """Main memory belongs to whoever runs, not to slots."""
    big = find_model("llama-3.1-8b")
    given = room(60.0 * GIB, slots=8, model=big, max_model_len=4096)
    specs = [spec("one", shape(Precision.BF16))]
    sized(given, *specs).check(specs)
    assert given.sized([shape(Precision.BF16)])[1] == ()


def test_arguments_that_replicas_hand_to_vllm_are_theirs() -> None:
    for word in ("--max-model-len=512", "--kv-cache-memory-bytes"):
        sized(room(0.1 * GIB), spec("a", shape(), word)).check([spec("a", shape(), word)])
    attached = ReplicaSpec(
        id="x", shape=shape(), devices=(), backend=AttachedBackend(url="http://127.0.0.1:1")
    )
    given = sized(room(0.1 * GIB), attached)
    given.check([attached])
    assert given.settings.kv_cache_memory_bytes is None


def test_of_an_unknown_model_nothing_is_claimed() -> None:
    given = room(8.0 * GIB, model=None)
    made = sized(given, spec("a", shape()))
    made.check([spec("a", shape())])
    assert made.settings.kv_cache_memory_bytes == int(0.2 * 4 * GIB)
    assert "nothing is known" in made.notes([spec("a", shape())])[0]


def test_on_gpus_what_vllm_will_have_left_must_hold_a_request() -> None:
    model = find_model("llama-3.1-8b")
    devices = tuple(
        Device(id=f"gpu:{n}", kind="L4", memory_bytes=24 * 10**9, node="n") for n in range(2)
    )
    given = MemoryCheck(settings=EngineSettings(), devices=devices, model=model, free_bytes=0.0)
    wide = ReplicaShape(
        precision=Precision.BF16, max_num_batched_tokens=2048, max_num_seqs=64, device_kind="L4"
    )
    engines, fitting = given.sized([wide])
    assert (engines.kv_cache_memory_bytes, fitting) == (None, ())
    error = refused(given, spec("a", wide))
    assert f"{model.max_model_len:,} tokens" in error.message
    assert "tensor_parallel_size" in (error.remedy or "")
    found = re.search(r"engines\.max_model_len to at most (\d+)", error.remedy or "")
    assert found is not None
    short = EngineSettings(max_model_len=int(found[1]))
    with_settings(given, short).check([spec("a", wide)])
    # Of a device that does not tell its memory nothing is known.
    silent = MemoryCheck(
        settings=EngineSettings(),
        devices=(Device(id="gpu:0", kind="L4"),),
        model=model,
        free_bytes=0.0,
    )
    silent.check([spec("a", wide)])


def test_an_engine_that_nobody_sized_gets_what_fits_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oserve.engines.memory_check.available_memory_bytes", lambda: 16 * GIB)
    devices = [Device(id="cpu:0", kind="cpu")]
    found = cache_sized(EngineSettings(), "nobody/knows", devices, shape())
    assert found.kv_cache_memory_bytes == int(0.2 * 16 * GIB)
    assert cache_sized(found, "nobody/knows", devices, shape()) is found
