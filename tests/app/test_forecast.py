"""``oserve forecast`` from a file to an answer, and its errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from oserve.cli import main
from oserve.core import OServeError
from oserve.forecast.series import SeriesOptions, load_series
from oserve.traces import TraceRequest, synthesise_mix


def trace(path: Path, *, seed: int = 1, minutes: int = 24, change_s: float | None = 600.0) -> Path:
    rows = synthesise_mix(
        rate_rps=4, duration_s=60 * minutes + 1, seed=seed, mix_cv=0.4, change_period_s=change_s
    )
    return saved(path, list(rows))


def saved(path: Path, rows: list[TraceRequest]) -> Path:
    lines = [f"{row.arrival_s},{row.prompt_tokens},{row.output_tokens}" for row in rows]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]), encoding="utf-8")
    return path


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["oserve", "forecast", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_a_trace_is_forecast_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "trace.csv")
    assert called(monkeypatch, "--trace", path, "--models", "last-value,smoothing", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [item["model"] for item in told["models"]] == ["default", "last-value", "smoothing"]
    assert set(told["models"][0]) == {"model", "rrmse", "pinball", "coverage90", "ms"}
    assert (told["windows"], told["scored_windows"]) == (24, 12)
    assert 5 < told["floor"] < told["models"][0]["rrmse"]
    assert len(told["forecast"]) == len(told["types"]) == 4
    assert len(told["forecast"][0]["quantiles_rps"]["0.95"]) == 5
    assert sum(item["mean_rps"][0] for item in told["forecast"]) == pytest.approx(4, rel=0.2)
    assert told["regret"]["best_model"] in {"last-value", "smoothing"}


@pytest.mark.slow
def test_it_is_shown_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = trace(tmp_path / "trace.csv"), tmp_path / "forecast.png"
    words = ("--trace", path, "--models", "none", "--steps", 2, "--plot", picture)
    assert called(monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert "Poisson floor" in shown
    assert "2 ahead" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_counts_are_read_and_grouped(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    rows = [f"{600 * place},{place},{100 + place},2" for place in range(21)]
    path.write_text("\n".join(["window_s,small,large,late", *rows]), encoding="utf-8")
    series = load_series(path, SeriesOptions(interval_s=1200.0, types=2))
    # Ten windows of two rows; the last row is half a window. The largest of the first half.
    assert series.names == ("large", "small")
    assert series.parts.shape == (10, 2, 2)
    assert series.counts[0].tolist() == [201, 1]
    with pytest.raises(OServeError, match="multiple"):
        load_series(path, SeriesOptions(interval_s=700.0))
    with pytest.raises(OServeError, match="whole windows"):
        load_series(path, SeriesOptions(interval_s=6000.0))


def test_types_and_windows_do_not_look_ahead(tmp_path: Path) -> None:
    rows = list(synthesise_mix(rate_rps=4, duration_s=1441, seed=3, mix_cv=0.3))
    cut = next(place for place, row in enumerate(rows) if row.arrival_s >= 720)
    later = [
        TraceRequest(arrival_s=row.arrival_s, prompt_tokens=4000, output_tokens=3)
        for row in rows[cut:]
    ]
    one = load_series(saved(tmp_path / "one.csv", rows), SeriesOptions())
    other = load_series(saved(tmp_path / "other.csv", rows[:cut] + later), SeriesOptions())
    assert one.names == other.names
    assert np.array_equal(one.parts[:12], other.parts[:12])
    assert not np.array_equal(one.parts[12:], other.parts[12:])


def test_errors_say_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "trace.csv", minutes=12)
    counts = tmp_path / "counts.csv"
    counts.write_text("window_s,a\n0,1\n600,x\n", encoding="utf-8")
    empty = saved(tmp_path / "empty.csv", [])
    for words, expected in (
        ((), "--trace"),
        (("--trace", tmp_path / "none"), "cannot read"),
        (("--trace", empty), "zero traffic"),
        (("--trace", counts), f"{counts}:3"),
        (("--trace", path, "--interval", "-1"), "--interval"),
        (("--trace", path, "--interval", "600"), "whole windows"),
        (("--trace", path, "--types", "0"), "--types"),
        (("--trace", path, "--steps", "999"), "--steps"),
        (("--trace", path, "--models", "oracle"), "oracle"),
        (("--trace", path, "--lstm", path), "no LSTM"),
    ):
        assert called(monkeypatch, *words) == 2
        told = capsys.readouterr().err
        assert expected in told.replace("\n", "")
        assert "remedy" in told
