"""``oserve simulate`` from words to numbers: what it says, what it refuses, and twice the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oserve.cli import main
from oserve.study.compare import CompareOptions, compare
from oserve.study.policies import POLICIES
from study.scenes import small_scene

WORDS = [
    *("simulate", "--model", "qwen3-8b", "--cluster", "2xL40S", "--duration", "6"),
    *("--slo-ttft-ms", "1500", "--slo-tpot-ms", "80", "--jobs", "1"),
]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    before = sys.argv
    sys.argv = ["oserve", *WORDS, *words, "--json"]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = before
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_json_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    found = said(
        capsys,
        "--policies",
        "static-default,static-best-chunk",
        "--report",
        str(page),
        "--interval",
        "5",
    )
    assert [item["policy"] for item in found["policies"]] == ["static-default", "static-best-chunk"]
    for item in found["policies"]:
        for field in (
            *("p50_e2e_s", "p99_e2e_s", "p99_ttft_s", "p99_tpot_s", "throughput_rps"),
            *("goodput_rps", "slo_attainment", "max_rate_scale", "device_hours", "energy_joules"),
        ):
            assert item[field] > 0
        assert item["switches"] == item["lost"] == item["replayed"] == 0
    assert found["policies"][1]["max_rate_scale"] >= found["policies"][0]["max_rate_scale"]
    text = page.read_text()
    assert text.count("<svg") >= 6
    for outside in ("http://", "https://", "<script", "<link", "url("):
        assert outside not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--policies", "best"], "no policy 'best'"),
        (["--policies", ","], "no policy is named"),
        (["--rate-scale", "-1"], "--rate-scale"),
        (["--interval", "0"], "--interval"),
        (["--jobs", "0"], "--jobs"),
        (["--precisions", "bf17"], "--precisions"),
        (["--trace", "absent.csv"], "cannot read"),
        (["--cluster", "0xL40S"], "empty cluster"),
        (["--model", "quen"], "nothing is known"),
        (["--report", "/proc/no/page.html", "--policies", "static-default"], "cannot write"),
        (["--slo-ttft-ms", "1", "--policies", "static-best"], "no deployment"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        said(capsys, *words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert expected in captured.err
    assert "remedy" in captured.err
    assert "Traceback" not in captured.err


_PROGRAMME = """
import hashlib
from study.scenes import small_scene
from oserve.study.compare import CompareOptions, compare
scene = small_scene(duration_s=8.0, interval_s=3.0)
rows = compare([scene], ["oserve"], CompareOptions(scale=3.0, capacity=False))
print(hashlib.sha256(repr(rows).encode()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_decide_the_same_byte_for_byte() -> None:
    digests = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        path = [str(Path(__file__).parents[1]), *sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(item for item in path if item)
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAMME],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.append(done.stdout.strip())
    assert digests[0] == digests[1] != ""


@pytest.mark.slow
def test_processes_change_nothing() -> None:
    scene = small_scene(duration_s=10.0)
    names = ["static-default", "llmd"]
    wish = CompareOptions(scale=1.5, capacity=False)
    assert compare([scene], names, wish, jobs=2) == compare([scene], names, wish, jobs=1)


def test_every_policy_says_what_it_is() -> None:
    assert all(entry.words for entry in POLICIES.values())


def tiered_trace(tmp_path: Path) -> str:
    lines = ["arrival_s,input_tokens,output_tokens,tier,tenant"]
    for number in range(240):
        owner = "quiet" if number % 12 == 0 else "flood"
        tier = "bulk" if number % 3 == 0 else ""
        lines.append(f"{number / 60},{200 + number % 7},{40 + number % 5},{tier},{owner}")
    path = tmp_path / "tiers.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_results_by_tier_and_by_tenant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trace", tiered_trace(tmp_path), "--no-capacity", "--policies", "static-default"]
    by_tier = ["--tier", "tight=400/60/bf16", "--tier", "bulk=-/-"]
    found = said(capsys, *words, *by_tier)["policies"][0]
    tight, bulk = found["tiers"]
    assert (tight["tier"], tight["requests"]) == ("tight", 160)
    assert (bulk["tier"], bulk["requests"], bulk["attainment"]) == ("bulk", 80, 1.0)
    assert 0 < tight["p50_ttft_s"] <= tight["p99_ttft_s"] < bulk["p99_e2e_s"]
    flood, quiet = found["tenants"]
    assert (flood["tenant"], quiet["tenant"], quiet["requests"]) == ("flood", "quiet", 20)
    assert flood["device_s"] > 5 * quiet["device_s"] > 0
    plain = said(capsys, *words)["policies"][0]
    assert "tiers" not in plain
    assert [row["tenant"] for row in plain["tenants"]] == ["flood", "quiet"]


def test_tiers_are_for_policies_that_never_switch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trace", tiered_trace(tmp_path), "--tier", "tight=400/60", "--tier", "bulk=-/-"]
    with pytest.raises(SystemExit):
        said(capsys, *words, "--policies", "oserve")
    assert "'oserve' switches" in capsys.readouterr().err
