"""The ladder of ``oserve plan``: what it prints, writes and draws, and what it chooses."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from oserve.cli import app
from oserve.config import load_plan

# Without the compiled kernel they take minutes.
pytestmark = pytest.mark.slow

# Few shapes and types, so that few simulations are needed.
FEW = [
    *("--model", "llama-3.1-8b", "--cluster", "4xL40S", "--types", "2"),
    *("--tensor-parallel-size", "1,4", "--pipeline-parallel-size", "1"),
    *("--max-num-batched-tokens", "512", "--max-num-seqs", "128"),
]
RATES = ["--rates", "300x40=8,1500x20=2"]
SLO = ["--slo-ttft-ms", "2000", "--slo-tpot-ms", "100"]


def run(*words: str) -> None:
    typer.main.get_command(app).main(["plan", *FEW, *words], standalone_mode=False)


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    run(*words, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def deployment(found: dict[str, Any]) -> str:
    """The replicas of a plan, written as the ladder writes them."""
    shapes = [item["shape"] for item in found["replicas"]]
    names = [
        "-".join(
            [
                f"tp{shape['tensor_parallel_size']}",
                shape["precision"],
                str(shape["max_num_batched_tokens"]),
            ]
        )
        for shape in shapes
    ]
    counts = {name: names.count(name) for name in sorted(names)}
    return " + ".join(f"{count} x {name}" for name, count in counts.items())


def test_latency_takes_the_fast_replicas_and_energy_the_fewest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    latency = document(capsys, *RATES, *SLO)
    energy = document(capsys, *RATES, *SLO, "--objective", "energy")
    capacity = document(capsys, *RATES, *SLO, "--objective", "capacity")
    plain = document(capsys, *RATES, *SLO, "--no-ladder")
    assert "ladder" not in plain
    assert capacity["replicas"] == plain["replicas"]
    assert capacity["routing_shares"] == plain["routing_shares"]
    ladders = [item["ladder"] for item in (latency, energy, capacity)]
    assert ladders[0]["chosen"]["p50_e2e_s"] <= ladders[1]["chosen"]["p50_e2e_s"]
    assert ladders[1]["chosen"]["joules_per_request"] <= ladders[0]["chosen"]["joules_per_request"]
    assert ladders[1]["rungs"][0]["devices"] < 4
    for found, ladder in zip((latency, energy, capacity), ladders, strict=True):
        assert deployment(found) == ladder["chosen"]["deployment"]
        assert [rung["load"] for rung in ladder["rungs"]] == [part / 10 for part in range(1, 14)]
        assert ladder["peak_rps"] == pytest.approx(10.0)
        assert ladder["headroom"] == 1.1
        for rung in ladder["rungs"]:
            assert rung["rate_rps"] == pytest.approx(10.0 * rung["load"])
            assert rung["power_w"] == pytest.approx(rung["rate_rps"] * rung["joules_per_request"])
    assert ladders[0]["linear_model"]["rungs"][0]["load"] == 0.1
    assert ladders[0]["linear_model"]["median_error"] >= 0


def test_each_type_has_its_objective_and_no_slo_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "ladder.svg"
    words = [*RATES, "--type-objective", "1500x20=energy", "--attainment", "0.9"]
    if pytest.importorskip("matplotlib"):
        words += ["--plot-ladder", str(picture)]
    found = document(capsys, *words)["ladder"]
    assert found["objectives"] == {"300x40": "latency", "1500x20": "energy"}
    assert found["attainment"] == 0.9
    assert found["holds"]
    assert picture.stat().st_size > 1000


def test_a_trace_is_planned_for_its_busiest_minute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, file = tmp_path / "trace.csv", tmp_path / "plan.yaml"
    arrivals = [2.0 * i for i in range(150)] + [300 + 0.25 * i for i in range(480)]
    rows = [f"{at:.2f},{300 if i % 3 else 900},{40}" for i, at in enumerate(arrivals)]
    trace.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]) + "\n")
    run(str(trace), *SLO, "--output", str(file))
    said = capsys.readouterr().out
    assert "the trace's busiest 67 s" in said
    assert "630 requests" in said
    assert "plan for capacity" in said
    assert "of peak" in said
    assert "is off by" in said
    written = load_plan(str(file))
    assert "chosen for the least latency" in file.read_text()
    for shares in written.routing_shares.values():
        assert set(shares) == {spec.id for spec in written.replicas}
