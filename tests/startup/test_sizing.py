"""What does not fit is said before anything starts; what is planned is what engines get."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from oserve.cli import app
from oserve.config import load_settings
from oserve.core import OServeError
from oserve.perf.profile import ProfileSource
from oserve.startup.deployment import ServerDeployment, prepare
from oserve.startup.plan_check import check_engines

MiB = 1 << 20


def prepared(model: str, folder: Path, **more: object) -> ServerDeployment:
    given = {
        "model": model,
        "state_dir": str(folder / "state"),
        "cluster.devices": "cpu",
        "cluster.cpu_slots": 2,
        "cluster.cpu_flags": "avx2",
        # Short of the usual mix, which takes a while to be made up and sorted into types.
        "planning.rates": "100x50=1",
        **more,
    }
    return prepare(load_settings(None, given, {}))


def test_planner_and_engines_go_by_one_size(model: str, tmp_path: Path) -> None:
    made = prepared(model, tmp_path)
    size = made.settings.engines.kv_cache_memory_bytes
    # Eight requests of 8,192 tokens and a block, 4 KiB of fp32 each.
    assert size == 8 * 8320 * 4096
    assert made.sized
    assert made.plan_request is not None
    assert isinstance(made.plan_request.source, ProfileSource)
    shape = made.plan.replicas[0].shape
    assert shape.kv_cache_memory_bytes is None
    assert made.plan_request.source.kv_tokens(shape) == pytest.approx(8 * 8320, abs=128)
    assert any("8.0 requests" in note for note in made.notes)


def test_a_size_that_is_set_is_not_touched(model: str, tmp_path: Path) -> None:
    made = prepared(model, tmp_path, **{"engines.kv_cache_memory_bytes": 64 * MiB})
    assert made.settings.engines.kv_cache_memory_bytes == 64 * MiB
    assert not made.sized


def test_free_memory_does_not_change_which_plan_is_resumed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assumed = {"planning.rates": ""}
    roomy = prepared(model, tmp_path, **assumed)
    monkeypatch.setattr("oserve.startup.sizing.available_memory_bytes", lambda: 2 << 30)
    tight = prepared(model, tmp_path, **assumed)
    assert tight.fingerprint == roomy.fingerprint
    size, before = (made.settings.engines.kv_cache_memory_bytes for made in (tight, roomy))
    assert size is not None
    assert before is not None
    assert size < before
    # One request of the whole context fits, but no long ones side by side: served all the same.
    assert "no shape has KV cache" in tight.why
    assert len(tight.plan.replicas) == 2
    with pytest.raises(OServeError, match="no shape has KV cache"):
        prepared(model, tmp_path, **{"planning.rates": "8000x100=1"})


@pytest.mark.parametrize(
    ("changes", "place", "remedy"),
    [
        ({"engines.max_model_len": 50_000_000}, "memory", "engines.max_model_len to at most"),
        (
            {"engines.kv_cache_memory_bytes": 8 * MiB},
            "engines.kv_cache_memory_bytes",
            "leave it out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_set(
    model: str, tmp_path: Path, changes: dict[str, object], place: str, remedy: str
) -> None:
    with pytest.raises(OServeError) as caught:
        prepared(model, tmp_path, **changes)
    assert caught.value.place == place
    assert remedy in (caught.value.remedy or "")


def test_validate_and_serve_refuse_a_model_that_is_too_large(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = ["--set", "cluster.devices=cpu", "--set", f"state_dir={tmp_path / 'state'}"]
    for command in (["validate", "--model", str(folder)], ["serve", str(folder)]):
        found = CliRunner().invoke(app, [*command, *words, "--cpu-slots", "2"])
        assert found.exit_code != 0
        assert isinstance(found.exception, OServeError)
        assert "GiB" in found.exception.message
        assert found.exception.remedy


def test_a_plan_that_is_given_is_checked(model: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "replicas: [{id: a, devices: ['cpu:0'], shape: {precision: fp32, "
        "kv_cache_memory_bytes: 1000000}}]"
    )
    with pytest.raises(OServeError, match="replica a"):
        prepared(model, tmp_path, plan=str(plan))
    plan.write_text("replicas: [{id: a, devices: ['cpu:0'], shape: {precision: fp32}}]")
    made = prepared(model, tmp_path, plan=str(plan))
    assert made.settings.engines.kv_cache_memory_bytes == 8 * 8320 * 4096


def test_a_plan_to_switch_to_is_checked_too(model: str, tmp_path: Path) -> None:
    made = prepared(model, tmp_path)
    replicas = [
        replace(spec, shape=replace(spec.shape, kv_cache_memory_bytes=1 * MiB))
        for spec in made.plan.replicas
    ]
    check_engines(made.plan, made.devices, made.settings)
    with pytest.raises(OServeError, match="whole context"):
        check_engines(replace(made.plan, replicas=tuple(replicas)), made.devices, made.settings)
