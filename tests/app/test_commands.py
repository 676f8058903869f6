"""Commands agree: one name for one thing, and whatever is wrong ends in a place and a remedy."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from oserve.cli import app
from oserve.core import OServeError

TRACE_OPTIONS = {
    *("--trace", "--time-unit", "--skip-bad-rows", "--sort", "--limit", "--duration-s"),
}
HEADER = "arrival_s,input_tokens,output_tokens\n"


def commands() -> dict[str, Any]:
    found = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", {})
        for name, one in inner.items():
            walk(one, (*words, name))
        if not inner:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), ())
    return found


def run(*words: str) -> None:
    typer.main.get_command(app).main(list(words), standalone_mode=False)


@pytest.mark.parametrize("name", ["plan", "simulate", "forecast run", "forecast train", "bench"])
def test_commands_that_read_traces_read_them_alike(name: str) -> None:
    command = commands()[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert options >= TRACE_OPTIONS
    assert "trace_argument" in {parameter.name for parameter in command.params}


def test_names_of_options_end_in_their_units() -> None:
    for name, command in commands().items():
        options = {option for parameter in command.params for option in parameter.opts}
        for option in ("--duration", "--interval", "--learn"):
            assert option not in options or f"{option}-s" in options, name


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--model", "qwen3-8b", "--cluster", "2xL40S"),
        ("simulate", "--model", "qwen3-8b", "--cluster", "2xL40S"),
        ("forecast",),
        ("forecast", "train", "--output", "x.npz"),
        ("bench", "--url", "127.0.0.1:9"),
    ],
)
def test_a_trace_is_an_argument_or_an_option_and_bad_ones_are_told(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "5,1,1\n1,1,1\n")
    for trace in ((str(path),), ("--trace", str(path))):
        with pytest.raises(OServeError, match="backwards") as caught:
            run(*words, *trace)
        assert caught.value.place == f"{path}:3"
        assert "--sort" in caught.value.remedy
    with pytest.raises(OServeError, match="given twice") as caught:
        run(*words, str(path), "--trace", str(path))
    assert caught.value.place == "--trace"
    for option, value in (("--limit", "0"), ("--duration-s", "nan")):
        with pytest.raises(OServeError) as caught:
            run(*words, str(path), option, value)
        assert caught.value.place == option
    for text, said in (("", "empty"), (HEADER, "zero traffic"), ("PK\x03\x04", "zip")):
        path.write_text(text)
        with pytest.raises(OServeError, match=said):
            run(*words, str(path))
    with pytest.raises(OServeError, match="cannot read"):
        run(*words, str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [("status",), ("switch", "PLAN"), ("plan", "--live"), ("bench", "--synthetic", "5:1")],
)
def test_urls_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("replicas: []\n")
    words = tuple(str(plan) if word == "PLAN" else word for word in words)
    for url in ("127.0.0.1:9", "http://127.0.0.1:9/v1/", ":9"):
        with pytest.raises(OServeError, match="no answer") as caught:
            run(*words, "--url", url)
        assert caught.value.place.startswith("http://127.0.0.1:9")
        monkeypatch.setenv("OSERVE_URL", url)
        with pytest.raises(OServeError, match="no answer"):
            run(*words)
    with pytest.raises(OServeError) as caught:
        run(*words, "--url", "ftp://x")
    assert caught.value.place == "--url"


def test_models_and_plans_are_an_argument_or_an_option() -> None:
    for words in (("serve", "m", "--model", "n"), ("validate", "m", "--model", "n")):
        with pytest.raises(OServeError, match="given twice") as caught:
            run(*words)
        assert caught.value.place == "--model"
    with pytest.raises(OServeError, match="given twice"):
        run("switch", "a", "--to", "b")


@pytest.mark.parametrize(
    ("energy", "told"),
    [
        (None, ""),
        (
            {"power_w": 1234.4, "idle_power_w": 0, "joules_per_output_token": None},
            "energy: 1,234 W (by model and nvml)",
        ),
        (
            {"power_w": 488, "idle_power_w": 144, "joules_per_output_token": 1.9312},
            "energy: 488 W, idle devices 144 W, 1.93 J per output token (by model and nvml)",
        ),
    ],
)
def test_status_tells_the_energy_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    energy: dict[str, Any] | None,
    told: str,
) -> None:
    document = {
        "model": "m",
        "serving": True,
        "plan_id": "p",
        "replicas": [],
        "workload_types": [],
        "routing_shares": {},
        "energy": None if energy is None else energy | {"sources": ["model", "nvml"]},
    }
    # The package has a function of the module's name.
    module = importlib.import_module("oserve.cli.status")
    monkeypatch.setattr(module, "call", lambda *_args, **_more: json.dumps(document).encode())
    run("status", "--url", "http://127.0.0.1:1")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("energy")]
    assert lines == ([told] if told else [])
