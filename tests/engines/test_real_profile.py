"""``oserve profile`` on a real engine, with few steps."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from oserve.cli import app
from oserve.config import load_settings
from oserve.core import Precision, ReplicaShape
from oserve.engines.devices import split_cores
from oserve.perf.known_models import find_model
from oserve.profiler.brief import measure_briefly, shapes_to_measure
from oserve.profiler.client import EngineClient
from oserve.profiler.profile import (
    ProfileReporter,
    measure_engine,
    started_engine,
    temporary_cluster,
)
from oserve.startup.deployment import prepare

pytestmark = pytest.mark.engine

MiB = 1024 * 1024


async def test_an_engine_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    settings = load_settings(
        None, {"model": str(tiny_model), "engines.log_dir": str(tmp_path)}, environment={}
    )
    devices = split_cores(sorted(os.sched_getaffinity(0)), 2)
    shape = ReplicaShape(
        precision=Precision.FP32,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 * MiB,
    )
    model = find_model(str(tiny_model))
    begun: list[int] = []
    done: list[int] = []
    report = ProfileReporter(begin=lambda _name, steps: begun.append(steps), advance=done.append)
    async with (
        temporary_cluster(settings, devices) as cluster,
        started_engine(cluster, devices, shape) as state,
    ):
        entry, facts = await measure_engine(
            state.endpoint, model, "cpu", shape, rounds=1, report=report, check_contention=False
        )
        async with EngineClient(state.endpoint, vocab=model.vocab) as client:
            assert await client.facts() == facts
    assert entry.kv_tokens == facts.kv_tokens == 64 * MiB // 4096
    assert entry.kv_cache_memory_bytes == 64 * MiB
    assert (entry.max_model_len, facts.version) == (8192, "vLLM 0.32.0")
    assert sum(done) == begun[0] == len(entry.steps)
    assert all(0 < step.seconds < 60 for step in entry.steps)
    assert {step.decode_seqs for step in entry.steps} == {0, 1, 2, 4}
    assert {step.prefill_tokens for step in entry.steps} >= {16, 64, 256}
    assert all(value >= 0 for value in entry.coefficients.values())


async def test_a_brief_measurement_is_kept_and_planned_with(
    tiny_model: Path, tmp_path: Path
) -> None:
    """No profile that is shipped knows the tiny model in bf16."""
    given = {
        "model": str(tiny_model),
        "state_dir": str(tmp_path),
        "cluster.devices": "cpu",
        "cluster.cpu_slots": 2,
        "planning.precisions": ["bf16"],
    }
    settings = load_settings(None, given, environment={})
    shapes = shapes_to_measure(settings)
    lines: list[str] = []
    # Long, since this must not fail on a slow machine: with time enough nothing is left out.
    await measure_briefly(
        settings, shapes, report=ProfileReporter(line=lines.append), limit_s=300.0
    )
    assert not [line for line in lines if "left out" in line], lines
    assert shapes_to_measure(settings) == ()
    deployment = prepare(settings)
    assert "measured briefly" in deployment.why
    assert {spec.shape.precision for spec in deployment.plan.replicas} == {Precision.BF16}


def test_bad_wishes_are_two_lines(tmp_path: Path, tiny_model: Path) -> None:
    model = str(tiny_model)
    for arguments in (
        ["no-such-model"],
        [model, "--shape", "tp2"],
        [model, "--shape", "tp0-fp32"],
        [model, "--shape", "tp1-fp12"],
        [model, "--url", "http://127.0.0.1:9"],
        [model, "--url", "http://127.0.0.1:9", "--shape", "tp1-fp32"],
    ):
        result = CliRunner().invoke(app, ["profile", *arguments, "--output", str(tmp_path / "p")])
        assert type(result.exception).__name__ == "OServeError", (arguments, result)
    assert not (tmp_path / "p").exists()
