"""Profiles: fitting, files, and the source they make."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from oserve.core import OServeError, Precision, ReplicaShape, WorkloadType
from oserve.perf.device import find_device
from oserve.perf.model import ModelFacts
from oserve.perf.profile import (
    FORMAT,
    Profile,
    ProfileEntry,
    ProfileSource,
    ProfileStep,
    decode_profile,
    merged,
    read_profile,
    shape_key,
    shipped_profile,
    write_profile,
)
from oserve.perf.profile_fit import fit_entry
from oserve.perf.roofline import Coefficients, Roofline
from oserve.perf.table import performance_table

TINY = ModelFacts(
    name="tiny",
    layers=4,
    hidden=256,
    heads=8,
    kv_heads=4,
    head_dim=32,
    intermediate=704,
    vocab=320,
    max_model_len=8192,
)
TRUE = Coefficients(
    gemm=0.4,
    memory=0.2,
    kv=0.6,
    attention=0.4,
    all_reduce=0.1,
    all_reduce_latency_s=4e-4,
    layer_s=0.0,
    mixed_s=6e-4,
    step_s=8e-3,
    sequence_s=2e-4,
    hop_s=2e-3,
    wake_s=9e-3,
)
LOADS = [
    *((float(n), n * n / 2, 0.0, 0.0) for n in (16, 64, 256, 512, 1024, 2048)),
    *((0.0, 0.0, float(b), float(b * c)) for b in (1, 2, 4, 8, 16, 32) for c in (48, 1036)),
    *((float(n), n * n / 2, float(b), b * 90.0) for b in (4, 16) for n in (64, 512, 1536)),
]
UNSEEN = [
    (300.0, 45000.0, 12.0, 5000.0),
    (0.0, 0.0, 24.0, 24.0 * 700),
    (1000.0, 500000.0, 0.0, 0.0),
    (40.0, 800.0, 2.0, 300.0),
]


def true_model(tp: int = 1, pp: int = 1) -> Roofline:
    return Roofline(
        TINY,
        find_device("cpu"),
        TRUE,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=Precision.FP32,
    )


def steps_of(model: Roofline, noise: float = 0.0) -> tuple[ProfileStep, ...]:
    draw = random.Random(3)
    return tuple(
        ProfileStep(
            prefill_tokens=a,
            attended_tokens=b,
            decode_seqs=c,
            kv_tokens=d,
            seconds=float(model.step_s(a, b, c, d)) * (1 + noise * draw.uniform(-1, 1)),
        )
        for a, b, c, d in LOADS
    )


def entry(tp: int = 1, pp: int = 1, precision: Precision = Precision.FP32) -> ProfileEntry:
    steps = steps_of(true_model(tp, pp))
    return ProfileEntry(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=precision,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        max_model_len=8192,
        kv_cache_memory_bytes=1 << 28,
        kv_tokens=65536 * tp,
        coefficients=TRUE.as_dict(),
        error_percent=0.0,
        steps=steps,
    )


def profile(*entries: ProfileEntry) -> Profile:
    return Profile(
        model=TINY,
        device_kind="cpu",
        machine="a processor",
        cores_per_device=1,
        engine="vLLM 0.32.0",
        entries=entries or (entry(), entry(tp=2)),
    )


def shape(**fields: Any) -> ReplicaShape:
    return ReplicaShape(**{"precision": Precision.FP32, "device_kind": "cpu", **fields})


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.01), (0.1, 0.1)])
def test_a_fit_predicts_steps_it_has_not_seen(tp: int, pp: int, noise: float, most: float) -> None:
    truth = true_model(tp, pp)
    key = (tp, pp, Precision.FP32)
    found, error_percent = fit_entry(TINY, "cpu", key, steps_of(truth, noise))
    assert error_percent <= 100 * max(noise, 0.01)
    fitted = profile(replaced(entry(tp, pp), coefficients=found.as_dict()))
    model = ProfileSource(fitted, name="x").step_model(
        shape(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    )
    for load in UNSEEN:
        assert float(model.step_s(*load)) == pytest.approx(float(truth.step_s(*load)), rel=most)


@pytest.mark.slow
def test_a_fit_finds_what_only_some_steps_tell() -> None:
    found, _ = fit_entry(TINY, "cpu", (1, 1, Precision.FP32), steps_of(true_model()))
    assert found.wake_s == pytest.approx(TRUE.wake_s, rel=0.1)
    assert found.mixed_s == pytest.approx(TRUE.mixed_s, rel=0.1)
    assert found.kv == pytest.approx(TRUE.kv, rel=0.1)
    assert found.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.2)
    decoding = [step for step in steps_of(true_model()) if not step.prefill_tokens]
    found, _ = fit_entry(TINY, "cpu", (1, 1, Precision.FP32), decoding)
    assert (found.wake_s, found.mixed_s) == (0.0, 0.0)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(OServeError, match="too few"):
        fit_entry(TINY, "cpu", (1, 1, Precision.FP32), steps_of(true_model())[:5])


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "profile.json"
    write_profile(path, profile())
    assert read_profile(path) == profile()
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    write_profile(path, profile(entry()))
    assert read_profile(path) == profile(entry())


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OServeError, match="cannot write") as caught:
        write_profile(tmp_path / "file" / "profile.json", profile())
    assert "profile.json" in caught.value.place
    with pytest.raises(OServeError, match="cannot read") as caught:
        read_profile(tmp_path / "none.json")
    assert "none.json" in caught.value.place


def changed(change: Callable[[Any], None]) -> bytes:
    content = msgspec.json.decode(msgspec.json.encode(profile()))
    change(content)
    return msgspec.json.encode(content)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"{", "p.json"),
        (b"[]", "p.json"),
        (b"{}", "p.json"),
        (changed(lambda c: c.update(format=FORMAT + 1)), "p.json: format"),
        (changed(lambda c: c.pop("machine")), "p.json"),
        (changed(lambda c: c.update(colour=1)), "p.json"),
        (changed(lambda c: c["model"].pop("layers")), "p.json: model"),
        (changed(lambda c: c["entries"][1].update(kv_tokens=0)), "p.json: entries[1].kv_tokens"),
        (
            changed(lambda c: c["entries"][0].update(precision="fp12")),
            "p.json: entries[0].precision",
        ),
        (
            changed(lambda c: c["entries"][0]["steps"][0].update(seconds=-1)),
            "p.json: entries[0].steps[0].seconds",
        ),
        (
            changed(lambda c: c["entries"][0]["coefficients"].update(speed=1)),
            "p.json: entries[0].coefficients.speed",
        ),
        (
            changed(lambda c: c["entries"][0]["coefficients"].update(gemm=0)),
            "p.json: entries[0].coefficients.gemm",
        ),
        (changed(lambda c: c["entries"].append(c["entries"][0])), "p.json: entries[2]"),
    ],
)
def test_bad_files_are_refused_by_field(content: bytes, place: str) -> None:
    with pytest.raises(OServeError) as caught:
        decode_profile(content, place="p.json")
    assert caught.value.place == place
    assert caught.value.remedy


def replaced(old: ProfileEntry, **changes: Any) -> ProfileEntry:
    return msgspec.structs.replace(old, **changes)


def test_new_entries_replace_old_ones_of_the_same_machine_only() -> None:
    old = profile(entry(), entry(tp=2))
    again = replaced(entry(tp=2), kv_tokens=7)
    assert merged(old, profile(again)).entries == (entry(), again)
    elsewhere = msgspec.structs.replace(profile(again), machine="another")
    assert merged(old, elsewhere) == elsewhere


def test_a_source_knows_what_was_measured_and_nothing_else() -> None:
    source = ProfileSource(profile(), name="mine.json")
    assert source.origin == (
        "profile mine.json: measured on a processor, 1 core a slot, vLLM 0.32.0"
    )
    assert source.keys() == ((1, 1, Precision.FP32), (2, 1, Precision.FP32))
    for missing in (
        shape(pipeline_parallel_size=2),
        shape(precision=Precision.BF16),
        shape(device_kind="H100"),
    ):
        assert source.kv_tokens(missing) == 0
        with pytest.raises(OServeError, match="not measured") as caught:
            source.step_model(missing)
        assert "oserve profile" in caught.value.remedy
    assert source.kv_tokens(shape(device_kind="any")) == 65536
    assert source.step_model(shape()) is source.step_model(shape(max_num_seqs=7))


def test_kv_tokens_follow_the_bytes_a_shape_sets() -> None:
    source = ProfileSource(profile(), name="x")
    assert source.kv_tokens(shape()) == 65536
    assert source.kv_tokens(shape(kv_cache_memory_bytes=1 << 28)) == 65536
    assert source.kv_tokens(shape(kv_cache_memory_bytes=1 << 27)) == 32768
    chosen = ProfileSource(profile(replaced(entry(), kv_cache_memory_bytes=None)), name="x")
    assert chosen.kv_tokens(shape()) == 65536
    # Four layers of four heads of 32 numbers, keys and values, four bytes each.
    assert chosen.kv_tokens(shape(kv_cache_memory_bytes=4096 * 100)) == 100


def test_a_table_is_made_of_measured_shapes_alone() -> None:
    source = ProfileSource(profile(), name="x")
    shapes = source.shapes(max_num_batched_tokens=(256, 1024), max_num_seqs=(8,))
    assert len(shapes) == 4
    assert {shape_key(item) for item in shapes} == set(source.keys())
    kind = WorkloadType(name="a", prompt_tokens=100, output_tokens=50, arrival_rate_rps=1.0)
    rows = performance_table(source, (*shapes, shape(pipeline_parallel_size=2)), [kind])
    assert [row.shape for row in rows] == list(shapes)
    assert all(row.capacity_rps[0] > 0 and row.power_w > 0 for row in rows)


@pytest.mark.slow
def test_shipped_profiles_are_found_by_sizes() -> None:
    found = shipped_profile(replace(TINY, name="anything", max_model_len=100), "cpu")
    assert found is not None
    name, made = found
    assert name == "tiny-llama-cpu"
    assert {(1, 1, Precision.FP32), (1, 1, Precision.INT8), (2, 1, Precision.FP32)} <= {
        item.key for item in made.entries
    }
    for item in made.entries:
        # The file's coefficients are those that its own steps give.
        _, error_percent = fit_entry(made.model, made.device_kind, item.key, item.steps)
        assert error_percent == pytest.approx(item.error_percent, abs=1.0)
    assert shipped_profile(TINY, "H100") is None
    assert shipped_profile(replace(TINY, layers=5), "cpu") is None
