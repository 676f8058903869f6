"""``oserve plan`` from words to plan: what it answers, what it writes, what it refuses."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from oserve.cli import main
from oserve.config import load_cluster, load_plan
from oserve.plan import check_plan
from oserve.traces import synthesise

RATES = "200x150=4,3000x60=2"
SLO = ["--slo-ttft-ms", "2000", "--slo-tpot-ms", "100"]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The plan for capacity, without the ladder."""
    run("plan", *words, "--no-ladder", "--json")
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def run(*words: str) -> None:
    before = sys.argv
    sys.argv = ["oserve", *words]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = before


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of bad input: exit code 2, place and remedy, and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        run("plan", *words)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "remedy" in said.err
    assert "Traceback" not in said.err
    assert not said.out
    return said.err


def trace(path: Path, *, rate_rps: float = 5.0, duration_s: float = 120.0) -> Path:
    rows = ["arrival_s,input_tokens,output_tokens"]
    rows += [
        f"{item.arrival_s:.3f},{item.prompt_tokens},{item.output_tokens}"
        for item in synthesise(rate_rps=rate_rps, duration_s=duration_s, seed=1)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_json_says_all_that_was_decided(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--model", "llama-2-70b", "--cluster", "2x8xH100", "--rates", RATES, *SLO)
    used = [name for replica in found["replicas"] for name in replica["devices"]]
    assert len(used) == len(set(used)) <= 16
    for replica in found["replicas"]:
        shape = replica["shape"]
        size = shape["tensor_parallel_size"] * shape["pipeline_parallel_size"]
        assert len(replica["devices"]) == size
        assert shape["precision"] == "bf16"
        assert shape["max_num_batched_tokens"] > 0
        assert shape["max_num_seqs"] > 0
        assert 0 <= replica["utilisation"] <= 1 + 1e-6
    assert {item["name"] for item in found["types"]} == {"200x150", "3000x60"}
    for shares in found["routing_shares"].values():
        assert sum(shares.values()) == pytest.approx(1.0)
    assert found["predicted"]["demand_rps"] == pytest.approx(6.0)
    assert found["predicted"]["goodput_rps"] <= found["predicted"]["served_rps"] + 1e-9
    assert found["scale"] >= found["baseline"]["scale"] - 1e-6
    assert found["gain"] >= 1 - 1e-6
    assert found["optimality_gap"] <= 1e-3
    assert found["search"] == "exact"
    assert found["solve_seconds"] >= 0
    assert len(found["vllm"]) == len(found["replicas"])


def test_the_written_plan_is_one_that_serve_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    source = trace(tmp_path / "trace.csv")
    run(
        *("plan", "--model", "llama-3.1-8b", "--cluster", "4xL40S", "--trace", str(source)),
        *("--output", str(file), "--explain", "--no-ladder"),
    )
    said = capsys.readouterr().out
    assert "proved optimal" in said
    assert "vllm serve" in said
    written = load_plan(str(file))
    check_plan(written, load_cluster("4xL40S").devices, place=str(file))


@pytest.mark.parametrize("search", ["exact", "flow", "brute"])
def test_the_searches_agree_on_a_small_cluster(
    search: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-num-batched-tokens", "2048", "--max-num-seqs", "256"]
    words = ["--model", "llama-3.1-8b", "--cluster", "4xH100", "--rates", RATES, *few]
    exact = plan(capsys, *words, "--search", "exact")
    found = plan(capsys, *words, "--search", search)
    assert found["search"] == search
    assert found["scale"] == pytest.approx(exact["scale"], rel=0.05)
    assert found["scale"] <= exact["scale"] * (1 + 1e-6)


@pytest.mark.slow
def test_tighter_slos_and_more_traffic_never_help(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama-2-70b", "--cluster", "8xH100", "--rates", RATES]
    free = plan(capsys, *words)
    held = plan(capsys, *words, *SLO)
    own = plan(capsys, *words, *SLO, "--slo", "3000x60=1500/80")
    assert free["scale"] >= held["scale"] >= own["scale"] > 0
    double = plan(capsys, *words, *SLO, "--rate-scale", "2")
    assert double["scale"] == pytest.approx(held["scale"] / 2, rel=1e-3)


def test_overload_is_planned_for_the_rate_served(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(
        capsys,
        "--model",
        "llama-2-70b",
        "--cluster",
        "4xH100",
        "--rates",
        RATES,
        "--rate-scale",
        "50",
    )
    assert found["scale"] < 1
    assert 0 < found["predicted"]["goodput_rps"] < found["predicted"]["demand_rps"]


def test_a_plan_stays_with_the_current_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama-2-70b", "--cluster", "2x8xH100", "--rates", RATES]
    file = tmp_path / "current.yaml"
    first = plan(capsys, *words, "--output", str(file))
    again = plan(capsys, *words, "--current", str(file))

    def where(found: dict[str, Any]) -> dict[str, list[str]]:
        return {item["id"]: item["devices"] for item in found["replicas"]}

    assert where(again) == where(first)


def test_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.svg"
    words = ["--model", "qwen3-8b", "--cluster", "2xL4", "--rates", RATES, "--no-ladder"]
    run("plan", *words, "--plot", str(file))
    assert file.stat().st_size > 1000
    capsys.readouterr()


def test_one_request_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.csv"
    file.write_text("arrival_s,input_tokens,output_tokens\n5.0,100,20\n")
    found = plan(capsys, "--model", "llama-3.1-8b", "--cluster", "1xL4", "--trace", str(file))
    assert len(found["types"]) == 1
    assert found["types"][0]["arrival_rate_rps"] == pytest.approx(1.0)
    assert any("one request" in note for note in found["notes"])


def test_requests_beyond_the_context_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(
        capsys,
        *("--model", "opt-30b", "--cluster", "8xA100", "--trace", str(trace(tmp_path / "t.csv"))),
    )
    assert any("longer than the context of 2,048 tokens" in note for note in found["notes"])
    assert all(item["prompt_tokens"] + item["output_tokens"] <= 2048 for item in found["types"])


BASE = ["--model", "llama-2-70b", "--cluster", "8xH100", "--rates", RATES]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "llama-2-70b", "--cluster", "1xL4", "--rates", RATES], "are missing"),
        (["--model", "llama-2-70b", "--cluster", "0xH100", "--rates", RATES], "empty cluster"),
        (["--model", "lama", "--cluster", "8xH100", "--rates", RATES], "nothing is known"),
        (["--model", "llama-2-70b", "--cluster", "8xH100", "--rates", "8x8=nan"], "nan"),
        (["--model", "llama-2-70b", "--cluster", "8xH100", "--rates", "8x8=0"], "zero traffic"),
        (["--model", "llama-2-70b", "--cluster", "8xH100"], "a trace or from --rates"),
        (["--model", "llama-2-70b", "--cluster", "8xH100", "--trace", "absent.csv"], "cannot read"),
        ([*BASE, "--slo-ttft-ms", "1"], "closest feasible one is about --slo-ttft-ms"),
        ([*BASE, "--slo-tpot-ms", "1"], "closest feasible one is about --slo-tpot-ms"),
        ([*BASE, "--slo-tpot-ms", "-5"], "--slo-tpot-ms"),
        ([*BASE, "--slo", "chat=5/5"], "names no type"),
        ([*BASE, "--slo", "200x150=fast/5"], "it is nan"),
        ([*BASE, "--rate-scale", "nan"], "--rate-scale"),
        ([*BASE, "--headroom", "0.5"], "--headroom"),
        ([*BASE, "--enough-scale", "nan"], "--enough-scale"),
        ([*BASE, "--attainment", "1.5"], "--attainment"),
        ([*BASE, "--type-objective", "3000x60=speed"], "latency, energy, capacity"),
        ([*BASE, "--type-objective", "chat=energy"], "the types are 200x150, 3000x60"),
        ([*BASE, "--no-ladder", "--objective", "energy"], "without a ladder"),
        ([*BASE, "--no-ladder", "--plot-ladder", "l.png"], "leave out --no-ladder"),
        ([*BASE, "--tensor-parallel-size", "two"], "list of counts"),
        ([*BASE, "--no-ladder", "--output", "/proc/no/plan.yaml"], "cannot write"),
        (["--model", "llama-2-70b", "--cluster", "8xH100", "--rates", "4000x500=1"], "context"),
    ],
)
def test_bad_input_is_refused_with_place_and_remedy(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *words)


@pytest.mark.parametrize("bad", ["-5,10", "10,-5", "many,10", "1e99,4"])
def test_a_bad_row_is_named_or_skipped(
    bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trace(tmp_path / "bad.csv")
    lines = file.read_text().splitlines()
    place = random.Random(bad).randrange(2, len(lines))
    arrival = lines[place].split(",")[0]
    lines[place] = f"{arrival},{bad}"
    file.write_text("\n".join(lines) + "\n")
    words = ["--model", "llama-3.1-8b", "--cluster", "2xL40S", "--trace", str(file)]
    assert f"bad.csv:{place + 1}" in refused(capsys, *words)
    assert plan(capsys, *words, "--skip-bad-rows")["replicas"]


def test_the_closest_feasible_slo_is_feasible(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *BASE, "--slo-ttft-ms", "1", "--slo-tpot-ms", "1")
    offered = said.partition("about ")[2].split()[:4]
    assert plan(capsys, *BASE, *offered)["scale"] > 0
