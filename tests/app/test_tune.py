"""``oserve tune`` from words to settings: what it says, what it refuses, and twice the same."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from oserve.cli import main
from oserve.config import load_settings
from oserve.traces import synthesise

SLO = ("--slo-ttft-ms", "1500", "--slo-tpot-ms", "80")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ["arrival_s,prompt_tokens,output_tokens"]
    rows += [
        f"{item.arrival_s:.6f},{item.prompt_tokens},{min(60, item.output_tokens)}"
        for item in synthesise(rate_rps=8.0, duration_s=60.0, seed=3)
    ]
    file = tmp_path_factory.mktemp("trace") / "trace.csv"
    file.write_text("\n".join(rows))
    return file


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.yaml"
    file.write_text(
        "replicas:\n"
        "  - {id: r0, devices: ['gpu:0'], shape: {max_num_batched_tokens: 512}}\n"
        "  - {id: r1, devices: ['gpu:1'], shape: {max_num_batched_tokens: 512}}\n"
    )
    return file


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    before = sys.argv
    sys.argv = ["oserve", "tune", *(str(word) for word in words)]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
    finally:
        sys.argv = before
    return capsys.readouterr().out


def test_it_tunes_a_given_plan_and_serve_takes_what_it_writes(
    trace: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", "qwen3-8b", "--cluster", "2xL40S", "--plan", plan, *SLO)
    output = tmp_path / "tuned.yaml"
    text = said(capsys, trace, *words, "--json", "--output", output)
    found: dict[str, Any] = json.loads(text)
    assert found["simulations"] > 0
    assert sum(found["requests"]) > 400
    assert {item["verdict"] for item in found["constants"]} <= {"same", "kept", "rejected"}
    settings = load_settings(str(output), {}, {})
    assert settings.planning.slo_ttft_ms == 1500
    order = settings.gateway.order.penalty_s_per_1000_tokens
    assert order == found["settings"]["gateway.order.penalty_s_per_1000_tokens"]
    assert text == said(capsys, trace, *words, "--json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "no trace"),
        (("TRACE",), "--slo-ttft-ms"),
        (("TRACE", *SLO), "no model"),
        (("TRACE", *SLO, "--model", "quen"), "nothing is known"),
        (("TRACE", *SLO, "--model", "qwen3-8b", "--hold-out", "1"), "--hold-out"),
        (("TRACE", *SLO, "--model", "qwen3-8b", "--min-gain", "-1"), "--min-gain"),
        (("TRACE", *SLO, "--model", "qwen3-8b", "--limit", "300"), "first part has"),
        (("TRACE", *SLO, "--model", "qwen3-8b", "--hold-out", "0.1"), "held out has"),
        (("TRACE", "--slo-ttft-ms", "0.01", "--model", "qwen3-8b"), "at no rate"),
        (("TRACE", *SLO, "--model", "qwen3-8b", "--output", "/proc/no/x.yaml"), "cannot write"),
        (("absent.csv", *SLO, "--model", "qwen3-8b"), "cannot read"),
    ],
)
def test_bad_input_is_refused(
    words: tuple[str, ...],
    expected: str,
    trace: Path,
    plan: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(trace) if word == "TRACE" else word for word in words]
    with pytest.raises(SystemExit) as stopped:
        said(capsys, *given, "--cluster", "2xL40S", "--plan", plan)
    assert stopped.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_an_attached_server_cannot_be_simulated(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attach.yaml"
    file.write_text("replicas:\n  - {id: r0, attach: {url: 'http://127.0.0.1:1'}}\n")
    with pytest.raises(SystemExit):
        said(capsys, trace, *SLO, "--model", "qwen3-8b", "--cluster", "2xL40S", "--plan", file)
    assert "attached" in capsys.readouterr().err
